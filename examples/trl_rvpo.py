"""RVPO inside TRL 1.16's GRPOTrainer, which has no hook for the advantages: hence a subclass.

    from trl_rvpo import RVPOTrainer

    RVPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", [reward_a, reward_b], config, dataset).train()

With this file and rvpo.py beside your script, or `PYTHONPATH=.:examples python yours.py`; several `reward_funcs`. What
one of them answers with None is missing: it is left out, and not counted as 0. `reward_weights` weight the channels.

No effect on the loss: `scale_rewards` and `multi_objective_aggregation`. `mask_truncated_completions` takes completions
out of the loss, not out of their group. What TRL logs as advantages, `reward_std` and `frac_reward_zero_std` is still
its own.
"""

from trl import GRPOTrainer

from rvpo import advantages


class RVPOTrainer(GRPOTrainer):
    def _calculate_rewards(self, *args):
        self.raw_rewards = super()._calculate_rewards(
            *args
        )  # of all processes, one row a completion, None is NaN
        return self.raw_rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        group = self.num_generations if self.model.training else self.num_generations_eval
        rewards = self.raw_rewards.unflatten(
            0, (-1, group)
        )  # a prompt's completions are neighbours: (P, G, K)
        whole = advantages(
            rewards, "rvpo", beta=2.0, weights=self.reward_weights.to(rewards)
        ).flatten()
        batch["advantages"] = whole.chunk(self.accelerator.num_processes)[
            self.accelerator.process_index
        ]
        return batch
