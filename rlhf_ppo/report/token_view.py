"""Responses token by token: how strongly to color each token for each quantity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ppo.loop.run_folder import TokenTrace
from rlhf_ppo.report.wording import number

MOST_RESPONSES = 6
MOST_TOKENS = 400


@dataclass(frozen=True)
class Quantity:
    """Something known for each token."""

    key: str
    label: str
    low: str
    """What the color of negative numbers means; "" if there are none."""
    high: str
    """What the other color means."""


QUANTITIES = (
    Quantity("kl", "KL", "less likely than under the reference", "more likely than under the reference"),
    Quantity("advantages", "Advantage", "worse than expected", "better than expected"),
    Quantity("values", "Value", "low expectation", "high expectation"),
    Quantity("logprobs", "Log-probability", "surprising", ""),
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token's text, what to say about it, and its colors by quantity from -1 to 1."""

    text: str
    tooltip: str
    heat: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Response:
    """One colored response."""

    iteration: int
    prompt: str
    score: str
    tokens: list[Token]
    cut: int
    """Tokens that are not shown."""


def token_view(traces: Sequence[TokenTrace]) -> tuple[list[Response], dict[str, str]]:
    """The latest responses, colored, and for each quantity the number at which its color is full.

    One scale for all responses, so that they can be compared: the 95th percentile of the absolute values.
    """
    latest = sorted(traces, key=lambda trace: -trace.iteration)[:MOST_RESPONSES]
    scales = {
        quantity.key: _scale([x for trace in latest for x in getattr(trace, quantity.key)]) for quantity in QUANTITIES
    }
    return [_response(trace, scales) for trace in latest], {key: number(scale) for key, scale in scales.items()}


def _scale(values: Sequence[float]) -> float:
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0


def _response(trace: TokenTrace, scales: dict[str, float]) -> Response:
    tokens = []
    for index, text in enumerate(trace.tokens[:MOST_TOKENS]):
        numbers = {quantity.key: getattr(trace, quantity.key)[index] for quantity in QUANTITIES}
        heat = {key: _heat(value, scales[key]) for key, value in numbers.items()}
        said = [f"{quantity.label} {number(numbers[quantity.key])}" for quantity in QUANTITIES]
        tokens.append(Token(text=text.replace("\n", "⏎\n"), tooltip=" · ".join(said), heat=heat))
    cut = max(0, len(trace.tokens) - MOST_TOKENS)
    return Response(iteration=trace.iteration, prompt=trace.prompt, score=number(trace.score), tokens=tokens, cut=cut)


def _heat(value: float, scale: float) -> float:
    """From -1 to 1 in steps of 0.01; 0 for what is not finite."""
    return round(max(-1.0, min(1.0, value / scale)), 2) if scale and math.isfinite(value) else 0.0
