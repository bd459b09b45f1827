"""Prove on the model at hand that sampling draws from the distribution that its own call gives, once per model."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_ppo.functional.masked import HALF_PRECISION
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.models.fast_paths import LOW_PRECISION_TOLERANCE, TOLERANCE
from rlhf_ppo.models.lm_head import relative_gap
from rlhf_ppo.models.small_batch import is_low_precision, small_batch
from rlhf_ppo.models.trunk import call_model
from rlhf_ppo.samplers.base import Samples, SamplingConfig, pad_prompts
from rlhf_ppo.samplers.decode_support import cache_window_is_too_short, plain_generation_config, unwrap_peft
from rlhf_ppo.samplers.kv_cache import computed_dtype

logger = logging.getLogger(__name__)

Decode = Callable[..., Samples]
"""(model, prompts, config, value head, limits=) -> samples."""
LIMITS = [2, 3]
"""New tokens for prompts of 5 and 4 tokens: one ends before the other, and both samples have one length."""


@dataclass(frozen=True)
class GenerationPlan:
    """How `model.generate` must be called so that it gives the model's own logits."""

    pads: bool = True
    """Whether prompts of unequal length may share a call, padded."""
    use_cache: bool = True
    """Whether it may keep keys and values, or a recurrent state, from one token to the next."""
    first_position: int | None = None
    """Position of the first token, to be passed; None: `generate` knows itself."""


@dataclass(frozen=True)
class _DecodeProof:
    reason: str | None
    values: bool


_decode_proofs: dict[bool, "WeakKeyDictionary[nn.Module, _DecodeProof]"] = {
    static: WeakKeyDictionary() for static in (False, True)
}
_plans: "WeakKeyDictionary[nn.Module, GenerationPlan]" = WeakKeyDictionary()


def decode_mismatch(model: Any, decode: Decode, *, static: bool = False) -> str | None:
    """What the decode loop's results differ by from the model's own call, as a sentence; None: by rounding.

    Args:
        model: A model whose structure the loop supports.
        decode: The loop, without its checks.
        static: Whether it is the one with a static step.
    """
    base, proofs = unwrap_peft(model), _decode_proofs[static]
    if base not in proofs:
        with EvalMode(base), torch.no_grad():
            proofs[base] = _prove(base, model, decode)
    return proofs[base].reason


def values_are_right(model: Any, *, static: bool = False) -> bool:
    """Whether the LM head's input in the loop is what a value head reads, after `decode_mismatch`."""
    proof = _decode_proofs[static].get(unwrap_peft(model))
    return proof is not None and proof.values


def position_settings(plan: GenerationPlan, ids: Tensor) -> dict[str, Tensor]:
    """Positions to pass to `model.generate` with `ids`, where it does not know them itself."""
    if plan.first_position is None:
        return {}
    positions = torch.arange(plan.first_position, plan.first_position + ids.shape[1], device=ids.device)
    return {"position_ids": positions.expand_as(ids)}


def generation_plan(model: Any) -> GenerationPlan:
    """How `model.generate` gives the logits of the model's own call: tried once per model.

    Raises:
        ValueError: It does in no way.
    """
    base = unwrap_peft(model)
    if base not in _plans:
        plans = [GenerationPlan(), GenerationPlan(pads=False), GenerationPlan(pads=False, use_cache=False)]
        pad = getattr(base.config.get_text_config(decoder=True), "pad_token_id", None)
        if pad is not None:  # RoBERTa and its kin count positions from there
            plans.append(GenerationPlan(pads=False, first_position=pad + 1))
        if cache_window_is_too_short(base):
            plans = [plan for plan in plans if not plan.use_cache]
        devices = [base.device] if base.device.type == "cuda" else []
        with EvalMode(base), torch.no_grad(), torch.random.fork_rng(devices), plain_generation_config(base):
            right = next((plan for plan in plans if _generates_own_logits(base, plan)), None)
        if right is None and not _has_finite_logits(base):
            return plans[0]  # diverged: sampling says so
        if right is None:
            raise ValueError(
                f"expected {type(base).__name__}.generate to give the logits of the model's own call, got others in "
                "every way that was tried: samples would come from another distribution than the one that is scored. "
                "Sample by other means and pass the tokens to step(), or use another architecture."
            )
        _plans[base] = right
        if right != GenerationPlan():
            cost = "prompts of one length run at a time" + ("" if right.use_cache else ", without a cache")
            logger.warning("%s.generate gives other logits for padded prompts than the model's own call: %s.",
                           type(base).__name__, cost)  # fmt: skip
    return _plans[base]


