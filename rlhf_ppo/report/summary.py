"""Summary of a run: headline, tiles, evaluation table, and signs of trouble."""

import math
import statistics
from dataclasses import dataclass

from rlhf_ppo.loop.run_folder import Estimates
from rlhf_ppo.report.run_data import RunData
from rlhf_ppo.report.wording import (
    EVALUATION_LABELS,
    decimals_for,
    format_number,
    format_with_error,
    metric_description,
    metric_label,
)

JUDGES = ("vader", "classifier", "score")


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One metric of the held-out evaluation, as texts."""

    metric: str
    label: str
    explanation: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number at the top of the page."""

    label: str
    value: str
    detail: str


def evaluation_rows(data: RunData) -> list[EvaluationRow]:
    """Rows of the evaluation table, known metrics first; the error of the change is √(se₁² + se₂²)."""
    names = [*EVALUATION_LABELS, *sorted((data.before.keys() | data.after.keys()) - EVALUATION_LABELS.keys())]
    return [
        EvaluationRow(
            metric=name,
            label=metric_label(name),
            explanation=metric_description(name),
            before=_estimate(data, data.before, name),
            after=_estimate(data, data.after, name),
            change=_change(data, name),
        )
        for name in names
        if name in data.before or name in data.after
    ]


def headline(data: RunData) -> str:
    """Iterations, score and KL in at most two sentences."""
    judges = [name for name in (*JUDGES, *data.after) if name in data.before and name in data.after]
    count = f"{len(data.metrics)} iterations of training" if data.metrics else "No training metrics were recorded"
    if not judges:
        score = span(data, "ppo/mean_scores")
        scores = "" if score is None else f": mean score {format_number(score[0])} → {format_number(score[1])}"
        return f"{count}{scores}."
    judge = judges[0]
    change = data.after[judge][0] - data.before[judge][0]
    verb = "rose" if change > 0 else "fell"
    cost = f", at a KL of {_estimate(data, data.after, 'kl')} nats per response" if "kl" in data.after else ""
    return (
        f"{count}. On held-out prompts {metric_label(judge)} {verb} from {_estimate(data, data.before, judge)} to "
        f"{_estimate(data, data.after, judge)}{cost}."
    )


def tiles(data: RunData) -> list[Tile]:
    """Up to six numbers: of the held-out evaluation if there is one, else of the ends of training curves."""
    shown = [name for name in (*JUDGES, "kl", "distinct_2", "perplexity", "length") if name in data.after][:6]
    if shown:
        return [
            Tile(
                label=metric_label(name),
                value=_tile_number(data.after[name][0]),
                detail=f"before {_tile_number(data.before[name][0])}" if name in data.before else "held-out prompts",
            )
            for name in shown
        ]
    curves = {
        "ppo/mean_scores": "mean score",
        "objective/kl": "KL, nats per response",
        "ppo/policy/entropy": "entropy, nats per token",
        "tokens/responses_len_mean": "response length, tokens",
    }
    spans = {label: span(data, name) for name, label in curves.items()}
    return [
        Tile(label=label, value=format_number(values[1]), detail=f"at the start {format_number(values[0])}")
        for label, values in spans.items()
        if values is not None
    ]


def _tile_number(value: float) -> str:
    return format_number(round(value, 3) + 0.0)  # a mean near 0 is 0.000: neither an exponent nor a sign says more


def findings(data: RunData) -> list[str]:
    """Sentences on signs of trouble, each with its number; empty if there are none."""
    problems = []
    names = ("objective/kl", "ppo/val/var_explained", "ppo/mean_scores", "ppo/policy/clipfrac")
    kl, variance, score, clip = (span(data, name) for name in names)
    skipped = _finite_values(data, "ppo/updates_skipped")
    if kl and kl[1] < -1.0:
        problems.append(
            f"KL to the reference is {format_number(kl[1])} nats at the end. A clearly negative KL means that tokens "
            "were sampled from another distribution than the one they are scored under: check top-k, top-p, "
            "temperature, minimum length and padding."
        )
    if score and score[1] <= score[0]:
        problems.append(
            f"The mean score did not rise: {format_number(score[0])} at the start, {format_number(score[1])} at the "
            "end."
        )
    if variance and variance[1] <= 0.0:
        problems.append(
            f"The value function explains {format_number(variance[1])} of the variance of the returns at the end: no "
            "better than a constant. A higher vf_coef, more iterations or a longer warm-up of the critic may help."
        )
    if clip and clip[1] > 0.3:
        problems.append(
            f"{format_number(100 * clip[1])} % of the ratios are clipped at the end: lower the learning rate."
        )
    if sum(skipped):
        problems.append(
            f"{sum(skipped):,.0f} updates were skipped: by the ratio guard, or because a loss or gradient was no "
            "finite number."
        )
    if {"distinct_2"} <= data.before.keys() & data.after.keys():
        before, after = data.before["distinct_2"][0], data.after["distinct_2"][0]
        if after < 0.7 * before:
            problems.append(
                f"distinct-2 fell from {format_number(before)} to {format_number(after)}: responses repeat themselves. "
                "A larger KL coefficient or an earlier checkpoint keeps more variety."
            )
    return problems


def span(data: RunData, name: str) -> tuple[float, float] | None:
    """Means over the first and the last tenth of a training curve; None without two finite values."""
    values = _finite_values(data, name)
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])


def _finite_values(data: RunData, name: str) -> list[float]:
    return [row[name] for row in data.metrics if math.isfinite(row.get(name, math.nan))]


def _estimate(data: RunData, estimates: Estimates, name: str) -> str:
    """Format mean ± standard error, before and after with the same decimals."""
    errors = [both[name][1] for both in (data.before, data.after) if name in both]
    return format_with_error(*estimates.get(name, (math.nan, math.nan)), decimals=decimals_for(*errors))


def _change(data: RunData, name: str) -> str:
    if name not in data.before or name not in data.after:
        return format_number(math.nan)
    (mean_0, error_0), (mean_1, error_1) = data.before[name], data.after[name]
    text = format_with_error(mean_1 - mean_0, math.hypot(error_0, error_1), decimals=decimals_for(error_0, error_1))
    return "+" + text if mean_1 > mean_0 else text
