"""Environments that raise, hang, talk nonsense or are slow: retried or dropped and counted, never scored 0."""

import itertools
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ppo.environments import EnvironmentSampler, EpisodeConfig, Turn
from rlhf_ppo.environments.concurrency import run_concurrently
from tests.environments.test_episodes import SAMPLING, Script, play
from tests.support.games import Chat, CountE
from tests.support.tiny_models import tiny_tokenizer
from tests.support.tiny_run import config, trainer


def flaky(fault: Any, instances: Iterable[int]) -> Any:
    """An environment class; in the given instances, counted as they are made, the second turn has a fault."""
    made = itertools.count()

    class Flaky(CountE):
        def __init__(self) -> None:
            super().__init__()
            self.number = next(made)

        def step(self, reply: str) -> Turn:
            turn = super().step(reply)
            is_faulty = self.played == 2 and self.number in instances
            return fault() if is_faulty else turn

    return Flaky


def raise_error() -> Turn:
    raise OSError("the sandbox is gone")


def hang() -> Turn:
    threading.Event().wait()
    raise AssertionError


def nonsense() -> Any:
    return "observation", 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": float("nan")}, "finite number"),
        ({"observation": [{"content": "no role"}]}, "text or a list of messages"),
        ({"info": {"turns": 1.0}}, "must not hold turns"),
    ],
)
def test_a_malformed_turn_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Turn(**changes)


def test_numbers_of_numpy_are_numbers() -> None:
    turn = Turn("", np.float32(1.5), terminated=np.bool_(True), info={"x": np.int64(3)})
    assert turn.reward == 1.5
    assert turn.terminated


FAULTS = {"raises": raise_error, "hangs": hang, "talks nonsense": nonsense, "gives nan": lambda: Turn("", float("nan"))}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_that_passes_is_played_again_with_the_same_replies(fault: Any) -> None:
    """The episode is the one that would have been without the fault."""
    replies = ("e", "ee", "x")
    (expected,) = play(CountE, Script(*replies))
    (seen,) = play(flaky(fault, {0}), Script(*replies), timeout=0.2)
    assert seen.response_ids.tolist() == expected.response_ids.tolist()
    assert seen.rewards.tolist() == expected.rewards.tolist()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_an_episode_whose_fault_stays_is_dropped_and_the_others_are_as_before(fault: Any) -> None:
    with pytest.warns(UserWarning, match="1 of 3 episodes were dropped"):
        episodes = play(
            flaky(fault, {0, 3}), Script("e", "ee", "x"), tasks=3, timeout=0.2, max_concurrency=1, retries=1
        )
    assert [episode.total_reward for episode in episodes] == [3.0, 3.0]
    assert all(not episode.truncated for episode in episodes)


def test_an_environment_that_answers_differently_when_started_again_is_dropped() -> None:
    """Its earlier replies were answers to other observations."""
    starts: list[int] = []

    class Moody(flaky(raise_error, {0})):  # type: ignore[misc]
        def reset(self) -> str:
            starts.append(0)
            return f"start {len(starts)}"

    with pytest.warns(UserWarning, match="another first observation"):
        assert play(Moody, Script("e", "ee", "x")) == []


def test_failed_episodes_are_counted_and_a_group_with_one_is_left_out() -> None:
    own = trainer()
    with pytest.warns(UserWarning, match="dropped"):
        state = own.train(
            None, config(iterations=1, episodes=EpisodeConfig(retries=0)), environment=flaky(raise_error, {0})
        )
    assert state.metrics["env/failed"] == 1
    assert own.last_batch is not None
    assert len(own.last_batch[0]) == own.config.batch_size - 1


def test_a_run_whose_environments_all_fail_ends_and_says_why() -> None:
    own = trainer()
    with (
        pytest.warns(UserWarning, match="OSError: the sandbox is gone"),
        pytest.raises(ValueError, match="environment"),
    ):
        own.train(None, config(iterations=1), environment=flaky(raise_error, range(10**6)))


def test_a_reset_that_wants_a_column_that_is_not_there_says_so() -> None:
    class Wants(CountE):
        def reset(self, secret: int) -> str:
            return str(secret)

    with pytest.warns(UserWarning, match="wants 'secret', which is no column"):
        assert play(Wants, Script("e")) == []


def test_results_are_in_the_order_of_the_calls_whatever_finishes_first() -> None:
    gate = threading.Event()

    def first() -> str:
        gate.wait()
        return "first"

    def second() -> str:
        gate.set()
        return "second"

    assert run_concurrently([first, second], workers=2, timeout=None) == ["first", "second"]


def test_calls_run_at_the_same_time_up_to_the_limit_and_a_hanging_one_takes_no_place() -> None:
    running, most, lock = [0], [0], threading.Lock()

    def count() -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return 1

    results = run_concurrently([hang, hang, *[count] * 12], workers=3, timeout=0.3)
    assert [type(result) for result in results[:2]] == [TimeoutError] * 2
    assert results[2:] == [1] * 12
    assert most[0] <= 3


def test_async_environments_are_awaited_and_closed() -> None:
    closed: list[int] = []

    class Async:
        def __init__(self) -> None:
            self.inner = CountE(turns=2)

        async def reset(self) -> str:
            return self.inner.reset()

        async def step(self, reply: str) -> Turn:
            return self.inner.step(reply)

        async def close(self) -> None:
            closed.append(1)

    (episode,) = play(Async, Script("e", "ee"))
    assert episode.total_reward == 3.0
    assert closed == [1]


def test_an_observation_that_the_chat_template_refuses_drops_its_episode_alone() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
    )

    class Odd(Chat):
        def reset(self, number: int) -> list[dict[str, str]]:  # type: ignore[override]
            self.number = number
            return super().reset()

        def step(self, reply: str) -> Turn:
            turn = super().step(reply)
            return Turn([{"role": "tool", "content": "4"}]) if self.number == 1 else turn

    runner = EnvironmentSampler(
        factory=Odd, sampler=Script("hi", "there"), tokenizer=tokenizer, device=torch.device("cpu"),
        config=EpisodeConfig(),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no tools"):
        played = runner(torch.nn.Identity(), [{"number": number} for number in range(3)], SAMPLING)
    assert [episode is None for episode in played.episodes] == [False, True, False]
