"""The example's RVPOTrainer in TRL itself: two steps of the tiny model on two ranks."""

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, on_ranks

import rvpo
from local import models

sys.path.insert(0, str(ROOT / "examples"))

GROUP = 4
SCORES = []  # what the reward functions saw and said: (step, prompt, tokens, rewards) of each completion


def vowels(completions, **_) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def even(completion_ids, **_) -> list[float]:
    return [10.0 * sum(i % 2 == 0 for i in ids) for ids in completion_ids]


def sometimes(prompts, completions, completion_ids, trainer_state, **_) -> list[float | None]:
    """Missing for some. It is the last of the functions, so it notes down what all of them say of a completion."""
    values = [None if ids[0] % 3 == 0 else float(ids[-1] % 5) for ids in completion_ids]
    for row in zip(
        prompts, completion_ids, vowels(completions), even(completion_ids), values, strict=True
    ):
        SCORES.append((trainer_state.global_step, row[0], tuple(row[1]), row[2:]))
    return values


def train(out: Path, rows: int, accumulate: int, **settings) -> None:
    """Two steps; saves to `out` this rank's rewards and the advantages that its loss was computed with."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig
    from trl_rvpo import RVPOTrainer

    used = []

    class Noting(RVPOTrainer):
        def _compute_loss(self, model, inputs):
            assert inputs["advantages"].dtype == torch.float32
            for prompt, prompt_mask, ids, mask, advantage in zip(
                *(
                    inputs[key]
                    for key in (
                        "prompt_ids",
                        "prompt_mask",
                        "completion_ids",
                        "completion_mask",
                        "advantages",
                    )
                ),
                strict=True,
            ):
                text = self.processing_class.decode(prompt[prompt_mask.bool()])
                used.append(
                    (
                        self.state.global_step,
                        text,
                        tuple(ids[mask.bool()].tolist()),
                        advantage.item(),
                    )
                )
            return super()._compute_loss(model, inputs)

    path = models.tiny()
    config = GRPOConfig(
        output_dir=str(out.with_suffix("")),
        max_steps=2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        num_generations=GROUP,
        max_completion_length=8,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    prompts = Dataset.from_dict({"prompt": [f"prompt {i}: " + "a b c " * i for i in range(12)]})
    trainer = Noting(
        str(path),
        [vowels, even, sometimes],
        config,
        prompts,
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    trainer.evaluate(prompts)  # runs, with groups of another size too
    changed = any(
        not torch.equal(old, new.detach())
        for old, new in zip(before, trainer.model.parameters(), strict=True)
    )
    torch.save({"scores": SCORES, "used": used, "changed": changed}, out)
    SCORES.clear()


def check(ranks: list[dict], completions: int, weights: list[float] | None = None) -> None:
    """Every advantage in the loss is rvpo.advantages of the rewards of its step, of all ranks, missing ones as NaN."""
    assert all(rank["changed"] for rank in ranks)
    first, second = ({prompt for step, prompt, *_ in rank["scores"] if step == 0} for rank in ranks)
    assert len(first & second) == 1  # the group on both
    for step in range(2):
        groups = defaultdict(list)
        for rank in ranks:
            for when, prompt, ids, scores in rank["scores"]:
                if when == step:
                    groups[prompt].append((ids, [float("nan") if x is None else x for x in scores]))
        rewards = torch.tensor([[scores for _, scores in group] for group in groups.values()])
        assert rewards.shape == (completions // GROUP, GROUP, 3) and rewards[..., 2].isnan().any()
        expected = rvpo.advantages(
            rewards, "rvpo", 2.0, None if weights is None else torch.tensor(weights)
        )
        assert expected.abs().amax() > 0.5
        as_zero = rvpo.advantages(rewards.nan_to_num(0.0), "rvpo", 2.0)
        assert not torch.allclose(expected.float(), as_zero, atol=0.1)
        by_text = {
            (prompt, ids): expected[p, g].item()
            for p, (prompt, group) in enumerate(groups.items())
            for g, (ids, _) in enumerate(group)
        }
        got = [
            (prompt, ids, advantage)
            for rank in ranks
            for when, prompt, ids, advantage in rank["used"]
            if when == step
        ]
        assert len(got) == completions
        for prompt, ids, advantage in got:
            assert advantage == pytest.approx(by_text[prompt, ids], abs=1e-5)


CASES = {
    "whole": {"rows": 6, "accumulate": 1},
    "slices": {
        "num_generations_eval": 2,
        "rows": 3,
        "accumulate": 2,
        "scale_rewards": "none",
        "multi_objective_aggregation": "normalize_then_sum",
        "reward_weights": [1.0, 0.0, 2.0],
    },
}


def main(out: Path) -> None:
    """On a rank."""
    for case, settings in CASES.items():
        train(out / f"{case}-{os.environ['RANK']}.pt", **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two ranks with 6 completions each: the second of three prompts has two on either."""
    path = tmp_path_factory.mktemp("trl")
    on_ranks(2, 2, path, module="test_trl")
    return path


@pytest.mark.parametrize("case", CASES)
def test_advantages_in_the_loss(trained, case):
    check(
        [torch.load(trained / f"{case}-{rank}.pt") for rank in range(2)],
        12,
        CASES[case].get("reward_weights"),
    )
