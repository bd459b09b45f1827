"""Train PPO, TRPO or REINFORCE on a control task; save and resume exactly."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from rlhf_ppo.algorithms import Algorithm, AlgorithmConfig, build_algorithm
from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.lock import lock_run_folder
from rlhf_ppo.checkpoints.nested_state import load_nested_state, save_nested_state
from rlhf_ppo.control.algorithms import control_algorithm, discount
from rlhf_ppo.control.collection import Collector, flatten_time
from rlhf_ppo.control.environments import EnvironmentConfig, Environments, make_environment
from rlhf_ppo.control.evaluation import EvaluationResult, evaluate
from rlhf_ppo.control.normalization import Normalizer
from rlhf_ppo.control.numpy_gradients import NumpyGradients
from rlhf_ppo.control.policy import Categorical, ControlPolicy, Gaussian
from rlhf_ppo.updates import MinibatchConfig
from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Settings of a run; defaults from Schulman et al. (2017) for MuJoCo, with eight environments."""

    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """The task."""
    algorithm: AlgorithmConfig = field(default_factory=lambda: control_algorithm("ppo-clip"))
    """The algorithm and its settings."""
    total_steps: int = 1_000_000
    """Environment steps of the run, rounded down to whole iterations; with `anneal` the learning rate ends at 0."""
    environments: int = 8
    """Number of environments."""
    rollout_steps: int = 256
    """T: steps per environment and iteration."""
    minibatch_size: int = 64
    """Environment steps per optimizer step."""
    epochs: int = 10
    """K: passes over a rollout; in TRPO, for the critic alone."""
    learning_rate: float = 3e-4
    """Initial learning rate of Adam."""
    anneal: bool = True
    """Anneal the learning rate linearly to 0."""
    adam_epsilon: float = 1e-5
    """Adam's ε (TensorFlow's default was near it; PyTorch's is 1e-8)."""
    max_grad_norm: float | None = 0.5
    """Gradients of actor and critic together are clipped to this global norm; None: not clipped."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    orthogonal: bool = True
    """Orthogonal initialization."""
    normalize_observations: bool = True
    """Scale observations by running moments."""
    normalize_rewards: bool = True
    """Divide rewards by the standard deviation of the discounted return."""
    lowered: bool = True
    """Compute minibatch gradients by `NumpyGradients`; False: by autograd. Equal up to rounding."""
    seed: int = 0
    """Seeds weights, initial states, actions and row order."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("total_steps", "environments", "rollout_steps", "minibatch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}: nothing would be learned.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}: nothing would be learned.")
        if self.iterations < 1:
            raise ValueError(
                f"expected total_steps >= environments * rollout_steps = {self.batch_size}, got {self.total_steps}: "
                "not one iteration would fit. Raise total_steps, or use fewer environments or shorter rollouts."
            )

    @property
    def batch_size(self) -> int:
        """Environment steps per iteration."""
        return self.environments * self.rollout_steps

    @property
    def iterations(self) -> int:
        """Number of iterations in `total_steps`."""
        return self.total_steps // self.batch_size


def _no_report(_: dict[str, float]) -> None:
    """Default of `report`: do nothing."""