def _prove(base: Any, model: Any, decode: Decode) -> _DecodeProof:
    prompts = [torch.cat([pair[0], pair[1][:2]]) for pair in _rows(base)]
    config = SamplingConfig(max_new_tokens=max(LIMITS), num_return_sequences=2, do_sample=False)
    name = type(base).__name__
    try:
        samples = decode(model, prompts, config, _probe, limits=LIMITS)
    except Exception as error:
        if not _has_finite_logits(base):
            return _DecodeProof(None, True)  # diverged: sampling says so
        return _DecodeProof(
            f"{name} cannot be decoded token by token ({type(error).__name__}: {str(error)[:120]})", False
        )
    tolerance = _tolerance(base)
    gaps, value_gaps = [], []
    assert samples.logprobs is not None and samples.values is not None
    own_results = _own_results(base, samples)
    for prompt, response, found, values in zip(
        samples.prompts, samples.responses, samples.logprobs, samples.values, strict=True
    ):
        all_logits, all_states = own_results[_key(prompt, response)]
        logits = all_logits[len(prompt) - 1 : -1].float()
        own = logits.log_softmax(dim=-1).gather(1, response[:, None]).squeeze(1)
        spread = float((logits.amax(dim=1) - logits.amin(dim=1)).max())
        gaps.append(float((found - own).abs().max()) / max(spread, 1e-9))
        value_gaps.append(relative_gap(values, _probe(all_states[len(prompt) - 1 : -1]).squeeze(-1)))
    reason = None
    if not max(gaps) <= 10 * tolerance:
        reason = f"{name} gives log-probabilities that differ by {max(gaps):.1e} of their range from its own call's"
    return _DecodeProof(reason, max(value_gaps) <= 10 * tolerance)


def _own_results(model: Any, samples: Samples) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """Logits and states of samples by the model's own call: equal ones once, those of one length together."""
    rows = {_key(*pair): torch.cat(pair) for pair in zip(samples.prompts, samples.responses, strict=True)}
    found: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for length in {len(row) for row in rows.values()}:
        keys = [key for key in rows if len(key) == length]
        output = call_model(model, input_ids=torch.stack([rows[key] for key in keys]), attention_mask=None)
        found.update(zip(keys, zip(output.logits, output.hidden_states[-1], strict=True), strict=True))
    return found


def _key(prompt: Tensor, response: Tensor) -> tuple[int, ...]:
    return tuple(torch.cat([prompt, response]).tolist())


def _generates_own_logits(model: Any, plan: GenerationPlan) -> bool:
    prompts = [torch.cat([pair[0], pair[1][:2]]) for pair in _rows(model)]
    batches = [prompts] if plan.pads else [[prompt, prompt.flip(0)] for prompt in prompts]
    try:
        return all(gap <= 10 * _tolerance(model) for batch in batches for gap in _generation_gaps(model, batch, plan))
    except Exception as error:
        logger.info("%s.generate: %s: %s", type(model).__name__, type(error).__name__, error)
        return False


def _generation_gaps(model: Any, prompts: Sequence[Tensor], plan: GenerationPlan) -> list[float]:
    """Differences of the logits in `generate` from those of the model's own call on each row alone."""
    encoder_decoder = model.config.is_encoder_decoder
    ids, mask = pad_prompts(prompts, model.device, side="right" if encoder_decoder else "left")
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1,
        use_cache=plan.use_cache, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        **position_settings(plan, ids),
    )  # fmt: skip
    gaps = []
    for row, prompt in enumerate(prompts):
        if encoder_decoder:
            decoded = output.sequences[row : row + 1, :-1]
            logits = call_model(model, input_ids=prompt[None], attention_mask=None, decoder_input_ids=decoded).logits[0]
        else:
            response = output.sequences[row, ids.shape[1] :]
            logits = call_model(model, input_ids=torch.cat([prompt, response])[None], attention_mask=None).logits[0]
            logits = logits[len(prompt) - 1 : -1]
        found = torch.stack([step[row] for step in output.logits])
        gaps.append(relative_gap(found, logits[: len(found)]))
    return gaps


@torch.no_grad()
def _has_finite_logits(model: Any) -> bool:
    ids = _rows(model)[0][0][None]
    given = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    return bool(call_model(model, **given).logits.isfinite().any())


def _rows(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Two rows of the small batch, of unequal lengths."""
    inputs = small_batch(model)
    return [(inputs.prompts[row], inputs.responses[row]) for row in (0, 2)]


def _probe(states: Tensor) -> Tensor:
    """Stands for a value head, whose own weights may be zero."""
    weights = torch.linspace(-1.0, 1.0, states.shape[-1], device=states.device)
    return (states.float() * weights).sum(dim=-1, keepdim=True)


def _tolerance(model: Any) -> float:
    under_autocast = computed_dtype(model) in HALF_PRECISION
    return LOW_PRECISION_TOLERANCE if under_autocast or is_low_precision(model) else TOLERANCE
