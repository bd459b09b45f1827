r"""Learn to search: a tiny language model plays "guess a number", told higher or lower, from nothing.

    python recipes/ppo_guess_number.py                         # less than five CPU minutes, one thread
    python recipes/ppo_guess_number.py --algorithm ppo-turn    # credit a whole guess instead of its tokens
    python recipes/ppo_guess_number.py --game mastermind --iterations 400

(1) A Llama of 110,000 parameters with a vocabulary of 26 words learns the form of the game from random play, (2) PPO
plays against the environment. The best strategy, halving, needs 3.7 guesses on average over the 20 secrets.
Left out: a pretrained model, a reference (no KL: nothing is worth staying close to), several processes.
Results: docs/results/environments.md.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import datasets
import torch
import tyro
from torch.optim.lr_scheduler import LambdaLR

from games.guess_number import GUESS_NUMBER
from games.mastermind import MASTERMIND
from games.play import Game, imitate_random_play, tiny_llama
from rlhf_ppo import (
    GAE,
    GRPO,
    RLOO,
    AlgorithmConfig,
    AutoModelForCausalLMWithValueHead,
    Critic,
    PPOClip,
    PPOConfig,
    PPOTrainer,
    ReinforcePlusPlus,
    TrainConfig,
    set_seed,
)
from rlhf_ppo.environments import EpisodeConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig

GAMES: dict[str, Game] = {"guess-number": GUESS_NUMBER, "mastermind": MASTERMIND}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the game, of the imitation of random play, and of PPO."""

    game: Literal["guess-number", "mastermind"] = "guess-number"
    """A number from 1 to 20, or a code of three pegs in four colors."""
    algorithm: Literal["ppo", "ppo-turn", "reinforce++", "rloo", "grpo"] = "ppo"
    """What is optimized; "ppo-turn" estimates advantages over guesses instead of tokens."""
    output_dir: str = "runs/ppo_guess_number"
    """Folder of metrics and results."""
    seed: int = 0
    """Of everything that is drawn."""
    random_games: int = 4000
    """Transcripts of random play to learn the form from."""
    iterations: int = 150
    """Rollouts of PPO."""
    batch_size: int = 512
    """Episodes per rollout."""
    learning_rate: float = 1e-3
    """Of PPO; it rises over 10 iterations, then falls to 0 along a straight line."""
    group_size: int = 8
    """Episodes with the same secret, for RLOO and GRPO."""
    eval_games: int = 50
    """Sampled games per secret in the evaluation."""


def algorithm(config: Config) -> AlgorithmConfig:
    """The algorithm's settings."""
    if config.algorithm in ("ppo", "ppo-turn"):
        unit: Literal["token", "turn"] = "turn" if config.algorithm == "ppo-turn" else "token"
        return PPOClip(ent_coef=0.003, gae=GAE(lam=0.8, unit=unit), critic=Critic(vf_coef=0.5))
    others: dict[str, type[ReinforcePlusPlus | RLOO | GRPO]] = {
        "reinforce++": ReinforcePlusPlus, "rloo": RLOO, "grpo": GRPO,
    }  # fmt: skip
    return others[config.algorithm](ent_coef=0.003)


def make_trainer(config: Config, game: Game) -> PPOTrainer:
    """A trainer of a tiny model that has learned the form of the game."""
    tokenizer = game.make_tokenizer()
    language_model = tiny_llama(len(tokenizer))
    imitate_random_play(language_model, tokenizer, game, games=config.random_games, seed=config.seed)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(language_model)
    settings = PPOConfig(
        batch_size=config.batch_size, mini_batch_size=max(config.batch_size // 4, 1), ppo_epochs=3, init_kl_coef=0.0,
        kl_penalty="none", seed=config.seed,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1.0) * (1 - step / config.iterations))
    return PPOTrainer(
        settings, model, None, tokenizer, optimizer=optimizer, lr_scheduler=schedule, algorithm=algorithm(config)
    )


def main(config: Config) -> dict[str, float]:
    """Train and evaluate; returns mean guesses, greedy and sampled, before and after."""
    torch.set_num_threads(1)
    set_seed(config.seed)
    start, game = time.process_time(), GAMES[config.game]
    trainer = make_trainer(config, game)
    rows = [{"prompt": "guess", "secret": secret} for secret in game.secrets]
    prompts = PromptDataset(datasets.Dataset.from_list(rows), trainer.tokenizer)
    many = PromptDataset(datasets.Dataset.from_list(rows * config.eval_games), trainer.tokenizer)
    group = config.group_size if config.algorithm in ("rloo", "grpo") else 1
    sampling = SamplingConfig(
        max_new_tokens=len(game.secrets[0].split()) + 1, stop_token_ids=(trainer.tokenizer.eos_token_id,),
        num_return_sequences=group,
    )  # fmt: skip
    episodes = EpisodeConfig(max_turns=game.guesses, max_concurrency=1, timeout=None)

    def guesses(name: str) -> dict[str, float]:
        results = {}
        for kind, games in (("greedy", prompts), ("sampled", many)):
            how = replace(sampling, do_sample=kind == "sampled")
            played = trainer.evaluate(games, None, how, episodes=episodes, environment=game.environment)
            turns = played.measures["turns"]
            results[f"{name}/{kind}"] = sum(turns) / len(turns)
        return results

    result = guesses("before")
    loop = TrainConfig(
        iterations=config.iterations, sampling=sampling, episodes=episodes, output_dir=config.output_dir, resume=False
    )
    state = trainer.train(None, loop, prompts=prompts, environment=game.environment)
    result |= guesses("after") | {"iterations": state.iteration, "cpu_seconds": time.process_time() - start}
    Path(config.output_dir, "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config)), indent=2))
