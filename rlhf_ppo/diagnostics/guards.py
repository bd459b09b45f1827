"""Guards against reward hacking: metrics with a limit, and an action when the limit is exceeded.

A reward is valid for texts like those it was made for. A policy that is optimized against it finds others: endless
texts, repetitions, one text for every prompt. Each guard monitors one metric that moves when this begins.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rlhf_ppo.utils.field_types import check_fields

Action: TypeAlias = Literal["warn", "stop", "keep_best"]
NGRAM = 3
"""n of the n-grams that `repetition` counts."""
BASELINE_ITERATIONS = 5
"""Iterations whose mean response length is the baseline of `length`."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Limit of one metric, and the action when it is exceeded."""

    limit: float | None = None
    """The limit; None: the metric is only recorded."""
    action: Action = "stop"
    """"stop": end the run with a checkpoint; "warn": warn when the limit is first exceeded, and continue; "keep_best":
    the same, but no model beyond the limit is kept as the best."""
    patience: int = 1
    """Number of successive iterations beyond the limit before the guard acts."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.patience < 1:
            raise ValueError(f"Guard.patience must be >= 1, got {self.patience}: it would act without a cause. Use 1.")


_OFF = Guard()


@dataclass(frozen=True, kw_only=True)
class Guards:
    """The guards of a run. Without limits, metrics are only recorded."""

    kl: Guard = _OFF
    """Maximum of the KL to the reference, nats per response: `objective/kl`."""
    entropy: Guard = _OFF
    """Minimum of the Shannon entropy of the next token, nats: `ppo/policy/entropy`."""
    repetition: Guard = _OFF
    """Maximum share of 3-grams that occurred earlier in the same response, 0 to 1: `guard/repetition`."""
    length: Guard = _OFF
    """Maximum factor by which the mean response length has grown or shrunk since the first five iterations:
    `guard/length_drift`."""
    judge: Guard = _OFF
    """Maximum of `guard/judge_lead`: how much more the held-out score has risen than the score of a judge that takes no
    part in training, in standard deviations of the first evaluation. Checked after each evaluation; needs `judges`."""
    judge_name: str | None = None
    """Name of the judge; None: the one with the largest lead."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("kl", "repetition", "length", "judge"):
            limit = getattr(self, name).limit
            if limit is not None and not limit > (1 if name == "length" else 0):
                raise ValueError(
                    f"Guards.{name}.limit must be above {1 if name == 'length' else 0}, got {limit}: the run would "
                    "stop at once. Look at the metric in a healthy run and leave room."
                )

    def each(self) -> list[tuple[str, Guard]]:
        """(Name, guard) of every guard."""
        return [(name, getattr(self, name)) for name in _METRICS if name != _BUDGET]


@dataclass(frozen=True)
class _GuardedMetric:
    name: str
    metric: str
    is_minimum: bool
    unit: str
    meaning: str


_BUDGET = "max_reference_kl"
_KL = _GuardedMetric("KL budget", "objective/kl", False, "nats", "the policy has left the texts that the reward knows")
_METRICS = {
    _BUDGET: _KL,
    "kl": _KL,
    "entropy": _GuardedMetric("entropy floor", "ppo/policy/entropy", True, "nats", "the policy says one thing only"),
    "repetition": _GuardedMetric("repetition", "guard/repetition", False, "of 3-grams", "responses repeat themselves"),
    "length": _GuardedMetric(
        "length drift", "guard/length_drift", False, "times", "length is being rewarded, not content"
    ),
    "judge": _GuardedMetric(
        "judge lead", "guard/judge_lead", False, "deviations", "the score rises where the judge sees no gain"
    ),
}


