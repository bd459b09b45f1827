"""What the managed loop does when a policy games its reward, when a reward source fails, and when input is wrong."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo import RLOO, TrainConfig, TrainState
from rlhf_ppo.diagnostics.guards import Guard, GuardMonitor, Guards
from rlhf_ppo.loop.checks import LostRollouts
from rlhf_ppo.rewards.sources import RewardFailures, RewardSourceError
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_models import EOS_TOKEN_ID
from tests.support.tiny_run import SAMPLING, TEXTS, config, parameters, share_of_e, trainer

LONG = SamplingConfig(max_new_tokens=16, stop_token_ids=(EOS_TOKEN_ID,))
DROP = RewardFailures(on_failure="drop", backoff=0.0)


def counts_e(responses: Sequence[str], **_: Any) -> list[float]:
    """Invites hacking: the longer, the more repetitive, the better."""
    return [float(response.count("e")) for response in responses]


def variety(responses: Sequence[str], **_: Any) -> list[float]:
    """A judge that sees through it: different letters over all letters."""
    return [len(set(response)) / max(1, len(response)) for response in responses]


@pytest.fixture(scope="module")
def hacked() -> TrainState:
    """An unguarded run that does what its reward invites to."""
    own = trainer(batch_size=16, mini_batch_size=16, learning_rate=1e-2, init_kl_coef=0.0, adap_kl_ctrl=False)
    held_out = PromptDataset.from_texts(TEXTS * 4, own.tokenizer)
    settings = TrainConfig(iterations=24, sampling=LONG, progress=False, eval_every=4)
    return own.train(counts_e, settings, eval_prompts=held_out, judges={"variety": variety})


LIMITS = {"kl": 10.0, "entropy": 1.0, "repetition": 0.5, "judge": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_every_guard_sees_the_hack_and_leaves_its_beginning_alone(hacked: TrainState, name: str) -> None:
    watch = GuardMonitor(Guards(**{name: Guard(limit=LIMITS[name])}))
    verdicts = [watch.verdict(row).stop for row in hacked.history]
    assert verdicts[0] is None
    assert any(verdicts), [row.get("guard/judge_lead", row["guard/repetition"]) for row in hacked.history]
    assert hacked.history[-1]["env/reward_mean"] > 2 * hacked.history[0]["env/reward_mean"], "it was a hack that paid"


def test_the_length_guard_stops_a_policy_that_is_paid_by_the_token() -> None:
    """Every second token stops, so responses are short; a policy that avoids them writes longer ones."""
    own = trainer(batch_size=16, mini_batch_size=16, learning_rate=1e-2, init_kl_coef=0.0, adap_kl_ctrl=False)
    sampling = SamplingConfig(max_new_tokens=16, stop_token_ids=tuple(range(3, 320, 2)))
    guards = Guards(length=Guard(limit=1.5))
    settings = TrainConfig(iterations=40, sampling=sampling, progress=False, guards=guards)

    def counts_letters(responses: Sequence[str], **_: Any) -> list[float]:
        return [float(len(response)) for response in responses]

    state = own.train(counts_letters, settings)
    assert state.stopped is not None
    assert state.stopped.startswith("length drift: ")
    assert state.history[0]["guard/length_drift"] == 1.0


def test_a_guard_stops_the_run_with_its_reason_and_a_checkpoint(tmp_path: Path) -> None:
    own = trainer(learning_rate=0.05, init_kl_coef=0.0, adap_kl_ctrl=False)
    guards = Guards(kl=Guard(limit=0.5))
    state = own.train(share_of_e, config(tmp_path, iterations=20, guards=guards))
    assert state.stopped is not None
    assert state.stopped.startswith("KL budget: ")
    assert "limit 0.5" in state.stopped
    assert not state.interrupted
    assert (tmp_path / f"checkpoint-{state.iteration}").is_dir()


@pytest.mark.filterwarnings("ignore:Guard at work")
@pytest.mark.parametrize(("action", "kept"), [("keep_best", False), ("warn", True)])
def test_keep_best_lets_no_model_from_beyond_the_line_become_the_best(tmp_path: Path, action: Any, kept: bool) -> None:
    own = trainer()
    guards = Guards(entropy=Guard(limit=100.0, action=action))
    held_out = PromptDataset.from_texts(TEXTS, own.tokenizer)
    settings = config(tmp_path, iterations=2, eval_every=1, keep_best="score", guards=guards)
    state = own.train(share_of_e, settings, eval_prompts=held_out)
    assert state.stopped is None
    assert (tmp_path / "best").is_dir() == kept
    assert (state.best is not None) == kept


def test_a_rollout_without_any_score_is_drawn_anew_and_counted() -> None:
    calls = []

    def fails_once(responses: Sequence[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no route")
        return [1.0] * len(responses)

    with pytest.warns(UserWarning, match="A rollout was lost"):
        state = trainer().train(fails_once, config(iterations=3, reward_failures=DROP))
    assert state.iteration == 3
    assert [row["env/rollouts_lost"] for row in state.history] == [0.0, 1.0, 1.0]


def test_the_count_of_lost_rollouts_is_part_of_a_checkpoint() -> None:
    """Else `env/rollouts_lost` of a resumed run would begin at nought again."""
    first, second = (LostRollouts(trainer().processes, DROP) for _ in range(2))
    with pytest.warns(UserWarning, match="A rollout was lost"):
        assert first.is_lost(0)
    second.load_state_dict(first.state_dict())
    assert (second.total, second.in_a_row) == (1, 1)


@pytest.mark.filterwarnings("ignore:A rollout was lost")
def test_a_reward_that_never_comes_ends_the_run_without_having_changed_anything() -> None:
    def dead(**_: Any) -> list[float]:
        raise OSError("no route")

    own = trainer()
    before = parameters(own).clone()
    with pytest.raises(RewardSourceError, match="none in 3 rollouts in a row"):
        own.train(dead, config(reward_failures=DROP))
    assert torch.equal(before, parameters(own))
    with pytest.raises(RewardSourceError, match="'dead' raised OSError"):
        own.train(dead, config())
    assert own.optimizer.state == {}


def test_nan_drops_single_samples_and_their_share_is_a_metric() -> None:
    def lies(responses: Sequence[str], **_: Any) -> list[float]:
        return [math.nan, *[float(index) for index in range(len(responses) - 1)]]

    state = trainer().train(lies, config(iterations=1, reward_failures=DROP))
    assert state.history[0]["env/reward_dropped"] == pytest.approx(1 / 8)
    assert state.history[0]["env/reward_mean"] == pytest.approx(3.0)  # of 0 ... 6: the nan is no zero


def test_a_dropped_response_takes_its_group_with_it() -> None:
    """Of four pairs the second has lost a member: six responses are left, and none is compared across prompts."""
    own = trainer(algorithm=RLOO(), batch_size=8, mini_batch_size=8, ppo_epochs=1)

    def lies(responses: Sequence[str], **_: Any) -> list[float]:
        return [0.0, 1.0, math.nan, 1.0, 0.0, 1.0, 0.0, 1.0]

    pairs = replace(SAMPLING, num_return_sequences=2)
    state = own.train(lies, TrainConfig(iterations=1, sampling=pairs, progress=False, reward_failures=DROP))
    assert state.history[0]["env/reward_dropped"] == pytest.approx(1 / 8)
    assert own.last_batch is not None
    advantages = own.last_batch[0].advantages[:, 0]
    assert torch.allclose(advantages, torch.tensor([-1.0, 1.0] * 3)), advantages


def test_the_first_rollout_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    own = trainer(diagnose=True)
    own.train(share_of_e, TrainConfig(iterations=2, sampling=replace(SAMPLING, top_k=5), progress=False))
    assert "responses are drawn with top_k=5" in caplog.text
    assert own.diagnosis is not None
    assert {finding.name for finding in own.diagnosis.warnings} == {"sampling"}


class Broken:
    """A sampler of somebody else's, with one thing wrong."""

    def __init__(self, own: Any, change: Any) -> None:
        self.inner, self.change = DecodeLoop(own.tokenizer), change

    def __call__(self, *arguments: Any, **keywords: Any) -> Samples:
        return self.change(self.inner(*arguments, **keywords))


