"""The doctor's checks that run the model: all log-probabilities of a token must agree.

Each row is scored alone, without padding, by the model itself; then in a batch by the learner, and again as an update
does. The sampler's log-probabilities, and the statistics of the sampled tokens, must agree with that.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.diagnostics.findings import DoctorReport, Finding, Severity, finding
from rlhf_ppo.diagnostics.resampled_logprobs import TokenDistributions, score_rows_alone
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch, select_actions, select_rows
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.rollout.experience import Scorer
from rlhf_ppo.rollout.kl_placement import KLPenalty

MAX_ROWS, MAX_TOKENS = 8, 256
"""Maximum of rows and of response tokens that are checked."""
OTHER_KERNELS = 0.1
"""Largest mean difference in nats that an engine's kernels and precision explain: vLLM in bfloat16 was seen at 0.04."""
MIN_LOG_CHANCE = math.log(1e-6)
"""Log-probability of an observation under the policy below which it counts as a finding."""


def run_model_checks(learner: PPOLearner, batch: DiagnosedBatch, *, is_fresh: bool) -> DoctorReport:
    """Run all checks that need the model, on the first rows of a batch.

    Args:
        learner: The learner; its policy must not be sharded.
        is_fresh: Whether nothing has been learned yet, so that policy and reference must agree.
    """
    subset = select_rows(batch, rows=MAX_ROWS, tokens=MAX_TOKENS)
    policy: TokenPolicy = learner.accelerator.unwrap_model(learner.policy)
    device = learner.current_device
    inputs = TokenInputs(prompts=subset.prompts, responses=subset.responses).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        alone = score_rows_alone(learner, policy, subset)
        scorer = _unwrapped(learner, policy)
        scored = scorer(inputs)
        with (
            torch.enable_grad(),
            saved_tensors_hooks(_save_nothing, _raise_in_backward),
        ):  # as an update, without saved tensors
            updated = scorer.run_passes(policy, inputs).logprobs.detach()
    reference_logprobs = scored.logprobs if scored.ref_logprobs is None else scored.ref_logprobs
    batched, reference, update = (
        select_actions(
            subset, [row[: len(tokens)].float() for row, tokens in zip(values, subset.responses, strict=True)]
        )
        for values in (scored.logprobs, reference_logprobs, updated)
    )
    tolerance = 1e-3 if alone.logprobs.dtype == torch.float32 and _is_full_precision(learner) else 0.1
    findings = [*_ratio(batched, update, tolerance), *_settings(subset, learner.config.temperature)]
    if float((batched - alone.logprobs).abs().mean()) > tolerance:
        findings += _padding_or_scoring(subset, batched, alone.logprobs, scorer)
    reported = (
        _sampler(subset, alone.logprobs, tolerance, learner.importance_correction is not None)
        if subset.logprobs is not None
        else []
    )
    findings += [*reported, *_sampled_tokens(alone, is_corrected=bool(reported))]
    is_fresh = is_fresh and scored.ref_logprobs is not None
    findings += _reference(batched, reference, tolerance, learner.is_peft_model) if is_fresh else []
    possible = {"sampler": subset.logprobs is not None, "sampling": subset.sampling is not None, "reference": is_fresh}
    return DoctorReport(
        findings=findings, checked=["padding", "ratio", "draws", *(name for name in possible if possible[name])]
    )


@torch.no_grad()
def _padding_or_scoring(subset: DiagnosedBatch, batched: Tensor, alone: Tensor, scorer: Scorer) -> list[Finding]:
    """A gap that the learner has with a row by itself, too, has nothing to do with padding and other rows."""
    rows = [
        scorer(TokenInputs(prompts=[prompt], responses=[response]).to(alone.device))
        .logprobs[0][: len(response)]
        .float()
        for prompt, response in zip(subset.prompts, subset.responses, strict=True)
    ]
    gap, gap_by_itself = (
        float((logprobs - alone).abs().mean()) for logprobs in (batched, select_actions(subset, rows))
    )
    if gap_by_itself > 0.5 * gap:
        evidence = f"log-probabilities differ by {gap_by_itself:.3g} nats on average from those of the model's own call"
        return [finding("scoring", evidence)]
    evidence = f"log-probabilities differ by {gap:.3g} nats on average between a row alone and the row in a batch"
    return [finding("padding", evidence)]


