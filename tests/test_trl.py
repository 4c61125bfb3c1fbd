"""The example's RVPOTrainer in TRL itself: two steps of the tiny model on two ranks."""

import math
import os
import re
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
SCORES = []  # of each completion: (step, prompt, tokens, rewards), as the reward functions saw them


def vowels(completions, **_) -> list[float]:
    return [len(re.findall("[aeiou]", text)) / max(1, len(text)) for text in completions]


def even(completion_ids, **_) -> list[float]:
    return [10.0 * (torch.tensor(ids) % 2 == 0).sum().item() for ids in completion_ids]


def sometimes(prompts, completions, completion_ids, trainer_state, **_) -> list[float | None]:
    """Missing for some. It is the last function, and notes down what all say of a completion."""
    values = [None if ids[0] % 3 == 0 else float(ids[-1] % 5) for ids in completion_ids]
    columns = prompts, completion_ids, vowels(completions), even(completion_ids), values
    for prompt, ids, *rewards in zip(*columns, strict=True):
        SCORES.append((trainer_state.global_step, prompt, tuple(ids), rewards))
    return values


def noting_trainer() -> tuple[type, list]:
    """An RVPOTrainer, and the list to which it adds each (step, prompt, tokens, advantage)."""
    from trl_rvpo import RVPOTrainer

    used = []

    class Noting(RVPOTrainer):
        def _compute_loss(self, model, inputs):
            assert inputs["advantages"].dtype == torch.float32
            names = "prompt_ids prompt_mask completion_ids completion_mask advantages"
            columns = [inputs[name] for name in names.split()]
            for prompt, prompt_mask, ids, mask, advantage in zip(*columns, strict=True):
                text = self.processing_class.decode(prompt[prompt_mask.bool()])
                tokens = tuple(ids[mask.bool()].tolist())
                used.append((self.state.global_step, text, tokens, advantage.item()))
            return super()._compute_loss(model, inputs)

    return Noting, used


def train(out: Path, rows: int, accumulate: int, **settings) -> None:
    """Two steps. Saves to `out` this rank's rewards, and the advantages in its loss."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig

    trainer_class, used = noting_trainer()
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
    trainer = trainer_class(
        str(path),
        [vowels, even, sometimes],
        config,
        prompts,
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    trainer.evaluate(prompts)  # runs, with groups of another size too
    both = zip(before, trainer.model.parameters(), strict=True)
    changed = any(not torch.equal(old, new.detach()) for old, new in both)
    torch.save({"scores": SCORES, "used": used, "changed": changed}, out)
    SCORES.clear()


def check(ranks: list[dict], completions: int, weights: list[float] | None = None) -> None:
    """Every advantage in the loss is rvpo.advantages of the rewards of its step, of all ranks.

    Missing rewards are NaN in them."""
    assert all(rank["changed"] for rank in ranks)
    first, second = map(prompts_of, ranks)
    assert len(first & second) == 1  # the group on both
    for step in range(2):
        groups = defaultdict(list)
        for prompt, ids, scores in of_step("scores", step, ranks):
            groups[prompt].append((ids, [math.nan if x is None else x for x in scores]))
        rewards = []
        for group in groups.values():
            rewards.append([scores for _, scores in group])
        rewards = torch.tensor(rewards)
        assert rewards.shape == (completions // GROUP, GROUP, 3) and rewards[..., 2].isnan().any()
        expected = rvpo.advantages(rewards, "rvpo", 2.0, weights and torch.tensor(weights))
        assert expected.abs().amax() > 0.5
        as_zero = rvpo.advantages(rewards.nan_to_num(0.0), "rvpo", 2.0)
        assert not torch.allclose(expected.float(), as_zero, atol=0.1)
        by_text = {}
        for group, values in zip(groups.items(), expected.tolist(), strict=True):
            prompt, members = group
            for (ids, _), value in zip(members, values, strict=True):
                by_text[prompt, ids] = value
        used = of_step("used", step, ranks)
        assert len(used) == completions
        for prompt, ids, advantage in used:
            assert advantage == pytest.approx(by_text[prompt, ids], abs=1e-5)


def prompts_of(rank: dict) -> set[str]:
    """The prompts of its first step."""
    return {prompt for prompt, *_ in of_step("scores", 0, [rank])}


def of_step(what: str, step: int, ranks: list[dict]) -> list[tuple]:
    """What all ranks have noted down of a step."""
    return [row for rank in ranks for when, *row in rank[what] if when == step]


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
    ranks = [torch.load(trained / f"{case}-{rank}.pt") for rank in range(2)]
    check(ranks, 12, CASES[case].get("reward_weights"))
