"""Episodes that are played to be judged: nothing is learned, no statistic moves."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf_ppo.control.environments import EnvironmentConfig, Environments, make_environment
from rlhf_ppo.control.normalization import Normalizer
from rlhf_ppo.control.policy import ControlPolicy


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Returns of complete episodes, raw rewards, undiscounted."""

    returns: list[float]
    lengths: list[int]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def stderr(self) -> float:
        """Standard error of the mean; nan of a single episode."""
        return float(np.std(self.returns, ddof=1) / math.sqrt(len(self.returns))) if len(self.returns) > 1 else math.nan


@torch.no_grad()
def evaluate(
    policy: ControlPolicy, normalizer: Normalizer, config: EnvironmentConfig, *, episodes: int, deterministic: bool,
    seed: int,
) -> Episodes:  # fmt: skip
    """Play one episode in each of `episodes` environments.

    Args:
        policy: Acts.
        normalizer: Scales what it sees, with the moments as they are.
        config: The task; another than the one of training shows how far the policy carries.
        episodes: How many.
        deterministic: The most likely action instead of a drawn one.
        seed: Of first states and actions.

    Raises:
        ValueError: Fewer than one episode.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}: there would be nothing to average.")
    environments = Environments([make_environment(config) for _ in range(episodes)], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    returns, lengths, open_ones = np.zeros(episodes), np.zeros(episodes, dtype=int), np.ones(episodes, dtype=bool)
    while open_ones.any():
        observed = torch.from_numpy(normalizer.observed(environments.observations))
        noise = None if deterministic else policy.distribution.noise((episodes,), generator)
        step = environments.step(policy.act(observed, noise).numpy())
        returns += np.where(open_ones, step.rewards, 0.0)
        lengths += open_ones
        open_ones &= ~(np.asarray(step.terminated) | np.asarray(step.truncated))
    environments.close()
    return Episodes(returns=returns.tolist(), lengths=lengths.tolist())


@torch.no_grad()
def frames(
    policy: ControlPolicy, normalizer: Normalizer, config: EnvironmentConfig, *, count: int, every: int, seed: int
) -> list[Any]:
    """Pictures [height, width, 3] of one deterministic episode, one every `every` steps.

    Raises:
        RuntimeError: There is no way to render on this machine.
    """
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a screen, the one that most machines have
    env = make_environment(replace(config, render=True))
    pictures: list[Any] = []
    applied = Environments([env], seed=seed)
    try:
        for time in range(count * every):
            if time % every == 0:
                pictures.append(env.render())
            observed = torch.from_numpy(normalizer.observed(applied.observations))
            step = applied.step(policy.act(observed, None).numpy())
            if step.terminated[0] or step.truncated[0]:
                break
    except Exception as error:  # MuJoCo's and PyOpenGL's many ways to say that there is no OpenGL
        reason = (str(error).splitlines() or [""])[0]
        raise RuntimeError(
            f"expected to render {config.id}, got {type(error).__name__} ({reason}): there will be no pictures, "
            "everything else is there. Set MUJOCO_GL=egl or MUJOCO_GL=osmesa, whichever this machine has."
        ) from error
    finally:
        env.close()
    return pictures
