"""RVPO inside TRL 1.16's GRPOTrainer, which has no hook for the advantages: hence a subclass.

    from trl_rvpo import RVPOTrainer

    RVPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", [reward_a, reward_b], config, dataset).train()

Have this file and rvpo.py beside your script, or start it by `PYTHONPATH=.:examples python
yours.py`. Each of `reward_funcs` is a channel, weighted by `reward_weights`. A reward of None is
missing: it is left out, and not counted as 0.

`scale_rewards` and `multi_objective_aggregation` have no effect on the loss.
`mask_truncated_completions` takes completions out of the loss, not out of their group. What TRL
logs as advantages, `reward_std` and `frac_reward_zero_std` is still its own.
"""

from trl import GRPOTrainer

from rvpo import advantages


class RVPOTrainer(GRPOTrainer):
    def _calculate_rewards(self, *args):
        # Of all processes, a row a completion; None is NaN.
        self.raw_rewards = super()._calculate_rewards(*args)
        return self.raw_rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        group = self.num_generations if self.model.training else self.num_generations_eval
        # A prompt's completions are neighbours.
        rewards = self.raw_rewards.unflatten(0, (-1, group))  # (P, G, K)
        weights = self.reward_weights.to(rewards)
        of_all = advantages(rewards, "rvpo", beta=2.0, weights=weights).flatten()
        of_processes = of_all.chunk(self.accelerator.num_processes)
        batch["advantages"] = of_processes[self.accelerator.process_index]
        return batch
