"""The doctor's checks that run the model: is a token's probability the same wherever it is computed?

Each row is scored alone, without padding, by the model itself; then by the learner, and once more the way an update
does. What the sampler reports, and what can be read off the tokens drawn, must agree with that.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.diagnostics.findings import Diagnosis, Finding, finding
from rlhf_ppo.diagnostics.resampled_logprobs import TokenDistributions, score_rows_alone
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch, select_actions, select_rows
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.rollout.experience import Scorer

ROWS, TOKENS = 8, 256
"""At most so many rows and response tokens are looked at."""
RARE = math.log(1e-6)
"""log-probability under which an honest sampler does not do what was seen."""


def run_model_checks(learner: PPOLearner, batch: DiagnosedBatch, *, is_fresh: bool) -> Diagnosis:
    """Every check that runs the model, on the first rows.

    Args:
        learner: Whose policy; its parameters must be whole on this process.
        batch: What was drawn.
        is_fresh: Whether nothing has been learned yet, so that policy and reference must agree.
    """
    part = select_rows(batch, rows=ROWS, tokens=TOKENS)
    policy: TokenPolicy = learner.accelerator.unwrap_model(learner.policy)
    device = learner.current_device
    inputs = TokenInputs(prompts=part.prompts, responses=part.responses).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        drawn = score_rows_alone(learner, policy, part)
        scorer = _unwrapped(learner, policy)
        scored = scorer(inputs)
        with torch.enable_grad(), saved_tensors_hooks(_forget, _refuse):  # as an update runs it, and nothing is kept
            updated = scorer.run_passes(policy, inputs).logprobs.detach()
    own, reference, update = (
        select_actions(part, [row[: len(tokens)].float() for row, tokens in zip(values, part.responses, strict=True)])
        for values in (scored.logprobs, scored.ref_logprobs, updated)
    )
    tolerance = 1e-3 if drawn.logprobs.dtype == torch.float32 and _is_full_precision(learner) else 0.1
    findings = [*_padding(own, drawn.logprobs, tolerance), *_ratio(own, update, tolerance)]
    findings += (
        _sampler(part, drawn.logprobs, tolerance, learner.config.importance_sampling_cap)
        if part.logprobs is not None
        else []
    )
    findings += _settings(part, learner.config.temperature)
    findings += _draws(drawn) if not findings or all(finding.severity == "note" for finding in findings) else []
    findings += _reference(own, reference, tolerance, learner.is_peft_model) if is_fresh else []
    known = {"sampler": part.logprobs is not None, "sampling": part.sampling is not None, "reference": is_fresh}
    return Diagnosis(findings=findings, checked=["padding", "ratio", "draws", *(name for name in known if known[name])])


def _padding(own: Tensor, alone: Tensor, tolerance: float) -> list[Finding]:
    gap = float((own - alone).abs().mean())
    said = f"log-probabilities differ by {gap:.3g} nats on average between a row alone and the row in a batch"
    return [finding("padding", said)] if gap > tolerance else []


def _ratio(own: Tensor, update: Tensor, tolerance: float) -> list[Finding]:
    gap = float((own - update).abs().mean())
    said = f"before any update, probability ratios differ from 1 by {math.expm1(min(gap, 50.0)):.3g} on average"
    return [finding("ratio", said)] if gap > tolerance else []


def _sampler(part: DiagnosedBatch, alone: Tensor, tolerance: float, cap: float | None) -> list[Finding]:
    reported = select_actions(part, [row.float().to(alone.device) for row in part.logprobs or []])
    gap = float((reported - alone).abs().mean())
    said = f"the sampler's log-probabilities differ from the trainer's by {gap:.3g} nats a token on average"
    is_corrected = cap is not None
    return [finding("sampler", said, severity="note" if is_corrected else "warning")] if gap > tolerance else []


def _settings(part: DiagnosedBatch, temperature: float) -> list[Finding]:
    sampling = part.sampling
    if sampling is None:
        return []
    plain = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "do_sample": True}
    changed = [f"{name}={getattr(sampling, name)}" for name, value in plain.items() if getattr(sampling, name) != value]
    if sampling.temperature != temperature:
        changed.append(f"temperature={sampling.temperature} (the trainer's is {temperature})")
    return [finding("sampling", f"responses are drawn with {', '.join(changed)}")] if changed else []


def _draws(drawn: TokenDistributions) -> list[Finding]:
    """What the tokens themselves say about how they were drawn."""
    rank, log_rank, mass, log_mass = drawn.truncation()
    if min(log_rank, log_mass) < RARE:
        said = "the likeliest token each time" if rank == 1 else f"never beyond rank {rank}"
        if log_mass < log_rank:
            said = f"never beyond the likeliest {mass:.2f} of the probability"
        chance = f"e^{min(log_rank, log_mass):.0f}"
        return [finding("truncated", f"{len(drawn.logprobs)} tokens are {said}; chance of that: {chance}")]
    surprise, relative = drawn.surprise(), drawn.temperature()
    if len(drawn.logprobs) < 64 or abs(surprise) < 6:
        return []
    likelier = "likelier" if surprise > 0 else "less likely"
    return [finding(
        "temperature", f"tokens are {abs(surprise):.0f} standard deviations {likelier} than the policy would draw; "
        f"they fit {relative:.2f} times the trainer's temperature",
    )]  # fmt: skip


def _reference(own: Tensor, reference: Tensor, tolerance: float, is_peft: bool) -> list[Finding]:
    gap = float((own - reference).abs().mean())
    said = f"policy and reference differ by {gap:.3g} nats a token before anything was learned"
    adapters = (
        "the base model stands for the reference, though training starts from a trained adapter, or the other way round"
    )
    return [finding("reference", said, cause=adapters if is_peft else None)] if gap > tolerance else []


def _unwrapped(learner: PPOLearner, policy: TokenPolicy) -> Scorer:
    """The trainer's scorer without the wrappers in which one process waits for the others."""
    scorer = learner.scorer
    reference = None if scorer.reference is None else learner.accelerator.unwrap_model(scorer.reference)
    return replace(scorer, policy=policy, reference=reference, kl_penalty="kl")


def _forget(_: Tensor) -> None:
    """Keep nothing for a backward pass that never comes."""


def _refuse(_: None) -> Tensor:
    raise RuntimeError("expected no backward pass from the doctor's look, got one: its tensors were not kept")


def _is_full_precision(learner: PPOLearner) -> bool:
    kinds: Sequence[torch.dtype] = [parameter.dtype for parameter in learner.model.parameters()]
    mixed = learner.accelerator.mixed_precision != "no"
    return not mixed and all(kind in (torch.float32, torch.float64) for kind in kinds)
