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

import torch
import tyro

from games.calculator import make_environment, make_tokenizer, problem, transcript
from games.play import RunConfig, imitate, prompt_dataset, tiny_llama, train
from rlhf_ppo import GAE, Critic, PPOClip, PPOTrainer, set_seed
from rlhf_ppo.environments import EpisodeConfig
from rlhf_ppo.samplers.base import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the imitation, and of PPO."""

    output_dir: str = "runs/ppo_tools"
    transcripts: int = 40_000
    tokens: int = 240_000
    learning_rate: float = 5e-4
    problems: int = 3500
    """Training problems."""
    eval_problems: int = 500
    """Held-out problems."""


def main(config: Config) -> dict[str, float]:
    """Train and evaluate; returns the shares of right answers and of episodes with a call, before and after."""
    torch.set_num_threads(1)
    set_seed(config.seed)
    start, generator = time.process_time(), random.Random(config.seed + 1)
    tokenizer = make_tokenizer()
    problems = {row["prompt"]: row for row in (problem(generator) for _ in range(20 * config.problems))}
    rows = list(problems.values())[: config.problems + config.eval_problems]
    held_out, prompts = (
        prompt_dataset(part, tokenizer) for part in (rows[: config.eval_problems], rows[config.eval_problems :])
    )
    environment = make_environment(tokenizer)
    policy, generator = tiny_llama(len(tokenizer)), random.Random(config.seed)
    imitate(policy, tokenizer, [transcript(generator) for _ in range(config.transcripts)])
    algorithm = PPOClip(ent_coef=0.003, gae=GAE(lam=0.95), critic=Critic(vf_coef=0.5))
    sampling = SamplingConfig(max_new_tokens=10, stop_token_ids=(tokenizer.eos_token_id,))
    episodes = EpisodeConfig(max_turns=3, max_concurrency=1, timeout=None)

    def evaluate(trainer: PPOTrainer) -> dict[str, float]:
        played = trainer.evaluate(held_out, None, sampling, episodes=episodes, environment=environment).measures
        names = {"score": "right", "called_tool": "called_tool", "failed_calls": "failed_calls", "turns": "turns"}
        return {own: sum(played[key]) / len(played[key]) for key, own in names.items()}

    return train(
        config, policy, tokenizer, algorithm, evaluate, start=start, prompts=prompts, environment=environment,
        sampling=sampling, episodes=episodes,
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config)), indent=2))
