"""Guards against reward hacking: each number, its line and its action; then a reward that invites hacking."""

import json
import math
import warnings
from typing import Any

import pytest

from rlhf_ppo.diagnostics.guards import BASELINE_ITERATIONS, Guard, GuardMonitor, Guards, repetition

HEALTHY = {
    "objective/kl": 3.0,
    "ppo/policy/entropy": 2.0,
    "guard/repetition": 0.1,
    "guard/length_drift": 1.1,
    "guard/judge_lead": 0.1,
}
BEYOND = {"kl": ("objective/kl", 9.0), "entropy": ("ppo/policy/entropy", 0.1), "repetition": ("guard/repetition", 0.9),
          "length": ("guard/length_drift", 3.0), "judge": ("guard/judge_lead", 2.0)}  # fmt: skip
LIMITS = {"kl": 6.0, "entropy": 0.5, "repetition": 0.5, "length": 2.0, "judge": 1.0}


def watch(name: str, **settings: Any) -> GuardMonitor:
    return GuardMonitor(Guards(**{name: Guard(limit=LIMITS[name], **settings)}))


@pytest.mark.parametrize("name", BEYOND)
def test_each_guard_stops_beyond_its_line_and_not_before(name: str) -> None:
    metric, value = BEYOND[name]
    own = watch(name)
    assert own.verdict(HEALTHY).stop is None
    verdict = own.verdict(HEALTHY | {metric: value})
    assert verdict.stop is not None
    assert f"{value:.3g}" in verdict.stop and f"limit {LIMITS[name]:g}" in verdict.stop
    assert verdict.metrics == {"guard/crossed": 1.0}


@pytest.mark.parametrize("name", BEYOND)
def test_without_a_limit_nothing_happens(name: str) -> None:
    metric, value = BEYOND[name]
    verdict = GuardMonitor(Guards()).verdict(HEALTHY | {metric: value})
    assert (verdict.stop, verdict.may_keep, verdict.metrics) == (None, True, {"guard/crossed": 0.0})


@pytest.mark.parametrize(
    ("action", "stops", "may_keep"), [("stop", True, False), ("keep_best", False, False), ("warn", False, True)]
)
def test_actions_differ_in_what_they_allow(action: str, stops: bool, may_keep: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        verdict = watch("kl", action=action).verdict({"objective/kl": 9.0})
    assert len(said) == (0 if stops else 1)
    assert (verdict.stop is not None, verdict.may_keep) == (stops, may_keep)


def test_patience_counts_times_in_a_row_and_warns_once() -> None:
    own = watch("kl", patience=2, action="warn")
    bad, good = {"objective/kl": 9.0}, {"objective/kl": 1.0}
    for metrics in (bad, good, bad):
        assert own.verdict(metrics).metrics["guard/crossed"] == 0.0
    with pytest.warns(UserWarning, match="KL budget"):
        own.verdict(bad)
    assert own.verdict(bad).metrics["guard/crossed"] == 1.0  # a second warning would be an error here


@pytest.mark.parametrize("name", BEYOND)
def test_nan_is_beyond_every_line(name: str) -> None:
    assert "nan" in str(watch(name).verdict({BEYOND[name][0]: math.nan}).stop)


def test_repetition_is_the_share_of_n_grams_that_stood_before() -> None:
    """abcabc has the 3-grams abc, bca, cab, abc: one in four was there before."""
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([1] * 12) == pytest.approx(1 - 1 / 10)
    assert repetition([1, 2, 3, 4]) == repetition([1, 2]) == repetition([]) == 0.0


def test_length_drift_looks_both_ways_from_the_first_iterations() -> None:
    own = GuardMonitor(Guards())
    for _ in range(BASELINE_ITERATIONS):
        assert own.measure(0.0, 10.0)["guard/length_drift"] == 1.0
    assert own.measure(0.0, 30.0)["guard/length_drift"] == pytest.approx(3.0)
    assert own.measure(0.0, 5.0)["guard/length_drift"] == pytest.approx(2.0)


def test_the_judge_lead_is_the_scores_gain_minus_the_judges_in_first_deviations() -> None:
    """Score 0 ± 1 to 3 ± 1 gains 3; judge 0 ± 2 to -2 gains -1: the lead is 4, of the kind judge (gain 3) it is 0."""
    own = GuardMonitor(Guards())
    first = {"score": [-1.0, 1.0], "judge": [-2.0, 2.0], "kind": [-1.0, 1.0], "kl": [0.0, 0.0]}
    later = {"score": [2.0, 4.0], "judge": [-2.0, -2.0], "kind": [2.0, 4.0], "kl": [5.0, 5.0]}
    judges = ("judge", "kind")
    assert own.compare(first, judges) == {"guard/judge_lead": 0.0}
    assert own.compare(later, judges)["guard/judge_lead"] == pytest.approx(4.0)
    kind = GuardMonitor(Guards(judge_name="kind"))
    kind.compare(first, judges)
    assert kind.compare(later, judges)["guard/judge_lead"] == pytest.approx(0.0)


def test_measures_that_are_no_judges_and_an_evaluation_without_a_response_have_no_lead() -> None:
    """`segments` of an environment is always 1: beside it, every gain of the score would be a lead."""
    own = GuardMonitor(Guards())
    assert own.compare({"score": [1.0], "kl": [0.0], "segments": [1.0]}, ()) == {}
    assert own.compare({}, ("judge",)) == {}
    assert own.baseline == {}


def test_a_resumed_watch_compares_with_the_same_start() -> None:
    own, other = watch("kl", patience=3, action="warn"), watch("kl", patience=3, action="warn")
    own.measure(0.0, 10.0)
    own.compare({"score": [0.0, 2.0], "judge": [0.0, 2.0]}, ["judge"])
    own.verdict({"objective/kl": 9.0})
    other.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert other == own


@pytest.mark.parametrize("guard", [Guard(), Guard(limit=2.0, action="warn"), Guard(limit=9.0)])
def test_max_reference_kl_stops_whatever_the_guard_of_the_kl_does(guard: Guard) -> None:
    own = GuardMonitor(Guards(kl=guard), 5.0)
    assert own.verdict({"objective/kl": 1.0}).stop is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "limit 5" in str(own.verdict({"objective/kl": 6.0}).stop)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Guard(patience=0), "patience must be >= 1"),
        (lambda: Guards(length=Guard(limit=1.0)), r"Guards.length.limit must be above 1"),
        (lambda: Guards(kl=Guard(limit=-1.0)), r"Guards.kl.limit must be above 0"),
        (lambda: Guard(limit=math.nan), r"Guard.limit must be a number, got nan"),
    ],
)
def test_lines_that_mean_nothing_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
