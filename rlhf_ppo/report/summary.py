"""A run in words and few numbers: the headline, the evaluation table, and what a careful reader would point out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ppo.loop.run_folder import Estimates
from rlhf_ppo.report.run_data import RunData
from rlhf_ppo.report.wording import EVALUATION_LABELS, decimals_for, explanation_of, label_of, number, with_error

JUDGES = ("vader", "classifier", "score")


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One metric of the held-out evaluation, ready to be printed."""

    metric: str
    label: str
    explanation: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number to be read first."""

    label: str
    value: str
    detail: str


def evaluation_rows(data: RunData) -> list[EvaluationRow]:
    """The table, known metrics first. The change carries √(se₁² + se₂²), as if both were drawn independently."""
    names = [*EVALUATION_LABELS, *sorted((data.before.keys() | data.after.keys()) - EVALUATION_LABELS.keys())]
    return [
        EvaluationRow(
            metric=name,
            label=label_of(name),
            explanation=explanation_of(name),
            before=_estimate(data, data.before, name),
            after=_estimate(data, data.after, name),
            change=_change(data, name),
        )
        for name in names
        if name in data.before or name in data.after
    ]


def headline(data: RunData) -> str:
    """What happened, in at most two sentences."""
    judges = [name for name in (*JUDGES, *data.after) if name in data.before and name in data.after]
    count = f"{len(data.metrics)} iterations of training" if data.metrics else "No training metrics were recorded"
    if not judges:
        score = span(data, "ppo/mean_scores")
        return f"{count}." if score is None else f"{count}: mean score {number(score[0])} → {number(score[1])}."
    judge = judges[0]
    change = data.after[judge][0] - data.before[judge][0]
    verb = "rose" if change > 0 else "fell"
    cost = f", at a KL of {_estimate(data, data.after, 'kl')} nats per response" if "kl" in data.after else ""
    return (
        f"{count}. On held-out prompts {label_of(judge)} {verb} from {_estimate(data, data.before, judge)} to "
        f"{_estimate(data, data.after, judge)}{cost}."
    )


def tiles(data: RunData) -> list[Tile]:
    """Up to six numbers: the held-out evaluation where there is one, else the ends of the training curves."""
    shown = [name for name in (*JUDGES, "kl", "distinct_2", "perplexity", "length") if name in data.after][:6]
    if shown:
        return [
            Tile(
                label=label_of(name),
                value=number(data.after[name][0]),
                detail=f"before {number(data.before[name][0])}" if name in data.before else "held-out prompts",
            )
            for name in shown
        ]
    curves = {
        "ppo/mean_scores": "mean score",
        "objective/kl": "KL, nats per response",
        "ppo/policy/entropy": "entropy, nats per token",
        "tokens/responses_len_mean": "response length, tokens",
    }
    ends = {label: span(data, name) for name, label in curves.items()}
    return [
        Tile(label=label, value=number(end[1]), detail=f"at the start {number(end[0])}")
        for label, end in ends.items()
        if end is not None
    ]


def findings(data: RunData) -> list[str]:
    """Signs of trouble, each with the number that shows it; an empty list is good news."""
    found = []
    kl, variance, score = (
        span(data, f"{name}") for name in ("objective/kl", "ppo/val/var_explained", "ppo/mean_scores")
    )
    clip, skipped = span(data, "ppo/policy/clipfrac"), _finite(data, "ppo/updates_skipped")
    if kl and kl[1] < -1.0:
        found.append(
            f"KL to the reference is {number(kl[1])} nats at the end. A clearly negative KL means that tokens were "
            "drawn from another distribution than the one they are scored under: check top-k, top-p, temperature, "
            "minimum length and padding."
        )
    if score and score[1] <= score[0]:
        found.append(f"The mean score did not rise: {number(score[0])} at the start, {number(score[1])} at the end.")
    if variance and variance[1] <= 0.0:
        found.append(
            f"The value function explains {number(variance[1])} of the variance of the returns at the end: no better "
            "than a constant. A higher vf_coef, more iterations or a longer warm-up of the critic may help."
        )
    if clip and clip[1] > 0.3:
        found.append(f"{number(100 * clip[1])} % of the ratios are clipped at the end: lower the learning rate.")
    if sum(skipped):
        found.append(f"{number(sum(skipped))} updates were skipped because a loss or a gradient was not finite.")
    if {"distinct_2"} <= data.before.keys() & data.after.keys():
        before, after = data.before["distinct_2"][0], data.after["distinct_2"][0]
        if after < 0.7 * before:
            found.append(
                f"distinct-2 fell from {number(before)} to {number(after)}: responses repeat themselves. A larger KL "
                "coefficient or an earlier checkpoint keeps more variety."
            )
    return found


def span(data: RunData, name: str) -> tuple[float, float] | None:
    """Means over the first and the last tenth of a training curve; None without two finite values."""
    values = _finite(data, name)
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return _mean(values[:tenth]), _mean(values[-tenth:])


def _finite(data: RunData, name: str) -> list[float]:
    return [row[name] for row in data.metrics if math.isfinite(row.get(name, math.nan))]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _estimate(data: RunData, when: Estimates, name: str) -> str:
    """Mean ± standard error, before and after with the same decimals."""
    errors = [estimates[name][1] for estimates in (data.before, data.after) if name in estimates]
    return with_error(*when.get(name, (math.nan, math.nan)), decimals=decimals_for(*errors))


def _change(data: RunData, name: str) -> str:
    if name not in data.before or name not in data.after:
        return number(math.nan)
    (mean_0, error_0), (mean_1, error_1) = data.before[name], data.after[name]
    text = with_error(mean_1 - mean_0, math.hypot(error_0, error_1), decimals=decimals_for(error_0, error_1))
    return "+" + text if mean_1 > mean_0 else text