@dataclass
class GuardMonitor:
    """Checks the guards after every iteration and evaluation, and stores their baselines. The same on every process."""

    guards: Guards
    max_reference_kl: float | None = None
    """Limit of the KL that stops a run, whatever the guard `kl` does; None: none."""
    lengths: list[float] = field(default_factory=list)
    """Mean response length of the first iterations."""
    baseline: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and standard deviation of score and judges in the first evaluation."""
    times_beyond: dict[str, int] = field(default_factory=dict)
    """Successive checks in which each metric was beyond its limit."""

    def measure(self, repetition: float, length: float) -> dict[str, float]:
        """Compute the metrics of the guards `repetition` and `length` for an iteration.

        Args:
            repetition: Mean share of repeated 3-grams over the responses of all processes.
            length: Mean length of those responses, tokens.
        """
        if len(self.lengths) < BASELINE_ITERATIONS:
            self.lengths.append(length)
        factor = length / (math.fsum(self.lengths) / len(self.lengths))
        return {"guard/repetition": repetition, "guard/length_drift": max(factor, 1 / factor)}

    def compare(self, measures: Mapping[str, Sequence[float]], judges: Collection[str]) -> dict[str, float]:
        """Compute the lead of the held-out score over the judges; empty without judges, or without a response.

        Args:
            measures: Measures of the evaluation, one number per response.
            judges: Names of the judges among the measures.
        """
        judges = [name for name in judges if name in measures and self.guards.judge_name in (None, name)]
        if not judges:
            return {}
        estimates = {name: _mean_and_deviation(measures[name]) for name in ("score", *judges)}
        if not self.baseline:
            self.baseline = {name: estimates[name] for name in ("score", *judges)}
        gains = {
            name: _gain(estimates[name][0], *self.baseline[name])
            for name in ("score", *judges)
            if name in self.baseline
        }
        return {"guard/judge_lead": max(gains["score"] - gains[name] for name in judges if name in gains)}

    def verdict(self, metrics: Mapping[str, float]) -> "GuardVerdict":
        """Check all guards against the metrics of an iteration; guards whose metric is missing are skipped."""
        crossed: dict[str, str] = {}
        guards = {_BUDGET: Guard(limit=self.max_reference_kl)} | dict(self.guards.each())
        for name, guard in guards.items():
            guarded = _METRICS[name]
            value = metrics.get(guarded.metric)
            if guard.limit is None or value is None:
                continue
            is_beyond = not (value >= guard.limit if guarded.is_minimum else value <= guard.limit)  # nan is beyond
            self.times_beyond[name] = self.times_beyond.get(name, 0) + 1 if is_beyond else 0
            if self.times_beyond[name] < guard.patience:
                continue
            sentence = f"{guarded.name}: {value:.3g} {guarded.unit}, limit {guard.limit:g}: {guarded.meaning}"
            if self.times_beyond[name] == guard.patience and guard.action != "stop":
                warnings.warn(f"Guard at work ({guard.action}). {sentence}. See docs/guards.md.", stacklevel=2)
            crossed[name] = sentence
        actions = {name: guards[name].action for name in crossed}
        stops = [sentence for name, sentence in crossed.items() if actions[name] == "stop"]
        return GuardVerdict(
            stop=stops[0] if stops else None,
            may_keep=all(action == "warn" for action in actions.values()),
            metrics={"guard/crossed": float(len(crossed))},
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths), "base": {name: list(pair) for name, pair in self.baseline.items()},
            "beyond": dict(self.times_beyond),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        lengths = [float(length) for length in state["lengths"]]
        baseline = {str(name): (float(mean), float(deviation)) for name, (mean, deviation) in state["base"].items()}
        times_beyond = {str(name): int(count) for name, count in state["beyond"].items()}
        self.lengths, self.baseline, self.times_beyond = lengths, baseline, times_beyond


@dataclass(frozen=True, kw_only=True)
class GuardVerdict:
    """The result of checking all guards."""

    stop: str | None
    """Why the run must stop; None: it may continue."""
    may_keep: bool
    """Whether the current model may become the best."""
    metrics: dict[str, float]


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams that occurred earlier in the same response; 0 if there is no n-gram."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))


def _gain(mean: float, start: float, deviation: float) -> float:
    return (mean - start) / max(deviation, 1e-6 * max(1.0, abs(start)))
