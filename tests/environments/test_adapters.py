"""Adapters: environments of other libraries, as stand-ins of their interfaces, and the real ones where installed."""

import random
import threading
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ppo.environments import EnvironmentFactory, Turn
from rlhf_ppo.environments.adapters import (
    from_gem,
    from_openenv,
    from_openrlhf,
    from_reasoning_gym,
    from_skyrl_gym,
    from_textarena,
)
from rlhf_ppo.environments.adapters.conversion import finite_numbers
from rlhf_ppo.environments.concurrency import run_concurrently
from rlhf_ppo.environments.live import ReplayableEnvironment


def play(factory: EnvironmentFactory, *replies: str, **columns: Any) -> tuple[Any, list[Turn]]:
    """First observation and turns, through the wrapper that runs async methods and checks what comes back."""
    environment = ReplayableEnvironment(factory, {"seed": 7} | columns)
    environment.start()
    first, turns = environment.first, [environment.step(reply) for reply in replies]
    environment.close()
    return first, turns


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class GemGame:
    """gem's interface: it seeds the global generators, and draws from them later."""

    closed = 0

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        random.seed(seed)
        np.random.seed(seed)
        return f"Guess {random.random()}", {"suffix": "."}

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        numbers = f"{random.random()} {np.random.rand()}"
        return (
            numbers,
            np.float32(0.5),
            action == "end",
            action == "cut",
            {"tries": 3, "bad": float("nan")},
        )

    def close(self) -> None:
        GemGame.closed += 1


def test_gem_turns_carry_reward_ends_and_the_numbers_of_info() -> None:
    first, turns = play(from_gem(GemGame), "go", "cut", "end")
    assert first == user(first[0]["content"])
    assert [(turn.reward, turn.terminated, turn.truncated) for turn in turns] == [
        (0.5, False, False), (0.5, False, True), (0.5, True, False),
    ]  # fmt: skip
    assert turns[0].info == {"tries": 3.0}
    assert GemGame.closed == 1
    assert isinstance(play(from_gem(GemGame, chat=False))[0], str)


def test_environments_that_share_the_global_generators_hear_their_own_numbers_and_leave_the_process_its_own() -> None:
    """An episode between others draws what it draws alone, and the process's next number is as if none were there."""
    alone = play(from_gem(GemGame), "go", "go", "end")
    before = np.random.get_state()  # beartype draws from Python's
    environments = [ReplayableEnvironment(from_gem(GemGame), {"seed": seed}) for seed in (7, 8)]
    for environment in environments:
        environment.start()
    turns = [[environment.step(reply) for environment in environments] for reply in ("go", "go", "end")]
    assert [first for first, _ in turns] == alone[1]
    assert all(np.array_equal(one, other) for one, other in zip(before, np.random.get_state(), strict=True))