class ControlTrainer:
    """Trains a policy on environments with one algorithm, on one process and the CPU.

    Args:
        config: Settings of the run.
    """

    def __init__(self, config: ControlConfig) -> None:
        self.config = config
        streams = np.random.SeedSequence(config.seed).generate_state(4)
        envs = [make_environment(config.environment) for _ in range(config.environments)]
        self.environments = Environments(envs, seed=int(streams[0]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(streams[1]))
            self.policy = _make_policy(self.environments, config)
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), lr=config.learning_rate, eps=config.adam_epsilon, fused=True
        )
        self.normalizer = Normalizer(
            self.environments.observations.shape[1], environments=config.environments,
            gamma=discount(config.algorithm),
            observations=config.normalize_observations, rewards=config.normalize_rewards,
        )  # fmt: skip
        self.collect = Collector(
            self.policy, self.environments, self.normalizer, steps=config.rollout_steps, seed=int(streams[2])
        )
        self.algorithm: Algorithm = build_algorithm(
            config.algorithm, policy=self.policy, optimizer=self.optimizer, accelerator=Accelerator(cpu=True),
            minibatch_config=lambda: _minibatch_config(config), seed=int(streams[3]),
            compute_gradients=NumpyGradients(self.policy) if config.lowered else None,
        )  # fmt: skip
        self.iteration, self.steps, self.episodes = 0, 0, 0
        self.recent: deque[float] = deque(maxlen=100)
        """Returns of the last hundred training episodes, with sampled actions."""

    def step(self) -> dict[str, float]:
        """One iteration: run π_old, estimate advantages, update."""
        self._anneal()
        rollout = self.collect()
        batch = flatten_time(self.algorithm.estimate_advantages(rollout))
        record = self.algorithm.update(batch)
        self.iteration += 1
        self.steps += int(rollout.mask.sum())
        finished, self.environments.finished = self.environments.finished, []
        self.recent.extend(value for value, _ in finished)
        self.episodes += len(finished)
        return (
            {
                "iteration": self.iteration,
                "steps": self.steps,
                "episodes": self.episodes,
                "return/last_100": float(np.mean(self.recent)) if self.recent else float("nan"),
                "return/last_20": float(np.mean(list(self.recent)[-20:])) if self.recent else float("nan"),
                "policy/learning_rate": self.optimizer.param_groups[0]["lr"],
                "policy/skipped": record.skipped,
            }
            | record.mean()
            | record.extras
        )

    def train(
        self,
        folder: Path | None = None,
        *,
        save_every: int = 0,
        report: Callable[[dict[str, float]], None] = _no_report,
    ) -> list[dict[str, float]]:
        """Run iterations until `total_steps` is reached.

        Args:
            folder: Folder of checkpoints; training resumes from the newest complete one.
            save_every: Iterations between two checkpoints; 0: only after the last.
            report: Called with the metrics of every iteration.

        Returns:
            Metrics of the iterations of this call.

        Raises:
            FolderInUseError: Another run writes into `folder`.
        """
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if folder is None else lock_run_folder(folder):
            return self._train(folder, save_every, report)

    def _train(
        self, folder: Path | None, save_every: int, report: Callable[[dict[str, float]], None]
    ) -> list[dict[str, float]]:
        history = []
        if folder is not None:
            self.resume(folder)
        while self.iteration < self.config.iterations:
            history.append(self.step())
            report(history[-1])
            last = self.iteration == self.config.iterations
            if folder is not None and (last or (save_every and self.iteration % save_every == 0)):
                self.save(folder)
        return history

    def evaluate(
        self, *, episodes: int, deterministic: bool, seed: int = 10_000, environment: EnvironmentConfig | None = None
    ) -> EvaluationResult:
        """Evaluate on complete episodes of the training task, or of an `environment` with the same spaces."""
        return evaluate(
            self.policy, self.normalizer, environment or self.config.environment, episodes=episodes,
            deterministic=deterministic, seed=seed,
        )  # fmt: skip

    def save(self, folder: Path) -> Path:
        """Write a checkpoint atomically, including the state of the running episodes."""
        temporary = folders.begin_checkpoint(folder, self.iteration)
        save_file(
            {name: item.detach() for name, item in self.policy.named_parameters()}, temporary / "model.safetensors"
        )
        save_nested_state(self.optimizer.state_dict(), temporary / "optimizer.safetensors")
        save_nested_state(self.collect.generator.get_state(), temporary / "generator.safetensors")
        state = {
            "environment": self.config.environment.id, "iteration": self.iteration, "steps": self.steps,
            "episodes": self.episodes, "recent": list(self.recent), "normalizer": self.normalizer.state_dict(),
            "update": self.algorithm.update.state_dict(), "environments": self.environments.state_dict(),
        }  # fmt: skip
        folders.write_json(temporary / "state.json", state)
        return folders.commit_checkpoint(temporary, keep_last=1)

    def resume(self, folder: Path) -> Path | None:
        """Resume exactly from the newest complete checkpoint of `folder`; return its path, or None if there is none.

        Raises:
            ValueError: The checkpoint has another task or network.
        """
        path = folders.latest_checkpoint(folder) if folder.is_dir() else None
        if path is None:
            return None
        state, weights = folders.read_json(path / "state.json"), load_file(path / "model.safetensors")
        parameters = dict(self.policy.named_parameters())
        shapes = {name: tuple(item.shape) for name, item in weights.items()}
        if state["environment"] != self.config.environment.id or shapes != {
            name: tuple(item.shape) for name, item in parameters.items()
        }:
            raise ValueError(
                f"{path} holds a policy for {state['environment']}, this run is one for {self.config.environment.id} "
                "or has other networks: its weights do not fit. Choose another folder."
            )
        self.environments.load_state_dict(state["environments"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict(_load_part(path, "optimizer"))
        self.collect.generator.set_state(_load_part(path, "generator"))
        self.normalizer.load_state_dict(state["normalizer"])
        self.algorithm.update.load_state_dict(state["update"])
        self.iteration, self.steps, self.episodes = state["iteration"], state["steps"], state["episodes"]
        self.recent.clear()
        self.recent.extend(state["recent"])
        return path

    def _anneal(self) -> None:
        factor = 1 - self.iteration / self.config.iterations if self.config.anneal else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor


def _make_policy(environments: Environments, config: ControlConfig) -> ControlPolicy:
    space = environments.action_space
    is_discrete = isinstance(space, gym.spaces.Discrete)
    size = int(space.n if is_discrete else space.shape[0])
    distribution = Categorical(size) if is_discrete else Gaussian(size)
    return ControlPolicy(
        environments.observations.shape[1], distribution, size, hidden=config.hidden, orthogonal=config.orthogonal
    )


def _load_part(path: Path, name: str) -> Any:
    """Load one part of a checkpoint; older versions wrote it by `torch.save`."""
    file = path / f"{name}.safetensors"
    return load_nested_state(file) if file.is_file() else torch.load(path / f"{name}.pt", weights_only=True)


def _minibatch_config(config: ControlConfig) -> MinibatchConfig:
    return MinibatchConfig(
        epochs=config.epochs, minibatch_size=config.minibatch_size, max_grad_norm=config.max_grad_norm,
        ratio_threshold=float("inf"),
    )  # fmt: skip