def first(samples: Samples, change: Any) -> list[Any]:
    return [change(samples.responses[0]), *samples.responses[1:]]


BROKEN: dict[str, tuple[Any, str]] = {
    "empty response": (lambda s: replace(s, responses=first(s, lambda row: row[:0])), r"responses\[0\] is empty"),
    "foreign token": (lambda s: replace(s, responses=first(s, lambda row: row + 900)), r"responses\[0\] holds token"),
    "too few": (lambda s: replace(s, responses=s.responses[1:]), "expected 8 responses from the sampler, got 7"),
    "too long": (lambda s: replace(s, responses=first(s, lambda row: row.repeat(60))), "sample 0 has"),
    "nan log-probability": (lambda s: replace(s, logprobs=[r * math.nan for r in s.logprobs]), "tokens of response 0"),
    "probabilities": (lambda s: replace(s, logprobs=[r.exp() for r in s.logprobs]), "expected a log-probability <= 0"),
    "short log-probabilities": (lambda s: replace(s, logprobs=[r[1:] for r in s.logprobs]), "tokens of response 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_a_sampler_returns_is_checked_before_anything_moves(change: Any, message: str) -> None:
    own = trainer()
    before = parameters(own).clone()
    asked = []
    with pytest.raises(ValueError, match=message):
        own.train(lambda responses: asked.append(1) or [1.0] * len(responses), config(), sampler=Broken(own, change))
    assert not asked, "no reward source is asked about such a batch"
    assert torch.equal(before, parameters(own))
    assert own.optimizer.state == {}


def test_what_the_loop_would_ignore_or_stumble_over_later_is_refused_at_once() -> None:
    own = trainer()
    held_out = PromptDataset.from_texts(TEXTS, own.tokenizer)
    with pytest.raises(ValueError, match="expected held-out prompts for eval_every=2"):
        own.train(share_of_e, config(eval_every=2))
    with pytest.raises(ValueError, match=r"expected judges and evaluations for guards\.judge"):
        own.train(share_of_e, config(eval_every=2, guards=Guards(judge=Guard(limit=1.0))), eval_prompts=held_out)
    with pytest.raises(ValueError, match="expected stop_token_ids below"):
        own.train(share_of_e, TrainConfig(sampling=SamplingConfig(max_new_tokens=4, stop_token_ids=(999,))))
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        own.train(share_of_e, TrainConfig(sampling=SamplingConfig(max_new_tokens=127)))
    assert own.optimizer.state == {}
