"""Format numbers and name evaluation metrics for the report."""

import math

EVALUATION_LABELS = {
    "score": ("score", "training reward of held-out responses"),
    "vader": ("VADER compound", "sentiment by a lexicon, from −1 to 1"),
    "classifier": ("P(positive)", "sentiment by a second classifier, from 0 to 1"),
    "kl": ("KL to reference", "nats per response; how far the policy has moved"),
    "kl_k3": ("KL (k3)", "the same KL by an estimate that is never negative for a response"),
    "distinct_1": ("distinct-1", "share of different words; low means repetition"),
    "distinct_2": ("distinct-2", "share of different word pairs; low means repetition"),
    "repetition": ("repetition", "share of a response's word pairs that it has used before"),
    "perplexity": ("perplexity", "under the reference; high means unusual text, very low means repetition"),
    "length": ("length", "tokens per response"),
}
"""Short name and description of the evaluation metrics that recipes write; others keep their own name."""


def metric_label(metric: str) -> str:
    """Short name of an evaluation metric."""
    return EVALUATION_LABELS.get(metric, (metric.replace("_", " "), ""))[0]


def metric_description(metric: str) -> str:
    """Description of an evaluation metric; "" if unknown."""
    return EVALUATION_LABELS.get(metric, ("", ""))[1]


def format_number(value: float) -> str:
    """Format with about three significant digits, exponents only for extreme sizes, and a true minus sign."""
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
    """Decimals that show the first significant digit of all standard errors, at most 4; 3 without errors."""
    known = [-math.floor(math.log10(error)) for error in errors if math.isfinite(error) and error > 0]
    return min(max(0, *known), 4) if known else 3


def format_with_error(mean: float, stderr: float, *, decimals: int) -> str:
    """Format as 0.642 ± 0.011; without the error if it is unknown."""
    if not math.isfinite(mean):
        return "–"
    known = math.isfinite(stderr) and stderr > 0
    text = f"{mean:,.{decimals}f} ± {stderr:,.{decimals}f}" if known else f"{mean:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")
