"""Environments run at the same time: no clock is read, they wait for each other."""

import threading

import torch

from rlhf_ppo.environments import EnvironmentSampler, EpisodeConfig, Turn
from tests.environments.test_episodes import SAMPLING, Script
from tests.support.games import CountE
from tests.support.tiny_models import tiny_tokenizer


def test_thirty_two_environments_step_at_the_same_time() -> None:
    """Each step waits until all are in it, which one after the other would never be."""
    barrier = threading.Barrier(32)

    class Together(CountE):
        def step(self, reply: str) -> Turn:
            barrier.wait()
            return super().step(reply)

    runner = EnvironmentSampler(
        factory=Together, sampler=Script("e", "ee", "x"), tokenizer=tiny_tokenizer(), device=torch.device("cpu"),
        config=EpisodeConfig(timeout=None),
    )  # fmt: skip
    played = runner(torch.nn.Identity(), [{}] * 32, SAMPLING)
    assert [episode is not None and episode.total_reward for episode in played.episodes] == [3.0] * 32


def test_the_order_in_which_environments_finish_changes_nothing() -> None:
    """Each environment waits for the one after it: they finish from the last to the first."""

    def play(*, reverse: bool) -> list[list[int]]:
        gates = [threading.Event() for _ in range(9)]
        gates[-1].set()

        class Numbered(CountE):
            def reset(self, number: int) -> str:
                self.number = number
                if reverse:
                    gates[number + 1].wait()
                    gates[number].set()
                return f"Episode {number}:"

        runner = EnvironmentSampler(
            factory=Numbered, sampler=Script("e", "ee", "x"), tokenizer=tiny_tokenizer(), device=torch.device("cpu"),
            config=EpisodeConfig(timeout=None),
        )  # fmt: skip
        played = runner(torch.nn.Identity(), [{"number": number} for number in range(8)], SAMPLING)
        return [[*episode.prompt_ids, *episode.response_ids] for episode in played.episodes if episode is not None]

    assert play(reverse=True) == play(reverse=False)
