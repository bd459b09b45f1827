"""The measured runs behind docs/results/control.md: one JSON file each, made once, in the order of their worth.

    python tests/benchmarks/control.py --list
    python tests/benchmarks/control.py                    # everything that is not there yet
    python tests/benchmarks/control.py hopper-clip-0      # these alone
    python docs/results/collect_control.py                # the page from the files

One process, one thread. The runs `sb3-*` need stable-baselines3 and sb3-contrib, which nothing else here uses.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rlhf_ppo.algorithms import GAE, AlgorithmConfig, Critic, PPOClip
from rlhf_ppo.control import (
    ControlConfig,
    ControlTrainer,
    EnvironmentConfig,
    EvaluationResult,
    Randomization,
    control_algorithm,
)

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "control"
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "sb3-contrib")
WORLDS = Randomization(mass=(0.7, 1.3), friction=(0.7, 1.3), motor=(0.8, 1.2), sensor_noise=0.01)
SHIFTS = {
    "as in training without randomization": Randomization(),
    "mass x 1.4": Randomization(mass=(1.4, 1.4)),
    "mass x 0.6": Randomization(mass=(0.6, 0.6)),
    "friction x 0.5": Randomization(friction=(0.5, 0.5)),
    "motor x 0.7": Randomization(motor=(0.7, 0.7)),
    "mass x 1.4, friction x 0.5, motor x 0.7": Randomization(mass=(1.4, 1.4), friction=(0.5, 0.5), motor=(0.7, 0.7)),
}
NO_CLIP = PPOClip(
    clip_low=0.999999, clip_high=1e6, gae=GAE(gamma=0.99), critic=Critic(vf_coef=0.5, clip_range_value=None)
)
VALUE_CLIP = PPOClip(gae=GAE(gamma=0.99), critic=Critic(vf_coef=0.5, clip_range_value=0.2))


@dataclass(frozen=True)
class Run:
    """One file of docs/results/control."""

    name: str
    config: ControlConfig
    library: str = "rlhf_ppo"
    group: str = "figures"
    shifts: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def settings(env: str, steps: int, algorithm: str | AlgorithmConfig = "ppo-clip", **changes: Any) -> ControlConfig:
    config = control_algorithm(algorithm) if isinstance(algorithm, str) else algorithm  # type: ignore[arg-type]
    return ControlConfig(environment=EnvironmentConfig(id=env), total_steps=steps, algorithm=config, **changes)


def seeds(name: str, config: ControlConfig, count: int = 3, **extras: Any) -> Iterator[Run]:
    for seed in range(count):
        yield Run(f"{name}-{seed}", replace(config, seed=seed), **extras)


def ablations(name: str, base: ControlConfig, chosen: int = 99) -> Iterator[Run]:
    """One thing changed each; the first `chosen` of them."""
    variants: dict[str, ControlConfig] = {
        "clip": base,
        "no-clip": replace(base, algorithm=NO_CLIP),
        "penalty": replace(base, algorithm=control_algorithm("ppo-penalty")),
        "without-observation-normalization": replace(base, normalize_observations=False),
        "without-reward-scaling": replace(base, normalize_rewards=False),
        "without-orthogonal-initialization": replace(base, orthogonal=False),
        "without-annealing": replace(base, anneal=False),
        "with-value-clipping": replace(base, algorithm=VALUE_CLIP),
        "without-gradient-clipping": replace(base, max_grad_norm=None),
        "with-adam-epsilon-1e-8": replace(base, adam_epsilon=1e-8),
        "reinforce": replace(base, algorithm=control_algorithm("reinforce")),
    }
    for variant, config in list(variants.items())[:chosen]:
        yield Run(f"ablation-{name}-{variant}-{base.seed}", config, group=f"ablation-{name}")


def runs() -> list[Run]:
    trpo: dict[str, Any] = {"algorithm": "trpo", "learning_rate": 1e-3}  # the rate is the critic's alone
    pendulum, hopper = settings("InvertedPendulum-v5", 61_440), settings("Hopper-v5", 1_000_000)
    randomized = replace(hopper, environment=EnvironmentConfig(id="Hopper-v5", randomization=WORLDS))
    cartpole = settings(
        "CartPole-v1", 102_400, learning_rate=1e-3, normalize_observations=False, normalize_rewards=False
    )
    walker, cheetah = settings("Walker2d-v5", 1_000_000), settings("HalfCheetah-v5", 1_000_000)
    trpo_hopper, short_hopper = settings("Hopper-v5", 300_000, **trpo), settings("Hopper-v5", 300_000)
    walkers, cheetahs = list(seeds("walker-clip", walker)), list(seeds("cheetah-clip", cheetah))
    theirs = list(seeds("sb3-hopper-clip", hopper, library="sb3"))
    shortest = settings("Hopper-v5", 102_400)
    speed = (
        seeds("speed-ours", shortest, group="speed"),
        seeds("speed-sb3", shortest, group="speed", library="sb3"),
    )
    worlds = list(seeds("hopper-randomized", randomized, shifts=True, group="randomization"))
    return [
        *seeds("pendulum-clip", pendulum),
        *seeds("pendulum-trpo", settings("InvertedPendulum-v5", 61_440, **trpo)),
        *seeds("cartpole-clip", cartpole),
        *seeds("hopper-clip", hopper, shifts=True),
        *seeds("hopper-trpo", trpo_hopper),
        *walkers,
        cheetahs[0],
        *(run for pair in zip(*speed, strict=True) for run in pair),
        *ablations("pendulum", pendulum),
        *worlds,
        *cheetahs[1:],
        theirs[0],
        *(run for seed in (1, 2) for run in ablations("pendulum", replace(pendulum, seed=seed))),
        *ablations("hopper", short_hopper, 7),
        *seeds("sb3-hopper-trpo", trpo_hopper, library="sb3"),
        *(run for seed in (1, 2) for run in ablations("hopper", replace(short_hopper, seed=seed), 7)),
        *theirs[1:],
        *seeds("sb3-walker-clip", walker, library="sb3"),
        *seeds("sb3-cheetah-clip", cheetah, library="sb3"),
    ]


def measure(run: Run) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = _with_sb3(run) if run.library == "sb3" else _with_ours(run)
    return {
        "name": run.name, "group": run.group, "library": run.library, "config": asdict(run.config),
        "algorithm": type(run.config.algorithm).__name__, "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "rlhf_ppo")), "versions": _versions(),
        "machine": platform.machine(),
        **found,
    }  # fmt: skip


def _with_ours(run: Run) -> dict[str, Any]:
    trainer = ControlTrainer(run.config)
    curve: list[tuple[int, float]] = []
    kept: dict[str, list[float]] = {"policy/approxkl": [], "policy/clipfrac": [], "policy/accepted": []}
    start = time.process_time()
    while trainer.iteration < run.config.iterations:
        row = trainer.step()
        if trainer.iteration % max(run.config.iterations // 50, 1) == 0:
            curve.append((trainer.steps, round(row["return/last_20"], 2)))
        for name, values in kept.items():
            if name in row:
                values.append(row[name])
    seconds = time.process_time() - start
    found = {
        "steps": trainer.steps, "episodes": trainer.episodes, "cpu_seconds": round(seconds, 1),
        "steps_per_cpu_second": round(trainer.steps / seconds), "curve": curve,
        "last_100": float(np.mean(trainer.recent)), "last_20": float(np.mean(list(trainer.recent)[-20:])),
        "deterministic": _summary(trainer.evaluate(episodes=10, deterministic=True)),
        "stochastic": _summary(trainer.evaluate(episodes=10, deterministic=False)),
        "means": {name: float(np.mean(values)) for name, values in kept.items() if values},
        "largest": {name: float(np.max(values)) for name, values in kept.items() if values},
    }  # fmt: skip
    if run.shifts:
        found["shifts"] = {
            name: _summary(
                trainer.evaluate(
                    episodes=20, deterministic=True, environment=replace(run.config.environment, randomization=world)
                )
            )
            for name, world in SHIFTS.items()
        }
    return found


def _with_sb3(run: Run) -> dict[str, Any]:
    from sb3_contrib import TRPO as TheirTRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    config = run.config
    env = VecNormalize(make_vec_env(config.environment.id, n_envs=config.environments, seed=config.seed), gamma=0.99)
    common: dict[str, Any] = {"n_steps": config.rollout_steps, "seed": config.seed, "device": "cpu"}
    if type(config.algorithm).__name__ == "TRPO":
        model: Any = TheirTRPO("MlpPolicy", env, learning_rate=config.learning_rate, target_kl=0.01, **common)
    else:
        model = PPO(
            "MlpPolicy", env, learning_rate=lambda left: config.learning_rate * left, batch_size=config.minibatch_size,
            n_epochs=config.epochs, policy_kwargs={"optimizer_kwargs": {"eps": config.adam_epsilon}}, **common,
        )  # fmt: skip
    curve: list[tuple[int, float]] = []

    class Curve(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if self.num_timesteps // config.batch_size % max(config.iterations // 50, 1) == 0:
                recent = [info["r"] for info in self.model.ep_info_buffer][-20:]
                curve.append((self.num_timesteps, round(float(np.mean(recent)), 2)))

    start = time.process_time()
    model.learn(config.iterations * config.batch_size, callback=Curve())
    seconds = time.process_time() - start
    recent = [info["r"] for info in model.ep_info_buffer]
    env.training = False
    return {
        "steps": model.num_timesteps, "cpu_seconds": round(seconds, 1), "curve": curve,
        "steps_per_cpu_second": round(model.num_timesteps / seconds), "last_100": float(np.mean(recent)),
        "last_20": float(np.mean(recent[-20:])), "deterministic": _summary(_their_episodes(model, env, True)),
        "stochastic": _summary(_their_episodes(model, env, False)),
    }  # fmt: skip


def _their_episodes(model: Any, normalizer: Any, deterministic: bool) -> EvaluationResult:
    returns, lengths = [], []
    env = gym.make(normalizer.venv.envs[0].spec.id)
    for seed in range(10):
        observation, _ = env.reset(seed=10_000 + seed)
        total, length, done = 0.0, 0, False
        while not done:
            action, _ = model.predict(normalizer.normalize_obs(observation), deterministic=deterministic)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, length, done = total + float(reward), length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    return EvaluationResult(returns=returns, lengths=lengths)


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[2]
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=folder).stdout.strip()


def _summary(episodes: EvaluationResult) -> dict[str, Any]:
    return {
        "mean": episodes.mean,
        "stderr": episodes.stderr,
        "returns": [round(value, 1) for value in episodes.returns],
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="run these alone, again if they are there")
    parser.add_argument("--list", action="store_true", help="only say which runs there are")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    options = parser.parse_args()
    chosen = [run for run in runs() if not options.names or run.name in options.names]
    options.out.mkdir(parents=True, exist_ok=True)
    for run in chosen:
        path = options.out / f"{run.name}.json"
        if options.list:
            print(f"{run.name}{'' if path.is_file() else '   (missing)'}")
        elif options.names or not path.is_file():
            found = measure(run)
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(found, indent=1) + "\n")
            aside.rename(path)
            print(
                f"{run.name}: last 100 {found['last_100']:.0f}, deterministic {found['deterministic']['mean']:.0f}, "
                f"{found['steps_per_cpu_second']} steps per CPU second",
                flush=True,
            )


if __name__ == "__main__":
    main()
