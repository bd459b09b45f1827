"""`step()` as the classic composed it: called instead of `learn` where a script overrides one of the inner methods.

Without an override the results are those of `learn`, to rounding; it costs the classic's time and memory: whole rows
are scored, and the logits of a whole minibatch are kept.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling

from rlhf_ppo.classic.core_functions import convert_to_scalar, logprobs_from_logits, stack_dicts, stats_to_np
from rlhf_ppo.classic.inner_methods import ClassicInnerMethods
from rlhf_ppo.functional import total_scores
from rlhf_ppo.learner.finite_checks import check_finite_scores
from rlhf_ppo.learner.importance_correction import check_sampler_logprobs
from rlhf_ppo.learner.running_moments import normalize_scores
from rlhf_ppo.learner.statistics import Statistics
from rlhf_ppo.rollout.checks import check_step_inputs
from rlhf_ppo.rollout.experience import Responses, ScoredResponses
from rlhf_ppo.updates.optimizer_steps import drop_unfinished_step
from rlhf_ppo.updates.optimizers import learning_rate
from rlhf_ppo.utils.timing import empty_cache_after, timed

logger = logging.getLogger(__name__)

_INNER_METHODS = (
    "_step_safety_checker", "prepare_model_inputs", "batched_forward_pass", "compute_rewards", "_kl_penalty",
    "compute_advantages", "train_minibatch", "loss", "_early_stop", "record_step_stats", "gather_stats",
)  # fmt: skip
_ORIGINALS = {name: getattr(ClassicInnerMethods, name) for name in _INNER_METHODS}


def overridden_methods(trainer: ClassicInnerMethods) -> list[str]:
    """Inner methods that the trainer's class or the trainer itself replaces, `data_collator` among them."""
    names = [
        name for name, own in _ORIGINALS.items() if getattr(type(trainer), name) is not own or name in vars(trainer)
    ]
    return names + ["data_collator"] * (type(trainer.data_collator) is not DataCollatorForLanguageModeling)


