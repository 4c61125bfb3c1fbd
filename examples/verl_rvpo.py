"""RVPO as an advantage estimator of verl 0.9.1.

    VERL_USE_EXTERNAL_MODULES=verl_rvpo PYTHONPATH=.:examples python -m verl.trainer.main_ppo \\
        trainer.use_v1=False algorithm.adv_estimator=gdpo \\
        '+algorithm.gdpo_reward_keys=[format,tool]' ...

`compute_score` returns a dict of `score` and the rewards that the keys name (missing: NaN); their
weights are `+algorithm.gdpo_reward_weights`. verl hands single rewards only to the estimator called
`gdpo`, and only in its legacy trainer: hence the last line, and trainer.use_v1=False. The default
trainer (V1) drops them, GDPO's too.

`norm_adv_by_std_in_grpo` and `use_kl_in_reward` have no effect.
"""

import numpy as np
import torch
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

from rvpo import advantages


@register_adv_est("rvpo")
def estimator(token_level_rewards, response_mask, index, config, non_tensor_batch, **_):
    """Advantages and returns (B, T) of B responses. index (B,): the prompt that each belongs to."""
    columns = [non_tensor_batch[key].astype(float) for key in config.gdpo_reward_keys]
    rewards = torch.tensor(np.stack(columns, -1))  # (B, K)
    # Groups may be interleaved and of unequal size: they are padded with NaN.
    _, group = np.unique(index, return_inverse=True)  # (B,)
    place = [(group[:i] == group[i]).sum() for i in range(len(group))]  # (B,) in its group
    padded = rewards.new_full((max(group) + 1, max(place) + 1, rewards.shape[1]), torch.nan)
    padded[group, place] = rewards
    weights = config.get("gdpo_reward_weights")
    of_groups = advantages(padded, "rvpo", beta=2.0, weights=weights)  # (P, G)
    of_responses = of_groups[group, place].to(token_level_rewards)  # (B,)
    over_tokens = of_responses[:, None] * response_mask  # (B, T)
    return over_tokens, over_tokens


ADV_ESTIMATOR_REGISTRY["gdpo"] = estimator
