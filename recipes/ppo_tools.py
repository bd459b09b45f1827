r"""Learn to use a tool: a tiny language model multiplies with a calculator, from nothing.

    python recipes/ppo_tools.py                  # two CPU minutes, one thread

(1) A Llama of 110,000 parameters with 20 tokens imitates transcripts of which three in four guess the product and one
asks the calculator; (2) PPO plays against the environment, and earns 1 for a right answer.
Left out: a pretrained model, a reference (no KL: nothing is worth staying close to), several processes.
Results: docs/results/tools.md.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import tyro
from torch.optim.lr_scheduler import LambdaLR

from games.calculator import Calculations, make_environment, problem
from games.play import imitate_random_play, tiny_llama
from rlhf_ppo import (
    GAE,
    AutoModelForCausalLMWithValueHead,
    Critic,
    PPOClip,
    PPOConfig,
    PPOTrainer,
    TrainConfig,
    set_seed,
)
from rlhf_ppo.environments import EpisodeConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the imitation, and of PPO."""

    output_dir: str = "runs/ppo_tools"
    """Folder of metrics and results."""
    seed: int = 0
    """Of everything that is drawn."""
    transcripts: int = 25000
    """Transcripts to imitate."""
    iterations: int = 30
    """Rollouts of PPO."""
    batch_size: int = 512
    """Episodes per rollout."""
    learning_rate: float = 1e-3
    """Of PPO; it rises over 10 iterations, then falls to 0 along a straight line."""
    problems: int = 3500
    """Training problems."""
    eval_problems: int = 500
    """Held-out problems."""


def make_trainer(config: Config) -> PPOTrainer:
    """A trainer of a tiny model that has learned the form of the transcripts."""
    game = Calculations(environment=object, secrets=[], words=[])  # type: ignore[arg-type]
    tokenizer = game.make_tokenizer()
    language_model = tiny_llama(len(tokenizer))
    imitate_random_play(language_model, tokenizer, game, games=config.transcripts, seed=config.seed)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(language_model)
    settings = PPOConfig(
        batch_size=config.batch_size, mini_batch_size=max(config.batch_size // 4, 1), ppo_epochs=3, init_kl_coef=0.0,
        kl_penalty="none", seed=config.seed,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1.0) * (1 - step / config.iterations))
    algorithm = PPOClip(ent_coef=0.003, gae=GAE(lam=0.95), critic=Critic(vf_coef=0.5))
    return PPOTrainer(settings, model, None, tokenizer, optimizer=optimizer, lr_scheduler=schedule, algorithm=algorithm)


def main(config: Config) -> dict[str, float]:
    """Train and evaluate; returns the shares of right answers and of episodes with a call, before and after."""
    torch.set_num_threads(1)
    set_seed(config.seed)
    start, generator = time.process_time(), random.Random(config.seed + 1)
    trainer = make_trainer(config)
    environment = make_environment(trainer.tokenizer)
    problems = {row["prompt"]: row for row in (problem(generator) for _ in range(20 * config.problems))}
    rows = list(problems.values())[: config.problems + config.eval_problems]
    held_out, prompts = (
        PromptDataset(datasets.Dataset.from_list(part), trainer.tokenizer)
        for part in (rows[: config.eval_problems], rows[config.eval_problems :])
    )
    sampling = SamplingConfig(max_new_tokens=10, stop_token_ids=(trainer.tokenizer.eos_token_id,))
    episodes = EpisodeConfig(max_turns=3, max_concurrency=1, timeout=None)

    def evaluate(name: str) -> dict[str, float]:
        played = trainer.evaluate(held_out, None, sampling, episodes=episodes, environment=environment).measures
        names = {"score": "right", "called_tool": "called_tool", "failed_calls": "failed_calls", "turns": "turns"}
        return {f"{name}/{own}": sum(played[key]) / len(played[key]) for key, own in names.items()}

    result = evaluate("before")
    loop = TrainConfig(
        iterations=config.iterations, sampling=sampling, episodes=episodes, output_dir=config.output_dir, resume=False
    )
    state = trainer.train(None, loop, prompts=prompts, environment=environment)
    result |= evaluate("after") | {"iterations": state.iteration, "cpu_seconds": time.process_time() - start}
    Path(config.output_dir, "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config)), indent=2))
