r"""Learn to search: a tiny language model plays "guess a number", told higher or lower, from nothing.

    python recipes/ppo_guess_number.py                         # less than five CPU minutes, one thread
    python recipes/ppo_guess_number.py --algorithm ppo-turn    # credit a whole guess instead of its tokens
    python recipes/ppo_guess_number.py --game mastermind       # less than seven CPU minutes

(1) A Llama of 110,000 parameters with a vocabulary of 26 words learns the form of the game from random play, (2) PPO
plays against the environment. The best strategy, halving, needs 3.7 guesses on average over the 20 secrets.
Mastermind takes a wider model, which learns from random play what the secret may be (games/hindsight.py).
Left out: a pretrained model, a reference (no KL: nothing is worth staying close to), several processes.
Results: docs/results/environments.md.
"""

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from games.guess_number import guess_number
from games.hindsight import RandomPlay, imitate_in_hindsight
from games.mastermind import MASTERMIND
from games.play import Game, RunConfig, imitate, prompt_dataset, tiny_llama, train
from rlhf_ppo import GAE, GRPO, RLOO, AlgorithmConfig, Critic, PPOClip, PPOTrainer, ReinforcePlusPlus, set_seed
from rlhf_ppo.environments import EpisodeConfig
from rlhf_ppo.samplers.base import SamplingConfig

GAMES: dict[str, Game] = {"guess-number": guess_number(20), "guess-ten": guess_number(10), "mastermind": MASTERMIND}


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the game, of the imitation of random play, and of PPO."""

    game: Literal["guess-number", "guess-ten", "mastermind"] = "guess-number"
    """A number from 1 to 20, one from 1 to 10, or a code of three pegs in four colors."""
    algorithm: Literal["ppo", "ppo-turn", "reinforce++", "rloo", "grpo"] = "ppo"
    """What is optimized; "ppo-turn" estimates advantages over guesses instead of tokens."""
    output_dir: str = "runs/ppo_guess_number"
    transcripts: int = 4000
    tokens: int = 700_000
    ent_coef: float = 0.003
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the critic's loss."""
    lam: float = 0.8
    """λ of GAE."""
    group_size: int = 8
    """Episodes with the same secret, for RLOO and GRPO."""
    eval_games: int = 50
    """Sampled games per secret in the evaluation."""
    imitated: str | None = None
    """File of weights that have imitated random play, for runs that begin with the same; made if it is not there."""
    hidden_size: int = 64
    """Width of the model."""
    hindsight_batches: int = 0
    """Batches of random play whose labels are the secrets (one token a guess), instead of `transcripts`; 0: none."""


DEFAULTS: dict[str, Config] = {
    "guess-number": Config(), "guess-ten": Config(game="guess-ten"),
    "mastermind": Config(
        game="mastermind", output_dir="runs/ppo_mastermind", hidden_size=128, hindsight_batches=1000, tokens=250_000,
        learning_rate=3e-4, lam=0.95,
    ),
}  # fmt: skip
"""Settings of the games, unless the command line gives others."""


def check_flags(config: Config) -> None:
    """Raise ValueError for a setting that the chosen algorithm or imitation does not read."""
    has_critic, has_groups = config.algorithm.startswith("ppo"), config.algorithm in ("rloo", "grpo")
    is_read = {
        "lam": has_critic, "vf_coef": has_critic, "group_size": has_groups, "transcripts": not config.hindsight_batches,
    }  # fmt: skip
    for name, read in is_read.items():
        if not read and getattr(config, name) != getattr(DEFAULTS[config.game], name):
            raise ValueError(
                f"{name}={getattr(config, name)} is not read with algorithm={config.algorithm!r} and "
                f"hindsight_batches={config.hindsight_batches}: it would change nothing. Leave it out."
            )


def algorithm(config: Config) -> AlgorithmConfig:
    """The algorithm's settings."""
    if config.algorithm in ("ppo", "ppo-turn"):
        unit: Literal["token", "turn"] = "turn" if config.algorithm == "ppo-turn" else "token"
        critic = Critic(vf_coef=config.vf_coef, clip_range_value=None)
        return PPOClip(ent_coef=config.ent_coef, gae=GAE(lam=config.lam, unit=unit), critic=critic)
    others: dict[str, type[ReinforcePlusPlus | RLOO | GRPO]] = {
        "reinforce++": ReinforcePlusPlus, "rloo": RLOO, "grpo": GRPO,
    }  # fmt: skip
    return others[config.algorithm](ent_coef=config.ent_coef)


def make_policy(config: Config, game: Game, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A tiny model that has learned the form of the game."""
    model = tiny_llama(len(tokenizer), config.hidden_size)
    if config.imitated is not None and Path(config.imitated).is_file():
        model.load_state_dict(torch.load(config.imitated))
        return model
    if config.imitated is not None:  # a folder that cannot be made is not worth minutes of imitation
        Path(config.imitated).parent.mkdir(parents=True, exist_ok=True)
    if config.hindsight_batches:
        play = RandomPlay(game, tokenizer, config.seed)
        loss, ideal_loss = imitate_in_hindsight(model, play, batches=config.hindsight_batches)
        print(f"imitation in hindsight: loss {loss:.3f}, ideally {ideal_loss:.3f}")
    else:
        generator = random.Random(config.seed)
        imitate(model, tokenizer, [game.random_transcript(generator) for _ in range(config.transcripts)])
    if config.imitated is not None:
        torch.save(model.state_dict(), config.imitated)
    return model


def main(config: Config) -> dict[str, float]:
    """Train and evaluate; returns mean guesses, greedy and sampled, before and after."""
    torch.set_num_threads(1)
    set_seed(config.seed)
    start, game = time.process_time(), GAMES[config.game]
    tokenizer = game.make_tokenizer()
    rows = [{"prompt": "guess", "secret": secret} for secret in game.secrets]
    prompts, many = prompt_dataset(rows, tokenizer), prompt_dataset(rows * config.eval_games, tokenizer)
    sampling = SamplingConfig(
        max_new_tokens=1 + bool(game.end), stop_token_ids=(tokenizer.eos_token_id,),
        num_return_sequences=config.group_size if config.algorithm in ("rloo", "grpo") else 1,
    )  # fmt: skip
    episodes = EpisodeConfig(max_turns=game.guesses, max_concurrency=1, timeout=None)

    def mean_guesses(trainer: PPOTrainer) -> dict[str, float]:
        results = {}
        for kind, games in (("greedy", prompts), ("sampled", many)):
            how = replace(sampling, do_sample=kind == "sampled")
            played = trainer.evaluate(games, None, how, episodes=episodes, environment=game.environment)
            turns = played.measures["turns"]
            results[kind] = sum(turns) / len(turns)
        return results

    return train(
        config, make_policy(config, game, tokenizer), tokenizer, algorithm(config), mean_guesses, start=start,
        prompts=prompts, environment=game.environment, sampling=sampling, episodes=episodes,
    )  # fmt: skip


if __name__ == "__main__":
    given, _ = tyro.cli(Config, add_help=False, return_unknown_args=True)
    chosen = tyro.cli(Config, default=DEFAULTS[given.game])
    check_flags(chosen)
    print(json.dumps(main(chosen), indent=2))
