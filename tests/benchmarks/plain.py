"""The plain path: PPO as the classic trainer computed it, padded, with every logit and every forward pass.

It is what the fast path must equal. It shares the mathematics (`rlhf_ppo.functional`), not the work: responses from
`model.generate`, old log-probabilities recomputed, rows padded to the longest of the batch, the LM head on every
position, its logits kept, Adam as a loop over parameters.
"""

import time
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo import PPOConfig, PPOTrainer
from rlhf_ppo.learner.statistics import Statistics
from rlhf_ppo.rollout.experience import Responses


class PlainTrainer(PPOTrainer):
    """`PPOTrainer` with PPO's step written out over the classic's inner methods."""

    def learn(self, responses: Responses) -> Statistics:
        """One iteration, as `PPOTrainer.learn`; only the statistics that a comparison reads."""
        queries, answers = list(responses.inputs.prompts), list(responses.inputs.responses)
        start = time.process_time()
        with torch.no_grad():
            inputs = self.prepare_model_inputs(queries, answers)
            logprobs, _, values, mask = self.batched_forward_pass(self.model, queries, answers, inputs)
            ref_logprobs, _, _, _ = self.batched_forward_pass(self.ref_model, queries, answers, inputs)
            scored = time.process_time()
            rewards, penalty, kl = self.compute_rewards(responses.scores, logprobs, ref_logprobs, mask)
            values, advantages, returns = self.compute_advantages(values, rewards, mask)
        old = {
            "logprobs": logprobs, "values": values, "mask": mask, "advantages": advantages, "returns": returns,
        }  # fmt: skip
        credited = time.process_time()
        record = [
            self._minibatch_step(rows.tolist(), queries, answers, inputs, old)
            for _ in range(self.config.ppo_epochs)
            for rows in self.algorithm.update.shuffle(len(queries), mask.device).split(self.config.mini_batch_size)
        ]
        ended = time.process_time()
        means = {f"ppo/{name}": float(torch.stack([row[name].mean() for row in record]).mean()) for name in _SCALARS}
        mean_kl = float((kl * mask).sum(dim=1).mean())
        coefficient = float(self.kl_ctl.value)
        self.kl_ctl.update(mean_kl, len(queries))
        return means | {
            "objective/kl": mean_kl, "objective/kl_coef": coefficient, "objective/logprobs": logprobs.numpy(),
            "objective/entropy": float(-(logprobs * mask).sum(dim=1).mean()),
            "ppo/mean_scores": float(responses.scores.mean()),
            "tokens/responses_len_mean": float(mask.sum(dim=1).float().mean()),
            "ppo/mean_non_score_reward": float((penalty * mask).sum() / mask.sum()),
            "time/ppo/forward_pass": scored - start, "time/ppo/optimize_step": ended - credited,
            "time/ppo/total": ended - start,
        }  # fmt: skip

    def _minibatch_step(
        self, rows: list[int], queries: list[Tensor], answers: list[Tensor], inputs: dict[str, Tensor], old: Any
    ) -> dict[str, Tensor]:
        logprobs, logits, values, _ = self.batched_forward_pass(
            self.model, [queries[row] for row in rows], [answers[row] for row in rows],
            {name: value[rows] for name, value in inputs.items()}, return_logits=True,
        )  # fmt: skip
        was = {name: value[rows] for name, value in old.items()}
        assert logits is not None
        return self.train_minibatch(
            was["logprobs"], was["values"], logprobs, logits, values, was["mask"], was["advantages"], was["returns"]
        )


def plain_config(**settings: Any) -> PPOConfig:
    """Settings without what is faster for the same result."""
    slower = ("fused_adam", "fast_products", "packing", "fused_head", "reuse_logprobs", "keep_freed_memory")
    return PPOConfig(**settings, **dict.fromkeys(slower, False))


_SCALARS = (
    "loss/policy", "loss/value", "loss/total", "policy/entropy", "policy/approxkl", "policy/policykl",
    "policy/clipfrac", "policy/advantages_mean", "returns/mean", "returns/var", "val/vpred", "val/error",
    "val/clipfrac", "val/mean", "val/var",
)  # fmt: skip
