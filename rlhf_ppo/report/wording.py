"""Names, units and numbers as a reader wants to see them."""

from __future__ import annotations

import math

EVALUATION_LABELS = {
    "score": ("score", "what the training reward itself says of held-out responses"),
    "vader": ("VADER compound", "sentiment by a lexicon, from −1 to 1"),
    "classifier": ("P(positive)", "sentiment by a second classifier, from 0 to 1"),
    "kl": ("KL to reference", "nats per response; how far the policy has moved"),
    "distinct_1": ("distinct-1", "share of different words; low means repetition"),
    "distinct_2": ("distinct-2", "share of different word pairs; low means repetition"),
    "perplexity": ("perplexity", "under the reference; high means unusual text, very low means repetition"),
    "length": ("length", "tokens per response"),
}
"""Short name and explanation of the evaluation metrics that recipes write; others appear under their own name."""


def label_of(metric: str) -> str:
    """The short name of an evaluation metric."""
    return EVALUATION_LABELS.get(metric, (metric.replace("_", " "), ""))[0]


def explanation_of(metric: str) -> str:
    """What an evaluation metric says; empty for one that is not known here."""
    return EVALUATION_LABELS.get(metric, ("", ""))[1]


def number(value: float) -> str:
    """Three significant digits, no exponent where it can be helped, a true minus sign."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and (size < 0.001 or size >= 1e6):
        text = f"{value:.2e}"
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{1 if size >= 10 else 2 if size >= 1 else 3}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def decimals_for(*errors: float) -> int:
    """Decimals that show the first significant digit of each of these standard errors, at most 4; 3 without any."""
    known = [-math.floor(math.log10(error)) for error in errors if math.isfinite(error) and error > 0]
    return min(max(0, *known), 4) if known else 3


def with_error(mean: float, stderr: float, *, decimals: int) -> str:
    """As in 0.642 ± 0.011; without the error where it is not known."""
    if not math.isfinite(mean):
        return "–"
    known = math.isfinite(stderr) and stderr > 0
    text = f"{mean:,.{decimals}f} ± {stderr:,.{decimals}f}" if known else f"{mean:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")
