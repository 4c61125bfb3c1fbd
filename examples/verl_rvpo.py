"""RVPO as an advantage estimator of verl 0.9.1.

    VERL_USE_EXTERNAL_MODULES=verl_rvpo PYTHONPATH=.:examples python -m verl.trainer.main_ppo trainer.use_v1=False \\
        algorithm.adv_estimator=gdpo '+algorithm.gdpo_reward_keys=[format,tool]' ...

`compute_score` returns a dict of `score` and the rewards that the keys name (missing: NaN); their weights are
`+algorithm.gdpo_reward_weights`. verl hands single rewards only to the estimator called `gdpo`, and only in its legacy
trainer: hence the last line, and trainer.use_v1=False. The default trainer (V1) drops them, GDPO's too.

No effect: `norm_adv_by_std_in_grpo`, `use_kl_in_reward`. Groups may be interleaved and of unequal size.
"""

import numpy as np
import torch
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

from rvpo import advantages


@register_adv_est("rvpo")
def estimator(token_level_rewards, response_mask, index, config, non_tensor_batch, **_):
    """Advantages and returns (B, T) of B responses. index (B,): the prompt that each belongs to."""
    rewards = torch.tensor(
        np.stack([non_tensor_batch[key].astype(float) for key in config.gdpo_reward_keys], -1)
    )
    _, group = np.unique(
        index, return_inverse=True
    )  # groups may be interleaved and of unequal size: pad with NaN
    place = [(group[:i] == group[i]).sum() for i in range(len(group))]
    padded = rewards.new_full((max(group) + 1, max(place) + 1, rewards.shape[1]), torch.nan)
    padded[group, place] = rewards
    whole = advantages(padded, "rvpo", beta=2.0, weights=config.get("gdpo_reward_weights"))[
        group, place
    ]
    return (whole.to(token_level_rewards)[:, None] * response_mask,) * 2


ADV_ESTIMATOR_REGISTRY["gdpo"] = estimator
