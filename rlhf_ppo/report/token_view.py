"""Responses with tokens colored by KL, advantage, value and log-probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ppo.loop.run_folder import TokenTrace
from rlhf_ppo.report.wording import format_number

MAX_RESPONSES = 6
MAX_TOKENS = 400


@dataclass(frozen=True)
class Quantity:
    """A per-token quantity and the meaning of its colors."""

    key: str
    label: str
    low: str
    """Meaning of the color of negative numbers; "" if there are none."""
    high: str
    """Meaning of the color of positive numbers; "" if there are none."""


QUANTITIES = (
    Quantity("kl", "KL", "less likely than under the reference", "more likely than under the reference"),
    Quantity("advantages", "Advantage", "worse than expected", "better than expected"),
    Quantity("values", "Value", "low expectation", "high expectation"),
    Quantity("logprobs", "Log-probability", "surprising", ""),
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token's text, tooltip, and color of each quantity, from -1 to 1; an environment's token has no color."""

    text: str
    tooltip: str
    heat: dict[str, float]
    numbers: list[str]
    """The quantities as text, in the order of `QUANTITIES`; empty for an environment's token."""
    is_own: bool = True
    """Whether the policy sampled it."""
    begins_line: bool = False
    """Whether it begins a reply, or an observation: turns are shown one below the other."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response with colored tokens."""

    iteration: int
    prompt: str
    score: str
    tokens: list[Token]
    cut: int
    """Number of tokens beyond `MAX_TOKENS`, which are not shown."""


def token_view(traces: Sequence[TokenTrace]) -> tuple[list[Response], dict[str, str]]:
    """Color the latest responses; also return the value at which each quantity's color is full.

    The scale is the 95th percentile of absolute values, the same for all responses.
    """
    latest = sorted(traces, key=lambda trace: -trace.iteration)[:MAX_RESPONSES]
    scales = {
        quantity.key: _scale([x for trace in latest for x in _own(trace, getattr(trace, quantity.key))])
        for quantity in QUANTITIES
    }
    return [_response(trace, scales) for trace in latest], {key: format_number(scale) for key, scale in scales.items()}


def _own(trace: TokenTrace, values: Sequence[float]) -> list[float]:
    return [value for value, is_own in zip(values, trace.own or [True] * len(values), strict=True) if is_own]


def _scale(values: Sequence[float]) -> float:
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0


def _response(trace: TokenTrace, scales: dict[str, float]) -> Response:
    tokens: list[Token] = []
    own = trace.own or [True] * len(trace.tokens)
    for index, text in enumerate(trace.tokens[:MAX_TOKENS]):
        text, begins_line = text.replace("\n", "⏎\n"), index > 0 and own[index] != own[index - 1]
        if not own[index]:
            heat = dict.fromkeys(scales, 0.0)
            tokens.append(
                Token(text=text, tooltip="environment", heat=heat, numbers=[], is_own=False, begins_line=begins_line)
            )
            continue
        numbers = {quantity.key: getattr(trace, quantity.key)[index] for quantity in QUANTITIES}
        heat = {key: _heat(value, scales[key]) for key, value in numbers.items()}
        texts = [format_number(number) for number in numbers.values()]
        tooltip = " · ".join(f"{quantity.label} {number}" for quantity, number in zip(QUANTITIES, texts, strict=True))
        tokens.append(Token(text=text, tooltip=tooltip, heat=heat, numbers=texts, begins_line=begins_line))
    cut = max(0, len(trace.tokens) - MAX_TOKENS)
    return Response(
        iteration=trace.iteration, prompt=trace.prompt, score=format_number(trace.score), tokens=tokens, cut=cut
    )


def _heat(value: float, scale: float) -> float:
    """Scale a value to [-1, 1] in steps of 0.01; 0 if it is not finite."""
    return round(max(-1.0, min(1.0, value / scale)), 2) if scale and math.isfinite(value) else 0.0
