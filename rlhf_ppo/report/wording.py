"""Names, units and numbers as a reader wants to see them."""

from __future__ import annotations

import math

EVALUATION_LABELS = {
    "score": ("score", "what the training reward itself says of held-out responses"),
    "vader": ("VADER compound", "lexicon sentiment from -1 to 1; took no part in training"),
    "classifier": ("classifier P(positive)", "a second classifier, trained on other data; took no part in training"),
    "kl": ("KL to the reference", "nats per response; how far the policy has moved"),
    "distinct_1": ("distinct-1", "share of different words; low means repetition"),
    "distinct_2": ("distinct-2", "share of different word pairs; a collapsed policy falls below 0.5"),
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


def signed(value: float) -> str:
    """The same with a plus sign."""
    return number(value) if not value > 0 else "+" + number(value)


def with_error(mean: float, stderr: float) -> str:
    """As in 0.642 ± 0.011: the error with two significant digits at most, the mean with the same decimals."""
    if not math.isfinite(mean) or not math.isfinite(stderr) or stderr <= 0:
        return number(mean)
    decimals = min(max(0, 1 - math.floor(math.log10(stderr))), 4)
    return f"{mean:,.{decimals}f} ± {stderr:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")
