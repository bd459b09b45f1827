"""Environments that raise, hang, talk nonsense or are slow: retried or dropped and counted, never scored 0."""

import itertools
import threading
import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ppo import PPOClip, ReinforcePlusPlus
from rlhf_ppo.environments import EnvironmentSampler, EpisodeConfig, Turn
from rlhf_ppo.environments.concurrency import run_concurrently
from tests.environments.test_episodes import SAMPLING, Script, play
from tests.support.games import Chat, CountE
from tests.support.patience import PATIENCE
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
        ({"reward": 1e300}, "within float32"),
        ({"reward": np.array([1.0, 2.0])}, "finite number"),
        ({"reward": None}, "finite number"),
        ({"terminated": None}, "True or False"),
        ({"info": {"score": float("nan")}}, "leave it out"),
        ({"info": {"reason": "lost"}}, "leave it out"),
        ({"observation": [{"content": "no role"}]}, "text or a list of messages"),
        ({"info": {"turns": 1.0}}, "must not hold turns"),
    ],
)
def test_a_malformed_turn_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Turn(**changes)


@pytest.mark.parametrize("wrap", [np.float32, np.array, lambda x: np.array([x]), torch.tensor, lambda x: x])
def test_a_number_in_an_array_or_a_tensor_is_a_number(wrap: Any) -> None:
    turn = Turn("", wrap(1.5), info={"x": wrap(0.5)})
    assert (turn.reward, turn.info) == (1.5, {"x": 0.5})
    assert type(turn.reward) is float


@pytest.mark.parametrize("wrap", [np.bool_, np.array, torch.tensor, lambda x: x])
def test_a_truth_value_ends_an_episode_and_is_a_reward(wrap: Any) -> None:
    turn = Turn("", wrap(True), terminated=wrap(True), truncated=wrap(False))
    assert (turn.reward, turn.terminated, turn.truncated) == (1.0, True, False)


def test_one_environment_for_several_episodes_is_refused() -> None:
    only = CountE()
    with pytest.raises(ValueError, match="got 1 for 2 episodes"):
        play(lambda: only, Script("e"), tasks=2)


def test_a_close_that_is_a_generator_is_reported_as_it_never_ran() -> None:
    class Generator(CountE):
        def close(self) -> Any:
            yield

    with pytest.warns(UserWarning, match=r"close\(\) returned a generator"):
        assert play(Generator, Script("e", "ee", "x"))


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


def test_with_a_critic_an_episode_that_times_out_ends_before_the_reply_that_was_not_answered() -> None:
    """It is the episode that a turn limit would have cut there."""
    (expected,) = play(CountE, Script("e", "ee", "x"), max_turns=1)
    (seen,) = play(
        flaky(hang, range(9)), Script("e", "ee", "x"), keep_timed_out=True, timeout=0.2, max_concurrency=1, retries=0
    )
    assert seen.truncated
    for name in ("response_ids", "mask", "rewards", "logprobs"):
        assert torch.equal(getattr(seen, name), getattr(expected, name)), name
    assert seen.turn_ends == expected.turn_ends


def test_an_episode_that_times_out_before_its_first_answer_is_dropped_with_a_critic_too() -> None:
    class Hangs(CountE):
        def step(self, reply: str) -> Turn:
            return hang()

    with pytest.warns(UserWarning, match="no answer within 0.2 s"):
        assert play(Hangs, Script("e"), keep_timed_out=True, timeout=0.2, retries=0) == []


def test_an_environment_that_answers_after_its_time_limit_is_closed() -> None:
    answer, closed = threading.Event(), threading.Semaphore(0)

    class Late(CountE):
        def step(self, reply: str) -> Turn:
            answer.wait()
            return super().step(reply)

        def close(self) -> None:
            closed.release()

    with pytest.warns(UserWarning, match="no answer within"):
        assert play(Late, Script("e"), tasks=2, timeout=0.2, retries=1) == []
    answer.set()
    assert all(closed.acquire(timeout=PATIENCE) for _ in range(4)), "two environments, each made twice"


@pytest.mark.parametrize(
    ("algorithm", "timed_out", "failed"), [(PPOClip(), 1, 0), (ReinforcePlusPlus(), 0, 1)], ids=["critic", "none"]
)
def test_training_keeps_an_episode_that_timed_out_where_a_value_stands_for_its_future(
    algorithm: Any, timed_out: int, failed: int
) -> None:
    own = trainer(algorithm=algorithm)
    episodes = EpisodeConfig(retries=0, timeout=0.2, max_concurrency=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        state = own.train(None, config(iterations=1, episodes=episodes), environment=flaky(hang, {0}))
    assert (state.metrics["env/timed_out"], state.metrics["env/failed"]) == (timed_out, failed)
    assert own.last_batch is not None
    assert len(own.last_batch[0]) == own.config.batch_size - failed


def test_an_evaluation_drops_an_episode_that_timed_out() -> None:
    """Its rewards so far are not its score."""
    own = trainer()
    episodes = EpisodeConfig(retries=0, timeout=0.2, max_concurrency=1)
    with pytest.warns(UserWarning, match="1 of 4 episodes were dropped"):
        played = own.evaluate(4, None, SAMPLING, environment=flaky(hang, {0}), episodes=episodes)
    assert len(played.prompts) == 3
    assert not any(played.measures["truncated"])


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


@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
def test_half_a_character_in_an_observation_is_read_as_a_replacement_character(chat: bool) -> None:
    """As from a tool that returns what the policy wrote, half an emoji; two halves in a row are the emoji."""

    def playing(text: str) -> Any:
        observation = [{"role": "user", "content": text}] if chat else text

        class Echo:
            def reset(self) -> Any:
                return observation

            def step(self, reply: str) -> Turn:
                return Turn(observation, terminated=reply == "ee")

        (episode,) = play(Echo, Script("e", "ee"), chat=chat)
        return episode.prompt_ids.tolist(), episode.response_ids.tolist()

    assert playing("a \ud83d b \ud83d\ude00") == playing("a \ufffd b \N{GRINNING FACE}")


def test_messages_of_an_environment_are_read_as_those_of_data_sets_are() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls or '' }}\n{% endfor %}assistant: "
    )
    call = {"name": "f", "arguments": {"a": 1, "filler": None}}

    class Parts:
        def reset(self) -> list[dict[str, Any]]:
            return [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]

        def step(self, reply: str) -> Turn:
            called = {"role": "assistant", "content": "x", "tool_calls": [call]}
            return Turn([called, {"from": "human", "role": "user", "content": ["a", "b"]}], terminated=reply == "ee")

    runner = EnvironmentSampler(
        factory=Parts, sampler=Script("e", "ee"), tokenizer=tokenizer, device=torch.device("cpu"),
        config=EpisodeConfig(),
    )  # fmt: skip
    (episode,) = runner(torch.nn.Identity(), [{}], SAMPLING).episodes
    assert episode is not None
    assert tokenizer.decode(episode.prompt_ids) == "user: hi\nassistant: "
    assert "[{'name': 'f', 'arguments': {'a': 1}}]\nuser: ab\n" in tokenizer.decode(episode.response_ids)


def test_an_empty_conversation_drops_its_episode() -> None:
    class Silent(Chat):
        def reset(self) -> list[dict[str, str]]:
            return []

    with pytest.warns(UserWarning, match="reset\\(\\) returned no message"):
        assert play(Silent, Script("e"), chat=True) == []
