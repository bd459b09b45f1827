r"""Learn to walk: PPO, TRPO or REINFORCE on Gymnasium's tasks, by the functions that train the language models.

    python recipes/ppo_locomotion.py                                              # Hopper, a million steps
    python recipes/ppo_locomotion.py --env InvertedPendulum-v5 --total-steps 61440
    python recipes/ppo_locomotion.py --algorithm trpo --total-steps 300000
    python recipes/ppo_locomotion.py --randomization.mass 0.7 1.3 --randomization.friction 0.7 1.3

One process and one thread: the networks are small, and threads would wait for each other. An interrupted run goes on
where it stopped, in the middle of its episodes. Left out: networks for pictures, and a GPU, which would be slower here.
Results: docs/results/control.md.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, TypeAlias

import torch
import tyro

from locomotion.pictures import draw_frames, draw_learning_curve
from rlhf_ppo.control import (
    AlgorithmName,
    ControlConfig,
    ControlTrainer,
    EnvironmentConfig,
    Randomization,
    control_algorithm,
)
from rlhf_ppo.loop.run_folder import Estimates, RunFolder
from sentiment.command_line import Phases, open_run_folder, run
from sentiment.settings import at_least

RateByAlgorithm: TypeAlias = Annotated[
    float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 3e-4, of TRPO's critic 1e-3)")
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the locomotion recipe; the defaults are those of Schulman et al. (2017), in eight environments."""

    env: str = "Hopper-v5"
    """Gymnasium's name of a task with a vector of observations."""
    algorithm: AlgorithmName = "ppo-clip"
    """What is optimized."""
    output_dir: str = "runs/ppo_locomotion"
    """Run folder: checkpoint, metrics, evaluation, pictures."""
    seed: int = 0
    """Of everything that is drawn."""
    total_steps: int = 1_000_000
    """Environment steps."""
    environments: int = 8
    """Environments side by side."""
    rollout_steps: int = 256
    """Steps in each of them between two updates."""
    minibatch_size: int = 64
    """Steps of one optimizer step."""
    epochs: int = 10
    """Passes over a rollout; REINFORCE makes one."""
    learning_rate: RateByAlgorithm = None
    """At the start; it falls to 0 along a straight line."""
    gamma: float = 0.99
    """Discount."""
    lam: float = 0.95
    """λ of the advantage estimates."""
    clip_range: float = 0.2
    """ε of PPO-clip."""
    ent_coef: float = 0.0
    """Weight of the entropy."""
    normalize_observations: bool = True
    """Scale observations by running moments."""
    normalize_rewards: bool = True
    """Scale rewards by the spread of their discounted return."""
    max_episode_steps: int | None = None
    """Time limit of an episode; without one, that of the task."""
    randomization: Randomization = field(default_factory=Randomization)
    """Worlds that are drawn anew for every episode."""
    eval_episodes: int = 10
    """Episodes of each of the two evaluations after training."""
    frames: int = 0
    """Pictures of an episode side by side in frames.png; needs OpenGL."""
    save_every: int = 50
    """Iterations between two checkpoints."""
    fresh: bool = False
    """Ignore the checkpoint in the run folder."""

    def __post_init__(self) -> None:
        at_least(self, seed=0, eval_episodes=2, frames=0, save_every=0)


def main(config: Config) -> dict[str, Estimates]:
    """Train, evaluate, draw; returns mean and standard error of the evaluation's returns."""
    torch.set_num_threads(1)
    settings = json.loads(json.dumps(asdict(config)))
    trainer = ControlTrainer(
        ControlConfig(
            environment=EnvironmentConfig(
                id=config.env, randomization=config.randomization, max_episode_steps=config.max_episode_steps
            ),
            algorithm=control_algorithm(
                config.algorithm, gamma=config.gamma, lam=config.lam, clip_range=config.clip_range,
                ent_coef=config.ent_coef,
            ),
            total_steps=config.total_steps, environments=config.environments, rollout_steps=config.rollout_steps,
            minibatch_size=config.minibatch_size, epochs=config.epochs, seed=config.seed,
            learning_rate=config.learning_rate or (1e-3 if config.algorithm == "trpo" else 3e-4),
            normalize_observations=config.normalize_observations, normalize_rewards=config.normalize_rewards,
        )
    )  # fmt: skip
    folder = open_run_folder(config.output_dir, settings, fresh=config.fresh)
    phase = Phases(2)

    phase(f"{config.algorithm} on {config.env}, {trainer.config.iterations} iterations")
    if trainer.resume(folder.path) is not None:
        phase.say(f"going on after iteration {trainer.iteration}")
    folder.resume_from(trainer.iteration)

    def report(row: dict[str, float]) -> None:
        folder.append_metrics(int(row["iteration"]), row)
        if row["iteration"] % max(trainer.config.iterations // 20, 1) == 0:
            phase.say(f"  {row['steps']:>9.0f} steps: return {row['return/last_100']:.1f} (last 100 episodes)")

    trainer.train(folder.path, save_every=config.save_every, report=report)

    phase("evaluation, pictures")
    played = {
        name: trainer.evaluate(episodes=config.eval_episodes, deterministic=name == "deterministic")
        for name in ("deterministic", "stochastic")
    }
    for name, episodes in played.items():
        phase.say(f"  {name}: return {episodes.mean:.1f} ± {episodes.stderr:.1f} over {config.eval_episodes} episodes")
    folder.write_text("evaluation.json", json.dumps({name: asdict(item) for name, item in played.items()}, indent=2))
    phase.say(f"  {draw_learning_curve(folder, title=f'{config.algorithm} on {config.env}, seed {config.seed}')}")
    if config.frames:
        phase.say(f"  {_frames(trainer, folder, config.frames)}")
    return {name: {"return": (episodes.mean, episodes.stderr)} for name, episodes in played.items()}


def _frames(trainer: ControlTrainer, folder: RunFolder, count: int) -> str:
    try:
        return str(draw_frames(trainer, folder, count=count))
    except RuntimeError as error:  # no OpenGL: the run itself is done
        return str(error)


if __name__ == "__main__":
    run(main, Config, __doc__)
