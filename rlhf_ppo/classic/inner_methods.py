"""The methods that the classic's `step` consists of; tensors are padded, [batch, length - 1].

`step` computes the same numbers by the same functions on response tokens alone, and calls these methods when a script
overrides one of them (`classic/composed_step.py`).
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling

from rlhf_ppo.classic.assignments import Assignable
from rlhf_ppo.functional import (
    classic_whiten_rewards,
    entropy_from_logits,
    gae,
    kl_estimate,
    last_action_index,
    masked_mean,
    masked_var,
    ppo_clip_loss,
    token_logprobs,
    value_loss,
    whiten,
)
from rlhf_ppo.learner.finite_checks import warn_of_negative_kl
from rlhf_ppo.rollout.checks import ModelLimits, check_step_inputs
from rlhf_ppo.updates.optimizer_steps import AccelerateSteps

_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "k3": "k3"}


class ClassicInnerMethods(Assignable):
    """The methods that the classic's `step` consists of."""

    data_collator: Any
    """Pads the rows of `prepare_model_inputs`; the default pads on the tokenizer's side."""
    _token_share: float = 1.0
    """Share of a minibatch in the tokens of its optimizer step; below 1 if gradients are accumulated."""
    _mean_ratio: float = 0.0
    """Mean probability ratio of the optimizer step, as far as its minibatches are through."""
    _skips_in_a_row: int = 0
    """Successive minibatches whose loss or gradient was not finite."""

    @property
    def model_params(self) -> list[nn.Parameter]:
        """The trained parameters of `model`."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

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
        model.train(self.config.gradient_checkpointing and torch.is_grad_enabled())  # layers recompute in training mode
        size = self.config.mini_batch_size
        logprobs, logits, values = [], [], []
        for start in range(0, len(queries), size):
            inputs = {name: value[start : start + size] for name, value in model_inputs.items()}
            with self.accelerator.autocast():
                out, _, value = model(**inputs)
            out = out[:, :-1].float() / self.config.temperature
            tokens = inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
            logprobs.append(token_logprobs(out, tokens[:, 1:]))
            values.append(value[:, :-1].float())
            logits.append(out if return_logits else None)
        mask = self._response_mask(queries, responses, model_inputs, response_masks)
        return torch.cat(logprobs), torch.cat(logits) if return_logits else None, torch.cat(values), mask  # type: ignore[arg-type]

    def compute_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, their non-score part, and the KL, each [B, L - 1].

        A score per response, [B], is earned at the last position with mask 1; scores per token are [B, L - 1].
        """
        kl = self._kl_penalty(logprobs, ref_logprobs)
        penalty = -self.kl_ctl.value * kl
        if scores.dim() == 2:
            return penalty + scores, penalty, kl
        last = last_action_index(masks.bool())[:, None]
        return penalty.scatter_add(1, last, scores[:, None].to(penalty)), penalty, kl

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masked values, whitened advantages and returns; gaps in the mask are passed over without decay."""
        config, steps = self.config, mask.bool()
        values, last = values.masked_fill(~steps, 0.0), last_action_index(steps)
        if config.whiten_rewards:
            rewards = classic_whiten_rewards(
                rewards, steps, tail=steps.shape[1] - 1 - last, gamma=config.gamma, lam=config.lam,
                reduce_sum=self.processes.reduce_sum,
            )  # fmt: skip
        ends = torch.zeros_like(steps).scatter(1, last[:, None], True)
        advantages, returns = gae(
            rewards, nn.functional.pad(values, (0, 1)), ends, torch.zeros_like(ends),
            gamma=config.gamma, lam=config.lam, mask=steps,
        )  # fmt: skip
        return values, whiten(advantages, steps, reduce_sum=self.processes.reduce_sum).detach(), returns

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
        entropy = masked_mean(entropy_from_logits(logits.float()), steps)
        stats = {
            "loss/policy": policy, "loss/value": value,
            "loss/total": policy + config.vf_coef * value - config.ent_coef * entropy, "policy/entropy": entropy,
            "policy/approxkl": ratios["approx_kl"], "policy/policykl": ratios["policy_kl"],
            "policy/clipfrac": ratios["clip_fraction"], "policy/advantages": advantages,
            "policy/advantages_mean": masked_mean(advantages, steps), "policy/ratio": (logprobs - old_logprobs).exp(),
            "returns/mean": masked_mean(returns, steps), "returns/var": masked_var(returns, steps),
            "val/vpred": errors["mean"], "val/error": errors["error"], "val/clipfrac": errors["clip_fraction"],
            "val/mean": masked_mean(values, steps), "val/var": masked_var(values, steps),
        }  # fmt: skip
        policy = policy - config.ent_coef * entropy
        return policy, config.vf_coef * value, {name: item.detach() for name, item in stats.items()}

    def train_minibatch(
        self, old_logprobs: Tensor, values: Tensor, logprobs: Tensor, logits: Tensor, vpreds: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One optimizer step on one padded minibatch; skipped when its mean ratio exceeds `ratio_threshold`.

        With accumulated gradients, the step is taken at the last minibatch of several.
        """
        policy, value, stats = self.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        loss = (policy + value) * self._token_share
        self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)  # it divides by their number
        ratio = float(masked_mean((logprobs - old_logprobs).detach().exp(), mask.bool()))
        self._mean_ratio += ratio * self._token_share
        if self.accelerator.sync_gradients:
            limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
            norm = float(self.accelerator.clip_grad_norm_(self.model_params, limit))
            steps, accepted = AccelerateSteps(self.policy, self.optimizer, self.accelerator), False
            try:
                accepted = self._accepts(loss.detach(), norm, can_overflow=steps.can_overflow())
            finally:
                self._mean_ratio = 0.0
                if not accepted:
                    steps.drop()
            if accepted:
                steps.apply()
            else:
                stats |= {f"loss/{name}": torch.zeros_like(policy) for name in ("policy", "value", "total")}
        return stats

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """Statistics of a step: tensors and numbers.

        Args:
            kl_coef: The coefficient that was used.
            data: `scores`, `logprobs`, `ref_logprobs`, `non_score_reward`, `kls`, `masks`, `queries`, `responses`, and
                `train_stats`, each of them [steps, entries].
        """
        mask, kl, scores = data["masks"].bool(), data["kls"], data["scores"]
        rows = kl.masked_fill(~mask, 0.0).sum(1)
        warn_of_negative_kl(float(rows.mean()), self.config.kl_penalty)
        stats = {
            "objective/kl": rows.mean(), "objective/kl_dist": rows, "objective/logprobs": data["logprobs"],
            "objective/ref_logprobs": data["ref_logprobs"], "objective/kl_coef": kl_coef,
            "objective/entropy": -data["logprobs"].masked_fill(~mask, 0.0).sum(1).mean(),
            "ppo/mean_non_score_reward": masked_mean(data["non_score_reward"], mask),
            "ppo/mean_scores": scores.mean(), "ppo/std_scores": _std(scores),
        }  # fmt: skip
        for name in ("queries", "responses"):
            lengths = torch.tensor([float(len(row)) for row in data[name]])
            stats |= {
                f"tokens/{name}_len_mean": float(lengths.mean()), f"tokens/{name}_len_std": float(_std(lengths)),
                f"tokens/{name}_dist": lengths.numpy(),
            }  # fmt: skip
        stats |= {f"ppo/{name}": value.mean(dim=0) for name, value in data["train_stats"].items()}
        if {"ppo/val/error", "ppo/returns/var"} <= stats.keys():
            stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
        return stats

    def gather_stats(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Average the single numbers over processes; arrays stay those of this process."""
        reduce, device = self.accelerator.reduce, self.current_device
        return {
            name: reduce(value.to(device), reduction="mean") if _is_number(name, value) else value
            for name, value in stats.items()
        }

    def _early_stop(self, policykl: Tensor) -> bool:
        """Whether the KL to the old policy exceeds 1.5 x `target_kl`; gradients are dropped then."""
        if not self.config.early_stopping:
            return False
        exceeded = float(self.accelerator.reduce(policykl, reduction="mean")) > 1.5 * self.config.target_kl
        if exceeded:
            self.optimizer.zero_grad()
        return exceeded

    def _accepts(self, local_loss: Tensor, norm: float, *, can_overflow: bool) -> bool:
        """Whether the optimizer may take the step: loss and gradient are finite, and the ratio is not too large.

        Loss and ratio are means over processes, so that all of them decide the same.
        """
        config, local = self.config, torch.stack([local_loss.float(), local_loss.new_tensor(self._mean_ratio).float()])
        loss, ratio = self.accelerator.reduce(local, reduction="mean").tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and can_overflow:
            return False  # a part of float16's search for its scale, no fault of the batch
        self._skips_in_a_row = 0 if finite else self._skips_in_a_row + 1
        if self._skips_in_a_row >= config.most_skips_in_a_row:
            raise FloatingPointError(
                f"expected finite losses and gradients, got loss {loss} and gradient norm {norm} in "
                f"{self._skips_in_a_row} minibatches in a row: nothing was learned from them. Lower the learning rate, "
                "or set `max_grad_norm`."
            )
        if not finite:
            warnings.warn(
                f"Skipped a minibatch whose loss ({loss}) or gradient norm ({norm}) is not finite; the optimizer did "
                "not move.", stacklevel=3,
            )  # fmt: skip
        elif not ratio <= config.ratio_threshold:
            warnings.warn(
                f"The average ratio of batch ({ratio:.2f}) exceeds threshold {config.ratio_threshold:.2f}. Skipping "
                "batch; the optimizer did not move.", stacklevel=3,
            )  # fmt: skip
        return finite and ratio <= config.ratio_threshold

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
        """`input_ids` and `attention_mask`, [B, L]."""
        if type(self.data_collator) is not DataCollatorForLanguageModeling:  # the script's own
            features = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
            batch = {name: value for name, value in self.data_collator(features).items() if name != "labels"}
        else:
            side, token = self.tokenizer.padding_side, self.tokenizer.pad_token_id or 0
            batch = {
                "input_ids": pad_sequence(rows, batch_first=True, padding_value=token, padding_side=side),
                "attention_mask": pad_sequence(
                    [torch.ones_like(row) for row in rows], batch_first=True, padding_side=side
                ),
            }
        return {name: value.to(self.current_device) for name, value in batch.items()}

    def _response_mask(
        self, queries: list[Tensor], responses: list[Tensor], inputs: Mapping[str, Tensor], masks: list[Tensor] | None
    ) -> Tensor:
        """1 where the next token is one of the response; an encoder-decoder's start token is not."""
        attention = inputs["decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"]
        mask, start = torch.zeros_like(attention)[:, :-1], int(self.is_encoder_decoder)
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            first = int(attention[row].nonzero()[0]) + (0 if self.is_encoder_decoder else len(query) - 1)
            own = torch.ones_like(response) if masks is None else masks[row]
            mask[row, first : first + len(response) - start] = own[start:].to(mask)
        return mask


def _std(values: Tensor) -> Tensor:
    return values.float().std() if len(values) > 1 else torch.zeros(())


def _is_number(name: str, value: object) -> bool:
    """Whether a statistic is one number on every process; a mean over minibatches is one of shape [1]."""
    is_mean = name.startswith("ppo/") and name not in ("ppo/policy/advantages", "ppo/policy/ratio")
    return isinstance(value, Tensor) and (value.dim() == 0 or (is_mean and value.shape == (1,)))
