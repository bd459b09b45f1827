"""Runs that are killed in the middle of episodes end with the weights of the run that was not."""

import random
from pathlib import Path

import pytest
import torch

from rlhf_ppo.environments import EpisodeConfig, Turn
from tests.support.games import CountE
from tests.support.tiny_run import config, parameters, trainer

ITERATIONS = 6
INLINE = EpisodeConfig(max_concurrency=1, timeout=None)


class Killed(BaseException):
    """Nothing in the trainer catches it: no checkpoint is written, no environment closed."""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 50])
def test_a_run_killed_in_the_middle_of_its_episodes_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, kills: int
) -> None:
    settings = config(tmp_path, iterations=ITERATIONS, save_every=1, episodes=INLINE)
    whole = trainer()
    whole.train(None, config(iterations=ITERATIONS, episodes=INLINE), environment=CountE)
    # So many steps that all kills together come some iterations far.
    steps = int(3 * whole.config.batch_size * (1 + ITERATIONS / (2 * kills)))
    generator, killed = random.Random(kills), 0
    while True:
        left = generator.randint(1, steps) if killed < kills else -1

        class Mortal(CountE):
            def step(self, reply: str) -> Turn:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return super().step(reply)

        own = trainer(diagnose=False)  # the doctor plays episodes again, in threads that survive a kill
        try:
            own.train(None, settings, environment=Mortal)
        except Killed:
            killed += 1
            continue
        break
    assert killed == kills
    assert torch.equal(parameters(whole), parameters(own))
