"""The classic trainer's inner methods, for scripts that call them; tensors are padded, [batch, length - 1].

`step` does not call them: it scores response tokens only. They compute the same numbers by the same functions
(tests/classic/test_classic.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.functional import (
    entropy_from_logits,
    gae,
    kl_estimate,
    masked_mean,
    masked_var,
    ppo_clip_loss,
    token_logprobs,
    value_loss,
    whiten,
)
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.rollout.checks import ModelLimits, check_step_inputs

_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2"}


class ClassicInnerMethods(PPOLearner):
    """The methods that the classic's `step` consists of."""

    data_collator: Any

    def prepare_model_inputs(self, queries: list[Tensor], responses: list[Tensor]) -> dict[str, Tensor]:
        """Queries and responses joined and padded on the tokenizer's side: `input_ids`, `attention_mask` [B, L]."""
        if self.is_encoder_decoder:
            encoder, decoder = self._padded(queries), self._padded(responses)
            return {**encoder, **{f"decoder_{name}": value for name, value in decoder.items()}}
        return self._padded([torch.cat(pair) for pair in zip(queries, responses, strict=True)])

    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: list[Tensor],
        responses: list[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Log-probabilities, logits (or None), values and response mask, each [B, L - 1]; entry i is of token i + 1."""
        model.eval()
        size = self.config.mini_batch_size
        logprobs, logits, values = [], [], []
        for start in range(0, len(queries), size):
            inputs = {name: value[start : start + size] for name, value in model_inputs.items()}
            out, _, value = model(**inputs, **self._positions(inputs))
            tokens = inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
            logprobs.append(token_logprobs(out[:, :-1], tokens[:, 1:]))
            values.append(value[:, :-1])
            logits.append(out[:, :-1] if return_logits else None)
        mask = self._response_mask(queries, responses, model_inputs, response_masks)
        return torch.cat(logprobs), torch.cat(logits) if return_logits else None, torch.cat(values), mask  # type: ignore[arg-type]

    def compute_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, their non-score part, and the KL, each [B, L - 1]; the score is at the last position with mask 1."""
        kl = self._kl_penalty(logprobs, ref_logprobs)
        penalty = -self.kl_ctl.value * kl
        rewards = penalty.clone()
        for row, mask in enumerate(masks):
            rewards[row, mask.nonzero()[-1]] += scores[row]
        return rewards, penalty, kl

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masked values, whitened advantages and returns over the full padded width, as in the classic."""
        steps = mask.bool()
        values, rewards = values.masked_fill(~steps, 0.0), rewards.masked_fill(~steps, 0.0)
        if self.config.whiten_rewards:
            mean, scale = masked_mean(rewards, steps), (masked_var(rewards, steps) + 1e-8).rsqrt()
            rewards = (rewards - mean) * scale + mean  # positions outside the mask included, as in the classic
        ends = torch.zeros_like(steps)
        ends[:, -1] = True
        advantages, returns = gae(
            rewards, torch.nn.functional.pad(values, (0, 1)), ends, torch.zeros_like(ends),
            gamma=self.config.gamma, lam=self.config.lam,
        )  # fmt: skip
        return values, whiten(advantages, steps).detach(), returns

    def loss(
        self, old_logprobs: Tensor, values: Tensor, logits: Tensor, vpreds: Tensor, logprobs: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """Policy loss, weighted value loss and flat statistics of one padded minibatch."""
        config, steps = self.config, mask.bool()
        policy, ratios = ppo_clip_loss(
            logprobs, old_logprobs, advantages, steps, clip_low=config.cliprange, clip_high=config.cliprange
        )
        value, errors = value_loss(vpreds, values, returns, steps, clip_range=config.cliprange_value)
        entropy = entropy_from_logits(logits.float())
        stats = {
            "loss/policy": policy, "loss/value": value, "loss/total": policy + config.vf_coef * value,
            "policy/entropy": (entropy * steps).sum() / steps.sum(),
            "policy/approxkl": ratios["approx_kl"], "policy/policykl": ratios["policy_kl"],
            "policy/clipfrac": ratios["clip_fraction"], "policy/advantages": advantages,
            "policy/advantages_mean": masked_mean(advantages, steps), "policy/ratio": (logprobs - old_logprobs).exp(),
            "returns/mean": masked_mean(returns, steps), "returns/var": masked_var(returns, steps),
            "val/vpred": errors["mean"], "val/error": errors["error"], "val/clipfrac": errors["clip_fraction"],
            "val/mean": masked_mean(values, steps), "val/var": masked_var(values, steps),
        }  # fmt: skip
        return policy, config.vf_coef * value, {name: item.detach() for name, item in stats.items()}

    def train_minibatch(
        self, old_logprobs: Tensor, values: Tensor, logprobs: Tensor, logits: Tensor, vpreds: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One optimizer step on one padded minibatch; skipped when its mean ratio exceeds `ratio_threshold`."""
        policy, value, stats = self.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        self.accelerator.backward(policy + value)
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        if masked_mean(stats["policy/ratio"], mask.bool()) <= self.config.ratio_threshold:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return stats

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        if self.config.kl_penalty == "full":
            return (logprob.exp() * (logprob - ref_logprob)).sum(-1)
        return kl_estimate(logprob, ref_logprob, _ESTIMATORS[self.config.kl_penalty])  # type: ignore[arg-type]

    def _step_safety_checker(
        self,
        batch_size: int | None,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        masks: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """Check a batch as `step` does; return its tensors on the device, scores squeezed."""
        limits = ModelLimits(batch_size=batch_size, vocab_size=None, max_positions=None)
        check_step_inputs(queries, responses, scores, masks, limits=limits, device=self.current_device)
        squeezed = [score.squeeze() if score.numel() == 1 else score for score in scores]
        moved = [[tensor.to(self.current_device) for tensor in part] for part in (queries, responses, squeezed)]
        return moved[0], moved[1], moved[2], None if masks is None else [row.to(self.current_device) for row in masks]

    def _padded(self, rows: list[Tensor]) -> dict[str, Tensor]:
        features: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
        padded = self.tokenizer.pad(features, padding=True, return_tensors="pt")
        return {name: padded[name].to(self.current_device) for name in ("input_ids", "attention_mask")}

    def _positions(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Position ids that do not count left padding; {} if there is none."""
        if self.is_encoder_decoder or bool(inputs["attention_mask"][:, 0].all()):
            return {}
        return {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}

    def _response_mask(
        self, queries: list[Tensor], responses: list[Tensor], inputs: Mapping[str, Tensor], masks: list[Tensor] | None
    ) -> Tensor:
        attention = inputs["decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"]
        mask = torch.zeros_like(attention)[:, :-1]
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            first = int(attention[row].nonzero()[0]) + (1 if self.is_encoder_decoder else len(query) - 1)
            last = first + len(response) - (2 if self.is_encoder_decoder else 0)
            mask[row, first:last] = 1 if masks is None else masks[row].to(mask)
        return mask
