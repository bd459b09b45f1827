r"""Learn to work out sums without slips, from a verifiable reward.

    python recipes/ppo_reasoning.py                             # one CPU minute, one thread
    python recipes/ppo_reasoning.py --family chain_sum          # problems of reasoning-gym (pip install reasoning-gym)
    python recipes/ppo_reasoning.py --policy smollm2-135m --tokens 20000 --batch-size 64 --learning-rate 2e-4

(1) A Llama of 110,000 parameters imitates solutions, step by step, of a teacher who slips in three of ten steps; or
SmolLM2-135M-Instruct, from a package, gets LoRA adapters. (2) PPO earns 1 for the right number at the end of a reply.
Reported are accuracy and pass@k on problems that neither phase has seen.
Left out: a reference (no KL: nothing is worth staying close to), several processes. Results: docs/results/reasoning.md.
"""

import json
import random
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import numpy as np
import torch
import tyro
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from games.play import RunConfig, imitate, prompt_dataset, tiny_llama, train
from games.sums import Expressions, Sums, make_tokenizer, worked
from rlhf_ppo import GAE, Critic, PPOClip, PPOTrainer, set_seed
from rlhf_ppo.environments import EpisodeConfig
from rlhf_ppo.environments.adapters import from_reasoning_gym
from rlhf_ppo.samplers.base import SamplingConfig
from sentiment.language_models import smollm2_folder


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the problems, of the policy, and of PPO."""

    family: str = "sums"
    """Problems: "sums", which are built in, or a family of reasoning-gym whose problems are sums, such as chain_sum."""
    policy: Literal["tiny", "smollm2-135m"] = "tiny"
    """Model to train."""
    output_dir: str = "runs/ppo_reasoning"
    transcripts: int = 30_000
    tokens: int = 60_000
    batch_size: int = 256
    slips: float = 0.3
    """Share of the teacher's steps that are wrong."""
    problems: int = 1000
    """Training problems."""
    eval_problems: int = 150
    """Held-out problems."""
    k: int = 8
    """Replies to each held-out problem; pass@k asks whether any of them is right."""
    max_new_tokens: int = 12
    """Maximum length of a reply."""
    lora_rank: int = 16
    """Rank of the LoRA adapters of SmolLM2."""


def make_problems(config: Config, size: int) -> Expressions:
    """The data set, in the interface of reasoning-gym."""
    if config.family == "sums":
        return Expressions(Sums(size=size, seed=config.seed))
    try:
        reasoning_gym = import_module("reasoning_gym")
    except ImportError as error:
        raise SystemExit(
            f'--family {config.family} needs reasoning-gym: pip install reasoning-gym. "sums" is built in.'
        ) from error
    return Expressions(reasoning_gym.create_dataset(config.family, size=size, seed=config.seed))


def tiny_policy(config: Config, questions: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tiny model that works sums out as the teacher does, and its tokenizer."""
    tokenizer, generator = make_tokenizer(), random.Random(config.seed)
    model = tiny_llama(len(tokenizer))
    asked = generator.choices(questions, k=config.transcripts)
    imitate(model, tokenizer, [f"{question}{worked(question, generator, config.slips)}." for question in asked])
    return model, tokenizer


def smollm2_policy(config: Config) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct with LoRA adapters, and its tokenizer."""
    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
    return get_peft_model(model, adapters), AutoTokenizer.from_pretrained(folder)


def main(config: Config) -> dict[str, float]:
    """Train and evaluate; returns accuracy and pass@k on held-out problems, before and after."""
    torch.set_num_threads(1)
    set_seed(config.seed)
    start = time.process_time()
    problems = make_problems(config, config.problems + config.eval_problems)
    questions = [problems[index]["question"] for index in range(len(problems))]
    seen = set(questions[: config.problems])
    held_out = [index for index in range(config.problems, len(problems)) if questions[index] not in seen]
    model, tokenizer = tiny_policy(config, sorted(seen)) if config.policy == "tiny" else smollm2_policy(config)
    rows = [{"prompt": question, "index": str(index)} for index, question in enumerate(questions)]
    prompts = prompt_dataset(rows[: config.problems], tokenizer)
    tests = prompt_dataset([rows[index] for index in held_out] * config.k, tokenizer)
    environment = from_reasoning_gym(problems, chat=False, answer_of=lambda reply: reply.strip().rpartition("=")[2])
    sampling = SamplingConfig(max_new_tokens=config.max_new_tokens, stop_token_ids=(tokenizer.eos_token_id,))
    episodes = EpisodeConfig(max_concurrency=1, timeout=None)

    def evaluate(trainer: PPOTrainer) -> dict[str, float]:
        played = trainer.evaluate(tests, None, sampling, episodes=episodes, environment=environment)
        solved = np.array(played.measures["solved"]).reshape(config.k, len(held_out))
        share = solved.mean(0)
        return {
            "accuracy": share.mean(), "stderr": share.std(ddof=1) / len(share) ** 0.5,
            f"pass@{config.k}": solved.max(0).mean(),
        }  # fmt: skip

    algorithm = PPOClip(ent_coef=0.003, gae=GAE(lam=0.95), critic=Critic(vf_coef=0.5))
    return train(
        config, model, tokenizer, algorithm, evaluate, start=start, prompts=prompts, environment=environment,
        sampling=sampling, episodes=episodes,
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config)), indent=2))
