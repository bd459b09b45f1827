"""Guards against reward hacking: what is measured, where the line is, and what happens beyond it.

A reward is right about texts like those it was made for. A policy that is optimized against it finds others: endless
ones, repeated ones, one text for every prompt. Each guard watches one number that moves when this begins.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from rlhf_ppo.utils.field_types import check_fields

Action: TypeAlias = Literal["warn", "stop", "keep_best"]
NGRAM = 3
"""Tokens of the n-grams that `repetition` counts."""
BASELINE_ITERATIONS = 5
"""Iterations whose mean length is what `length` compares with."""
_NO_JUDGES = frozenset({"score", "kl", "kl_k3", "reference_nll", "length"})


@dataclass(frozen=True, kw_only=True)
class Guard:
    """One line that a number must not cross."""

    limit: float | None = None
    """Where the line is; None: the number is only recorded."""
    action: Action = "stop"
    """"stop" ends the run with a checkpoint; "keep_best" goes on, but replaces no best model by one from beyond the
    line; "warn" goes on. The last two warn when the line is crossed."""
    patience: int = 1
    """How often in a row the number must be found beyond the line before that counts."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.patience < 1:
            raise ValueError(f"Guard.patience must be >= 1, got {self.patience}: it would fire unseen. Use 1.")


_OFF = Guard()


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What a run is guarded by. Without limits every number is recorded and nothing happens."""

    kl: Guard = _OFF
    """Most KL to the reference, nats a response: `objective/kl`."""
    entropy: Guard = _OFF
    """Least Shannon entropy of the next token, nats: `ppo/policy/entropy`."""
    repetition: Guard = _OFF
    """Largest share of 3-grams that stood before in the same response, 0 to 1: `guard/repetition`."""
    length: Guard = _OFF
    """Largest factor between the mean response length now and in the first five iterations, longer or shorter:
    `guard/length_drift`."""
    judge: Guard = _OFF
    """Most that the held-out score may gain on a judge who takes no part in training, in standard deviations of the
    first evaluation: `guard/judge_lead`. Looked at after each evaluation; needs `judges`."""
    judge_name: str | None = None
    """Which judge; None: the one that the score has gained most on."""

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
        """Every line under its name."""
        return [(name, getattr(self, name)) for name in _LINES]


@dataclass(frozen=True)
class _Line:
    name: str
    metric: str
    floor: bool
    unit: str
    meaning: str


_LINES = {
    "kl": _Line("KL budget", "objective/kl", False, "nats", "the policy has left the texts that the reward knows"),
    "entropy": _Line("entropy floor", "ppo/policy/entropy", True, "nats", "the policy says one thing only"),
    "repetition": _Line("repetition", "guard/repetition", False, "of 3-grams", "responses repeat themselves"),
    "length": _Line("length drift", "guard/length_drift", False, "times", "length is being rewarded, not content"),
    "judge": _Line(
        "judge lead", "guard/judge_lead", False, "deviations", "the score rises where the judge sees no gain"
    ),
}


@dataclass
class GuardMonitor:
    """Looks at every iteration and evaluation; remembers what it compares with. The same on every process.

    Args:
        guards: The lines.
    """

    guards: Guards
    lengths: list[float] = field(default_factory=list)
    """Mean response length of the first iterations."""
    base: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and standard deviation of score and judges in the first evaluation."""
    beyond: dict[str, int] = field(default_factory=dict)
    """How often in a row each number was found beyond its line."""

    def measure(self, repetition: float, length: float) -> dict[str, float]:
        """The guards' own numbers of an iteration.

        Args:
            repetition: Mean share of repeated 3-grams over the responses of all processes.
            length: Mean tokens of those responses.
        """
        if len(self.lengths) < BASELINE_ITERATIONS:
            self.lengths.append(length)
        factor = length / (math.fsum(self.lengths) / len(self.lengths))
        return {"guard/repetition": repetition, "guard/length_drift": max(factor, 1 / factor)}

    def compare(self, measures: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """How far the held-out score has run ahead of the judges; empty without judges.

        Args:
            measures: Of the evaluation: one number a response.
        """
        estimates = {name: _mean_and_deviation(measures[name]) for name in measures}
        judges = [name for name in measures if name not in _NO_JUDGES and self.guards.judge_name in (None, name)]
        if self.guards.judge_name is not None and not judges:
            judged = sorted(set(measures) - _NO_JUDGES)
            raise ValueError(
                f"Guards.judge_name is {self.guards.judge_name!r}, the evaluation has {judged}: there is nothing to "
                "compare the score with. Name one of them, or pass it in `judges`."
            )
        if not judges:
            return {}
        if not self.base:
            self.base = {name: estimates[name] for name in ("score", *judges)}
        gains = {name: _gain(estimates[name][0], *self.base[name]) for name in ("score", *judges) if name in self.base}
        return {"guard/judge_lead": max(gains["score"] - gains[name] for name in judges if name in gains)}

    def verdict(self, metrics: Mapping[str, float]) -> "GuardVerdict":
        """What the lines say about the numbers of an iteration; numbers that are not there are not judged."""
        crossed: dict[str, str] = {}
        for name, guard in self.guards.each():
            line = _LINES[name]
            value = metrics.get(line.metric)
            if guard.limit is None or value is None:
                continue
            is_beyond = not (value >= guard.limit if line.floor else value <= guard.limit)  # nan is beyond
            self.beyond[name] = self.beyond.get(name, 0) + 1 if is_beyond else 0
            if self.beyond[name] < guard.patience:
                continue
            sentence = f"{line.name}: {value:.3g} {line.unit}, limit {guard.limit:g}: {line.meaning}"
            if self.beyond[name] == guard.patience and guard.action != "stop":
                warnings.warn(f"Guard at work ({guard.action}). {sentence}. See docs/guards.md.", stacklevel=2)
            crossed[name] = sentence
        actions = {name: getattr(self.guards, name).action for name in crossed}
        stops = [sentence for name, sentence in crossed.items() if actions[name] == "stop"]
        return GuardVerdict(
            stop=stops[0] if stops else None,
            may_keep=all(action == "warn" for action in actions.values()),
            metrics={"guard/crossed": float(len(crossed))},
        )

    def state_dict(self) -> dict[str, Any]:
        """What the comparisons start from, and the counts."""
        return {
            "lengths": list(self.lengths), "base": {name: list(pair) for name, pair in self.base.items()},
            "beyond": dict(self.beyond),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on comparing with the same start."""
        lengths = [float(length) for length in state["lengths"]]
        base = {str(name): (float(mean), float(deviation)) for name, (mean, deviation) in state["base"].items()}
        beyond = {str(name): int(count) for name, count in state["beyond"].items()}
        self.lengths, self.base, self.beyond = lengths, base, beyond


@dataclass(frozen=True, kw_only=True)
class GuardVerdict:
    """What follows from the lines."""

    stop: str | None
    """Why the run must end; None: it may go on."""
    may_keep: bool
    """Whether a model of this moment may become the best."""
    metrics: dict[str, float]


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams that stood before in the same response; 0 where there is no n-gram."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def with_kl_budget(guards: Guards, max_reference_kl: float | None) -> Guards:
    """The same guards under a KL budget, unless they have one of their own."""
    if max_reference_kl is None or guards.kl.limit is not None:
        return guards
    settings = {item.name: getattr(guards, item.name) for item in fields(Guards)}
    return Guards(**settings | {"kl": Guard(limit=max_reference_kl)})


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))


def _gain(mean: float, start: float, deviation: float) -> float:
    return (mean - start) / max(deviation, 1e-6 * max(1.0, abs(start)))