def _ratio(batched: Tensor, update: Tensor, tolerance: float) -> list[Finding]:
    gap = float((batched - update).abs().mean())
    evidence = f"before any update, probability ratios differ from 1 by {math.expm1(min(gap, 50.0)):.3g} on average"
    return [finding("ratio", evidence)] if gap > tolerance else []


def _sampler(subset: DiagnosedBatch, alone: Tensor, tolerance: float, is_corrected: bool) -> list[Finding]:
    reported = select_actions(subset, [row.float().to(alone.device) for row in subset.logprobs or []])
    gap = float((reported - alone).abs().mean())
    evidence = f"the sampler's log-probabilities differ from the trainer's by {gap:.3g} nats a token on average"
    severity: Severity = "note" if is_corrected and gap <= OTHER_KERNELS else "warning"
    return [finding("sampler", evidence, severity=severity)] if gap > tolerance else []


def _settings(subset: DiagnosedBatch, temperature: float) -> list[Finding]:
    sampling = subset.sampling
    if sampling is None:
        return []
    neutral = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "do_sample": True}
    changed = [
        f"{name}={getattr(sampling, name)}" for name, value in neutral.items() if getattr(sampling, name) != value
    ]
    if sampling.temperature != temperature:
        changed.append(f"temperature={sampling.temperature} (the trainer's is {temperature})")
    return [finding("sampling", f"responses are drawn with {', '.join(changed)}")] if changed else []


def _sampled_tokens(alone: TokenDistributions, *, is_corrected: bool) -> list[Finding]:
    """Detect truncation (top-k, top-p, greedy) and temperature from the sampled tokens alone.

    Args:
        alone: Statistics of the sampled tokens.
        is_corrected: Whether the sampler reported another distribution, for which the update corrects.
    """
    rank, log_rank, mass, log_mass = alone.truncation()
    chance, surprise = min(log_rank, log_mass), alone.surprise()
    is_surprising = not is_corrected and len(alone.logprobs) >= 64 and abs(surprise) >= 6
    if chance >= MIN_LOG_CHANCE and not is_surprising:
        return []
    relative, tempered = alone.temperature()
    # Cold tokens are never far down either: the fit under which they are likelier tells the two apart.
    if chance < MIN_LOG_CHANCE and float(alone.logprobs.double().sum()) - chance > tempered:
        evidence = "the likeliest token each time" if rank == 1 else f"never beyond rank {rank}"
        if log_mass < log_rank:
            evidence = f"never beyond the likeliest {mass:.2f} of the probability"
        return [finding("truncated", f"{len(alone.logprobs)} tokens are {evidence}; chance of that: e^{chance:.0f}")]
    if not is_surprising:
        return []
    name, likelier = ("temperature", "likelier") if surprise > 0 else ("unlikely_tokens", "less likely")
    evidence = f"tokens are {abs(surprise):.0f} standard deviations {likelier} than the policy would draw"
    return [finding(name, f"{evidence}; they fit {relative:.2f} times the trainer's temperature")]


def _reference(batched: Tensor, reference: Tensor, tolerance: float, is_peft: bool) -> list[Finding]:
    gap = float((batched - reference).abs().mean())
    evidence = f"policy and reference differ by {gap:.3g} nats a token before anything was learned"
    adapters = "the base model is the reference, but training starts from a trained adapter, or the other way round"
    return [finding("reference", evidence, cause=adapters if is_peft else None)] if gap > tolerance else []


def _unwrapped(learner: PPOLearner, policy: TokenPolicy) -> Scorer:
    """The learner's scorer without DDP wrappers, which would wait for the other processes."""
    scorer = learner.scorer
    reference = None if scorer.reference is None else learner.accelerator.unwrap_model(scorer.reference)
    kl_penalty: KLPenalty = "kl" if learner.has_reference else "none"
    return replace(scorer, policy=policy, reference=reference, kl_penalty=kl_penalty)


def _save_nothing(_: Tensor) -> None:
    """Pack hook: save no tensor, as there is no backward pass."""


def _raise_in_backward(_: None) -> Tensor:
    raise RuntimeError("expected no backward pass in the doctor's checks, got one: tensors were not saved")


def _is_full_precision(learner: PPOLearner) -> bool:
    dtypes: Sequence[torch.dtype] = [parameter.dtype for parameter in learner.model.parameters()]
    mixed = learner.accelerator.mixed_precision != "no"
    return not mixed and all(dtype in (torch.float32, torch.float64) for dtype in dtypes)
