"""The example's estimator in verl itself: its registry, DataProto and compute_advantage. Nothing is
trained."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import rvpo

# requirements-verl.txt lacks what the list of vLLM has.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="verl needs packages that come with vLLM"
)
NAN = math.nan
# By prompt, interleaved below. A filter has left one sample of "c"; "d" is constant.
REWARDS = {
    "a": [[1.0, 0.0], [0.0, NAN], [1.0, 5.0], [0.0, 3.0]],
    "b": [[None, None], [1.0, 2.0], [0.0, 4.0]],
    "c": [[1.0, 9.0]],
    "d": [[1.0, 7.0], [1.0, 7.0]],
}
UIDS = list("abdabcabda")


def run(out: Path) -> None:
    """Inside verl: what compute_advantage makes of this batch. Saves it to `out`."""
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    rows = {uid: iter(rows) for uid, rows in REWARDS.items()}
    scores = [next(rows[uid]) for uid in UIDS]
    lengths = 1 + torch.arange(len(UIDS)) % 5
    mask = (torch.arange(6) < lengths[:, None]).long()
    mask[3] = 0  # an empty response
    tensors = {
        "prompts": torch.ones(len(UIDS), 3),
        "responses": torch.ones(len(UIDS), 6),
        "response_mask": mask,
        "attention_mask": torch.cat([torch.ones(len(UIDS), 3).long(), mask], 1),
        "token_level_rewards": torch.randn(len(UIDS), 6),
    }
    config = OmegaConf.create({"adv_estimator": "gdpo", "gdpo_reward_keys": ["format", "tool"]})
    results = {"mask": mask}
    for weights in (None, [1.0, 3.0]):
        config.gdpo_reward_weights = weights
        data = DataProto.from_dict(
            tensors,
            non_tensors={  # as ray_trainer.py makes them of what compute_score returned
                "uid": np.array(UIDS, dtype=object),
                "format": np.array([row[0] for row in scores]),
                "tool": np.array([row[1] for row in scores]),
            },
        )
        data = compute_advantage(data, config.adv_estimator, config=config)
        assert torch.equal(data.batch["advantages"], data.batch["returns"])
        results[str(weights)] = data.batch["advantages"]
        data.batch["response_mask"] = torch.ones_like(mask)
        data = compute_advantage(data, config.adv_estimator, config=config)
        results[f"{weights}, long"] = data.batch["advantages"]
    with pytest.raises(TypeError, match="non_tensor_batch"):  # why the estimator takes GDPO's name
        compute_advantage(data, "rvpo", config=config)
    torch.save(results, out)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """A process of its own: only there are verl's packages on the path."""
    path = tmp_path_factory.mktemp("verl")
    seen = os.pathsep.join(map(str, (ROOT / "examples", ROOT, Path(sys.prefix) / "verl")))
    own = {"PYTHONPATH": seen, "VERL_USE_EXTERNAL_MODULES": "verl_rvpo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(path / "out.pt")]
    subprocess.run(command, check=True, timeout=300, env=os.environ | own)
    return torch.load(path / "out.pt")


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_advantages(results, weights):
    rewards = torch.full((len(REWARDS), 4, 2), NAN)  # (P, G, K); None is missing, too
    for p, rows in enumerate(REWARDS.values()):
        rewards[p, : len(rows)] = torch.tensor(np.array(rows, dtype=float))
    expected = rvpo.advantages(rewards, "rvpo", 2.0, weights and torch.tensor(weights))
    assert (expected[2:] == 0).all() and (expected[:2].abs() > 1e-3).sum() == 6
    wanted = []
    for i, uid in enumerate(UIDS):
        p, g = [*REWARDS].index(uid), UIDS[:i].count(uid)
        wanted.append(expected[p, g])
    got = results[str(weights)]
    assert got.dtype == torch.float32
    by_token = torch.stack(wanted)[:, None] * results["mask"]
    torch.testing.assert_close(got, by_token.float())
    # Whatever the lengths of the responses:
    assert torch.equal(results[f"{weights}, long"] * results["mask"], got)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