def composed_step(
    trainer: ClassicInnerMethods,
    queries: list[Tensor],
    responses: list[Tensor],
    scores: list[Tensor],
    response_masks: list[Tensor] | None,
    *,
    before_update: Callable[[Responses], None],
) -> Statistics:
    """Learn from a batch by the trainer's inner methods, in the order of the classic's `step`.

    Args:
        before_update: Called with the checked batch before anything changes.

    Raises:
        ValueError: The batch is malformed, or the trainer does what the classic did not know.
    """
    _check_supported(trainer)
    trainer.check_assignments()
    timing: dict[str, float] = {}
    empty_cache = empty_cache_after(trainer.config.optimize_device_cache)
    with _right_padding(trainer), timed(timing, "total"), empty_cache:
        checked = trainer.processes.run_or_fail_together(
            lambda: check_step_inputs(
                *trainer._step_safety_checker(trainer.config.batch_size, queries, responses, scores, response_masks),
                limits=replace(trainer.limits, batch_size=None), device=trainer.current_device,
            )
        )  # fmt: skip
        check_sampler_logprobs(checked, trainer.importance_correction)
        before_update(checked)
        with torch.no_grad():
            batch = _score(trainer, checked, timing)
        with timed(timing, "optimize_step"), _averaged_gradients(trainer):
            record = _update(trainer, batch)
        with timed(timing, "calc_stats"):
            data = {"queries": checked.inputs.prompts, "responses": checked.inputs.responses, **batch.record()}
            stats = trainer.record_step_stats(
                kl_coef=float(trainer.kl_ctl.value), train_stats=_train_stats(record), **data
            )
            if trainer.is_distributed:
                stats = trainer.gather_stats(stats)
            stats = convert_to_scalar(stats_to_np(stats))
        stats["ppo/learning_rate"] = learning_rate(trainer.optimizer)
        trainer.kl_ctl.update(float(stats["objective/kl"]), len(batch.scores) * trainer.accelerator.num_processes)
        if trainer.lr_scheduler is not None:
            getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler).step()
    trainer.last_batch, trainer.metrics = None, {"ppo/updates": round(sum(one.share for one in record))}
    return stats | {f"time/ppo/{name}": seconds for name, seconds in timing.items()}


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A scored batch; tensors are padded, [B, L - 1]."""

    prompts: list[Tensor]
    responses: list[Tensor]
    """With the start token of an encoder-decoder."""
    model_inputs: dict[str, Tensor]
    scores: Tensor
    """Normalized, one per response."""
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    mask: Tensor
    penalty: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor

    def record(self) -> dict[str, Any]:
        """What `record_step_stats` reads."""
        return {
            "scores": self.scores, "logprobs": self.logprobs, "ref_logprobs": self.ref_logprobs,
            "non_score_reward": self.penalty, "masks": self.mask, "kls": self.kl,
        }  # fmt: skip


def _check_supported(trainer: ClassicInnerMethods) -> None:
    """Raise where `learn` does what the inner methods cannot; say once that they are called."""
    names, config = overridden_methods(trainer), trainer.config
    unsupported = {
        f"the algorithm {trainer.algorithm_config}": trainer.algorithm_config != config.algorithm(),
        f"kl_placement={config.kl_placement!r}": config.kl_placement != "reward",
        f"kl_penalty={config.kl_penalty!r}": config.kl_penalty == "none",
        "pretraining texts": trainer.pretraining is not None,
        "a separate critic": trainer.model.critic is not None,
        "parameters sharded by FSDP or DeepSpeed": trainer.accelerator.distributed_type in ("FSDP", "DEEPSPEED"),
        f"dump_dir={config.dump_dir!r}": config.dump_dir is not None,
        f"token_budget={config.token_budget}": config.token_budget is not None,
    }
    for setting, is_used in unsupported.items():
        if is_used:
            raise ValueError(
                f"expected PPO as in TRL's classic where {', '.join(names)} is overridden, got {setting}: the inner "
                "methods do not know it, and the override would not be called otherwise. Remove one of the two."
            )
    if "_said" not in vars(trainer):
        vars(trainer)["_said"] = True
        logger.warning(
            "%s is overridden: step() calls the classic's inner methods one by one, which takes more time and memory "
            "than its own pass over the response tokens.", ", ".join(names),
        )  # fmt: skip


def _score(trainer: ClassicInnerMethods, checked: Responses, timing: dict[str, float]) -> _Batch:
    """Score a batch under policy and reference, and compute rewards, advantages and returns."""
    config, full = trainer.config, trainer.config.kl_penalty == "full"
    prompts, responses = list(checked.inputs.prompts), list(checked.inputs.responses)
    masks = [row[: len(tokens)] for row, tokens in zip(checked.mask, responses, strict=True)]
    excluded = not all(bool(row.all()) for row in masks)  # the classic gives an override no masks where it got none
    if (start := trainer.limits.start_token_id) is not None:
        responses = [nn.functional.pad(row, (1, 0), value=start) for row in responses]
        masks = [nn.functional.pad(row, (1, 0), value=True) for row in masks]
    with timed(timing, "forward_pass"):
        inputs = trainer.prepare_model_inputs(prompts, responses)
        arguments: dict[str, Any] = {"return_logits": full}
        logprobs, logits, values, mask = trainer.batched_forward_pass(
            trainer.model, prompts, responses, inputs, response_masks=masks if excluded else None, **arguments
        )
        with trainer.reference_context():
            ref_logprobs, ref_logits, _, _ = trainer.batched_forward_pass(
                trainer.reference_model, prompts, responses, inputs, **arguments
            )
    scores = normalize_scores(
        checked.scores, checked.mask, trainer.running, scale=config.use_score_scaling, shift=config.use_score_norm,
        clip=config.score_clip, reduce_sum=trainer.processes.reduce_sum,
    )  # fmt: skip
    with timed(timing, "compute_rewards"):
        pair = (logprobs, ref_logprobs)
        if logits is not None and ref_logits is not None:
            pair = (logprobs_from_logits(logits, None), logprobs_from_logits(ref_logits, None))
        earned = scores if scores.dim() == 1 else _at_their_tokens(trainer, scores, prompts, responses, mask)
        rewards, penalty, kl = trainer.compute_rewards(earned, *pair, mask)
    scored = ScoredResponses(
        logprobs=logprobs, values=nn.functional.pad(values, (0, 1)), ref_logprobs=ref_logprobs, kl=kl
    )
    check_finite_scores(scored, mask.bool(), trainer.processes, trainer.model)
    trainer.start_kl_check(scored, mask.bool())
    with timed(timing, "compute_advantages"):
        values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    return _Batch(
        prompts=prompts, responses=responses, model_inputs=dict(inputs), logprobs=logprobs.float(),
        ref_logprobs=ref_logprobs, values=values.float(), mask=mask, penalty=penalty, kl=kl, advantages=advantages,
        returns=returns, scores=total_scores(scores, checked.mask),
    )  # fmt: skip


def _at_their_tokens(
    trainer: ClassicInnerMethods, scores: Tensor, prompts: list[Tensor], responses: list[Tensor], mask: Tensor
) -> Tensor:
    """Scores per response token, [B, T], moved to the position before their token, [B, L - 1]."""
    moved = torch.zeros_like(mask, dtype=scores.dtype)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        first = 0 if trainer.is_encoder_decoder else len(prompt) - 1
        count = len(response) - int(trainer.is_encoder_decoder)
        moved[row, first : first + count] = scores[row, :count]
    return moved


@dataclass(frozen=True)
class _Minibatch:
    """A minibatch that was trained on."""

    stats: dict[str, Any]
    mask: Tensor
    share: float
    """Its share in the tokens of its optimizer step."""


def _update(trainer: ClassicInnerMethods, batch: _Batch) -> list[_Minibatch]:
    """Run the epochs; return every minibatch."""
    config, accelerator = trainer.config, trainer.accelerator
    count, size = len(batch.prompts), config.mini_batch_size
    shuffle: Any = trainer.algorithm.update
    record: list[_Minibatch] = []
    drop_unfinished_step(trainer.optimizer, accelerator)
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    try:
        for _ in range(config.ppo_epochs):
            order = shuffle.shuffle(count, torch.device("cpu"))
            for rows in order.split(size * config.gradient_accumulation_steps):
                tokens = batch.mask[rows].sum()
                for part in rows.split(size):
                    accelerator.sync_gradients = bool(part[-1] == rows[-1])
                    trainer._token_share = float(batch.mask[part].sum() / tokens)
                    stats = _train(trainer, batch, part)
                    record.append(_Minibatch(stats, batch.mask[part].bool(), trainer._token_share))
            kl = [one.stats["policy/policykl"] * one.share for one in record[-len(rows.split(size)) :]]
            if config.early_stopping and trainer._early_stop(sum(kl)):  # of the last optimizer step
                break
    finally:
        accelerator.gradient_accumulation_steps, accelerator.sync_gradients, trainer._token_share = 1, True, 1.0
    return record


def _train(trainer: ClassicInnerMethods, batch: _Batch, rows: Tensor) -> dict[str, Any]:
    """Train on one minibatch; return its statistics."""
    prompts, responses = ([part[row] for row in rows.tolist()] for part in (batch.prompts, batch.responses))
    inputs = {name: value[rows] for name, value in batch.model_inputs.items()}
    logprobs, logits, values, _ = trainer.batched_forward_pass(
        trainer.model, prompts, responses, inputs, return_logits=True
    )
    assert logits is not None  # asked for
    return trainer.train_minibatch(
        batch.logprobs[rows], batch.values[rows], logprobs, logits, values, batch.mask[rows], batch.advantages[rows],
        batch.returns[rows],
    )  # fmt: skip


def _train_stats(record: list[_Minibatch]) -> dict[str, Tensor]:
    """Statistics of all minibatches stacked by name, [minibatches, ...]; advantages and ratios of actions, [1, N].

    Single numbers are weighed by their tokens, so that their mean is that over optimizer steps.
    """
    stacked = stack_dicts([one.stats for one in record])
    shares = torch.tensor([one.share for one in record])
    weights = shares / shares.mean()
    for name, rows in stacked.items():
        if rows.shape[1:] == (1,):
            stacked[name] = rows * weights[:, None].to(rows)
    for name in ("policy/advantages", "policy/ratio"):
        if name in stacked and all(one.stats[name].shape == one.mask.shape for one in record):
            stacked[name] = torch.cat([one.stats[name][one.mask] for one in record])[None]
    return stacked


@contextmanager
def _right_padding(trainer: ClassicInnerMethods) -> Iterator[None]:
    """Context manager: while active, rows are padded on the right, where a causal model cannot see it."""
    side = trainer.tokenizer.padding_side
    trainer.tokenizer.padding_side = "right"
    try:
        yield
    finally:
        trainer.tokenizer.padding_side = side


@contextmanager
def _averaged_gradients(trainer: ClassicInnerMethods) -> Iterator[None]:
    """Context manager: every backward pass leaves the mean gradient of all processes."""

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:  # a sum of averages and one own gradient: the averages stay what they are
            parameter.grad.copy_(trainer.accelerator.reduce(parameter.grad, reduction="mean"))

    handles = [
        parameter.register_post_accumulate_grad_hook(average)
        for parameter in (trainer.model_params if trainer.is_distributed else [])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