def test_a_call_that_hangs_keeps_no_other_from_the_global_generators() -> None:
    """The others wait for it longer than their own time limit; when it wakes up, it changes nothing any more."""
    release, left = threading.Event(), threading.Event()

    class Hanging(GemGame):
        def step(self, reply: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            release.wait()
            return "", 0.0, False, False, {}

    def play_on(environment: ReplayableEnvironment) -> Turn:
        try:
            return environment.step("go")
        finally:
            if environment is environments[0]:
                left.set()

    expected = play(from_gem(GemGame), "go")[1]
    games = [Hanging, GemGame, GemGame]
    environments = [ReplayableEnvironment(from_gem(game), {"seed": 7}) for game in games]
    for environment in environments:
        environment.start()
    calls = [partial(play_on, environment) for environment in environments]
    hung, *others = run_concurrently(calls, workers=3, timeout=1.0)
    assert isinstance(hung, TimeoutError)
    assert others == expected * 2
    np.random.rand()  # the run goes on
    before = np.random.get_state()
    release.set()
    left.wait()
    assert all(np.array_equal(one, other) for one, other in zip(before, np.random.get_state(), strict=True))


class SkyRLGame:
    def __init__(self, extras: Mapping[str, Any]) -> None:
        self.truth = extras["reward_spec"]["ground_truth"]

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        return [*prompt, {"role": "user", "content": "think"}], {}

    def step(self, action: str) -> dict[str, Any]:
        right = action == self.truth
        observations = [] if right else user("no")
        output = {"observations": observations, "reward": float(right), "done": right, "metadata": {"turns": 1}}
        return output | ({"postprocessed_action": action[:-1]} if action.endswith("!") else {})

    def close(self) -> None:
        pass


def make_skyrl(reward_spec: dict[str, str], **_: Any) -> SkyRLGame:
    return SkyRLGame({"reward_spec": reward_spec})


def test_skyrl_gym_is_made_from_the_columns_and_answers_with_messages() -> None:
    columns = {"prompt": "6 * 7?", "reward_spec": {"ground_truth": "42"}}
    first, turns = play(from_skyrl_gym(make_skyrl), "41", "42", **columns)
    assert first == user("6 * 7?") + user("think")
    info = {"reported_turns": 1.0}  # "turns" are the trainer's
    assert turns == [Turn(user("no"), info=info), Turn([], 1.0, terminated=True, info=info)]
    with pytest.raises(ValueError, match=r"postprocessed_action.*stop strings"):
        play(from_skyrl_gym(make_skyrl), "42!", **columns)


def test_numbers_of_an_info_may_be_numpy_s_or_in_a_tensor() -> None:
    kept = {"a": np.float32(0.5), "b": np.int64(2), "c": np.bool_(True), "d": np.array([3.0]), "e": torch.tensor(4)}
    left_out = {"f": np.float32("nan"), "g": np.array([1.0, 2.0]), "h": np.str_("text"), "i": None}
    assert finite_numbers(kept | left_out) == {"a": 0.5, "b": 2.0, "c": 1.0, "d": 3.0, "e": 4.0}


class ArenaGame:
    """textarena's interface with the wrapper that tells the whole history."""

    def __init__(self, player: int = 0, raw: bool = False) -> None:
        self.player, self.raw = player, raw

    def reset(self, num_players: int, seed: int | None = None) -> None:
        assert num_players == 1
        self.events: list[tuple[int, str, str]] = [(-1, f"Find {random.Random(seed).randint(1, 9)}.", "PROMPT")]
        self.text = ""

    def get_observation(self) -> tuple[int, Any]:
        new, self.events = self.events, []
        self.text += "".join(f"\n[{'GAME' if sender < 0 else 'Player'}] {text}" for sender, text, _ in new)
        return self.player, new if self.raw else self.text

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        self.events += [(0, action, "PLAYER_ACTION"), (-1, f"not {action}", "GAME_MESSAGE")]
        return action == "end", {}

    def close(self) -> tuple[dict[int, float], dict[int, dict[str, Any]]]:
        return {0: 0.25}, {0: {"role": "Player 0", "turn_count": 2, "invalid_move": False}}


@pytest.mark.parametrize("raw", [False, True])
def test_textarena_is_heard_once_without_the_own_move_and_rewarded_at_the_end(raw: bool) -> None:
    first, turns = play(from_textarena(lambda: ArenaGame(raw=raw)), "[5] (a+b)", "x", "end")
    assert first[0]["content"].endswith(f"Find {random.Random(7).randint(1, 9)}.")
    marks = "" if raw else "[GAME] "
    assert turns[:2] == [Turn(user(f"{marks}not [5] (a+b)")), Turn(user(f"{marks}not x"))]
    assert turns[2] == Turn(reward=0.25, terminated=True, info={"turn_count": 2.0, "invalid_move": 0.0})


def test_textarena_games_of_several_players_are_refused() -> None:
    with pytest.raises(ValueError, match="one player, got a turn of player 1"):
        play(from_textarena(lambda: ArenaGame(player=1)))


class Problems:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{index} + 1 =", "answer": str(index + 1), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0 if answer == entry["answer"] else 0.01


def test_reasoning_gym_takes_its_problem_from_the_index_or_the_seed_and_scores_the_answer() -> None:
    environment = from_reasoning_gym(Problems(), system="Be brief.")
    first, turns = play(environment, "I say <answer>1</answer>, no, <answer> 4\n</answer>.", index=3)
    assert first == [{"role": "system", "content": "Be brief."}, *user("3 + 1 =")]
    assert turns == [Turn(reward=1.0, terminated=True, info={"solved": 1.0})]
    first, turns = play(from_reasoning_gym(Problems(), chat=False), " 5 ")
    assert first == "2 + 1 ="  # seed 7, of five problems
    assert turns == [Turn(reward=0.01, terminated=True, info={"solved": 0.0})]


class Client:
    """OpenEnv's interface."""

    is_async = False

    def reset(self, seed: int = 0) -> Any:
        return self._answer(SimpleNamespace(observation=SimpleNamespace(text=f"seed {seed}"), reward=None, done=False))

    def step(self, action: Any) -> Any:
        heard = SimpleNamespace(text=action["message"].upper())
        return self._answer(SimpleNamespace(observation=heard, reward=2, done=action["message"] == "end"))

    def close(self) -> Any:
        return self._answer(None)

    def _answer(self, result: Any) -> Any:
        async def wait() -> Any:
            return result

        return wait() if self.is_async else result


class AsyncClient(Client):
    is_async = True


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_openenv_clients_may_be_async_and_know_no_reward_at_first(client: type[Client]) -> None:
    environment = from_openenv(
        client, action=lambda reply: {"message": reply}, text=lambda observation: str(observation.text)
    )
    first, turns = play(environment, "hello", "end", prompt="not for reset")
    assert first == user("seed 7")
    assert turns == [Turn(user("HELLO"), 2.0), Turn(user("END"), 2.0, terminated=True)]


class AgentInstance:
    """OpenRLHF's interface."""

    async def reset(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"observation": states["observation"] + "\n"}

    async def step(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        done = states["action_text"] == states["label"]
        reward = torch.tensor(float(len(states["observation_text"])))
        return {
            "rewards": reward, "scores": reward, "environment_feedback": "" if done else "\nAgain: ", "done": done,
            "sampling_params": {} if states["action_text"] == "hot" else states.get("sampling_params"),
            "extra_logs": {"length": reward},
        }  # fmt: skip


def test_openrlhf_agents_read_the_text_so_far_and_their_rewards_stay_with_their_turns() -> None:
    first, turns = play(from_openrlhf(AgentInstance), "no", "yes", prompt="Well?", label="yes")
    assert first == "Well?\n"
    lengths = [float(len("Well?\n")), float(len("Well?\nno\nAgain: "))]
    assert [turn.reward for turn in turns] == lengths
    assert [turn.observation for turn in turns] == ["\nAgain: ", ""]
    assert [turn.terminated for turn in turns] == [False, True]
    assert turns[0].info == {"length": lengths[0]}
    with pytest.raises(ValueError, match=r"sampling_params.*SamplingConfig"):
        play(from_openrlhf(AgentInstance), "hot", prompt="Well?")


def test_the_real_gem_plays_the_same_game_for_the_same_seed() -> None:
    gem = pytest.importorskip("gem")
    environment = from_gem(lambda: gem.make("game:GuessTheNumber-v0-easy"))
    replies = [rf"\boxed{{{number}}}" for number in (3, 1)]
    assert play(environment, *replies) == play(environment, *replies)
    first, turns = play(environment, *replies)
    assert "Guess The Number" in first[0]["content"]
    assert "higher" in turns[1].observation[0]["content"] or turns[1].terminated  # type: ignore[index]


def test_the_real_skyrl_gym_scores_an_answer() -> None:
    skyrl_gym = pytest.importorskip("skyrl_gym")
    environment = from_skyrl_gym(lambda reward_spec, **_: skyrl_gym.make("gsm8k", extras={"reward_spec": reward_spec}))
    columns = {"prompt": "6 * 7?", "reward_spec": {"ground_truth": "42"}}
    assert [play(environment, reply, **columns)[1][0].reward for reply in ("#### 42", "#### 41")] == [1.0, 0.0]


def test_the_real_textarena_tells_each_hint_once() -> None:
    textarena = pytest.importorskip("textarena")
    environment = from_textarena(lambda: textarena.make("GuessTheNumber-v0"))
    secret = next(n for n in range(1, 21) if play(environment, f"[{n}]")[1][0].terminated)
    other = 1 + secret % 20
    first, turns = play(environment, f"[{other}]", f"[{secret}]")
    assert "You are playing Guess The Number" in first[0]["content"]
    hint = "higher" if other < secret else "lower"
    assert turns[0] == Turn(user(f"[GAME] The target number is {hint}."))
    assert (turns[1].reward, turns[1].terminated) == (1.0, True)


def test_the_real_reasoning_gym_scores_its_own_answers() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    problems = reasoning_gym.create_dataset("chain_sum", size=5, seed=0)
    first, turns = play(from_reasoning_gym(problems), problems[2]["answer"], index=2)
    assert first == user(problems[2]["question"])
    assert turns[0].reward == 1.0
