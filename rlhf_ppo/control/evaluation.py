"""Evaluate and render a policy on complete episodes, without changing the policy or the normalizer."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf_ppo.control.environments import EnvironmentConfig, Environments, make_environment
from rlhf_ppo.control.normalization import Normalizer
from rlhf_ppo.control.policy import ControlPolicy

LONGEST_EPISODE = 10_000
"""Steps of an episode after which an evaluation of a task without time limit stops with an error."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Undiscounted, unscaled returns, and lengths, of complete episodes."""

    returns: list[float]
    lengths: list[int]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def stderr(self) -> float:
        """Standard error of the mean return; nan for a single episode."""
        return float(np.std(self.returns, ddof=1) / math.sqrt(len(self.returns))) if len(self.returns) > 1 else math.nan


@torch.no_grad()
def evaluate(
    policy: ControlPolicy, normalizer: Normalizer, config: EnvironmentConfig, *, episodes: int, deterministic: bool,
    seed: int,
) -> EvaluationResult:  # fmt: skip
    """Run one episode in each of `episodes` environments.

    Args:
        policy: The policy that acts.
        normalizer: Scales observations; its moments do not change.
        config: The task; one that differs from training measures generalization.
        episodes: Number of episodes.
        deterministic: Take the most likely action instead of sampling.
        seed: Seeds initial states and actions.

    Raises:
        ValueError: `episodes` is below 1, or the task has no time limit and an episode does not end.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}: there would be nothing to average.")
    environments = Environments([make_environment(config) for _ in range(episodes)], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    returns, lengths, running = np.zeros(episodes), np.zeros(episodes, dtype=int), np.ones(episodes, dtype=bool)
    limit = environments.envs[0].spec.max_episode_steps
    while running.any():
        if limit is None and lengths.max() >= LONGEST_EPISODE:
            environments.close()
            raise ValueError(
                f"expected {config.id} to end its episodes, got {int(running.sum())} of {episodes} still running after "
                f"{LONGEST_EPISODE} steps: the task has no time limit, and an evaluation counts whole episodes. Set "
                "max_episode_steps in EnvironmentConfig (or where the task is registered)."
            )
        normalized = torch.from_numpy(normalizer.normalize_observations(environments.observations))
        noise = None if deterministic else policy.distribution.noise((episodes,), generator)
        step = environments.step(policy.act(normalized, noise).numpy())
        returns += np.where(running, step.rewards, 0.0)
        lengths += running
        running &= ~(np.asarray(step.terminated) | np.asarray(step.truncated))
    environments.close()
    return EvaluationResult(returns=returns.tolist(), lengths=lengths.tolist())


@torch.no_grad()
def render_frames(
    policy: ControlPolicy, normalizer: Normalizer, config: EnvironmentConfig, *, count: int, every: int, seed: int
) -> list[Any]:
    """Render one deterministic episode: up to `count` RGB arrays [height, width, 3], one every `every` steps.

    Raises:
        RuntimeError: Rendering is not possible on this machine.
    """
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a display, the backend that most machines have
    env = make_environment(replace(config, render=True))
    frames: list[Any] = []
    environments = Environments([env], seed=seed)
    try:
        for time in range(count * every):
            if time % every == 0:
                frames.append(env.render())
            normalized = torch.from_numpy(normalizer.normalize_observations(environments.observations))
            step = environments.step(policy.act(normalized, None).numpy())
            if step.terminated[0] or step.truncated[0]:
                break
    except Exception as error:  # MuJoCo and PyOpenGL raise many types where OpenGL is missing
        reason = (str(error).splitlines() or [""])[0]
        raise RuntimeError(
            f"expected to render {config.id}, got {type(error).__name__} ({reason}): there will be no pictures, "
            "all other results are unaffected. Set MUJOCO_GL=egl or MUJOCO_GL=osmesa, whichever this machine has."
        ) from error
    finally:
        env.close()
    return frames
