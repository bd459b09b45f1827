"""What the game recipes share: a tiny language model, its imitation of transcripts, and a run of PPO."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_ppo import AlgorithmConfig, AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.environments import EnvironmentFactory
from rlhf_ppo.loop.config import TrainState
from rlhf_ppo.rollout.prompts import PromptDataset


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of the imitation of transcripts, and of PPO."""

    output_dir: str
    """Folder of metrics and results."""
    seed: int = 0
    """Random seed."""
    transcripts: int
    """Number of transcripts to imitate."""
    tokens: int
    """Number of tokens that PPO samples on each process before it ends."""
    batch_size: int = 512
    """Episodes per rollout, on each process."""
    mini_batch_size: int = 128
    """Episodes per optimizer step of PPO, on each process."""
    learning_rate: float = 1e-3
    """Learning rate of PPO; it rises over 10 iterations, then falls linearly to 0 with the sampled tokens."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """A game in which a secret is found by guesses, each of which is answered."""

    environment: EnvironmentFactory
    """`reset(secret)`, `step(guess)`."""
    secrets: list[str]
    """All secrets, each a word; every one of them is a guess, too."""
    answers: list[str]
    """All words of the answers."""
    guesses: int = 10
    """Maximum number of guesses."""
    end: str = " ."
    """Token that ends a guess; "": a guess is one token."""

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word."""
        words = ["<pad>", ".", "guess", *self.answers, *self.secrets]
        tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=".")

    def random_transcript(self, generator: random.Random) -> str:
        """A game with random guesses."""
        environment = self.environment()
        text = str(environment.reset(secret=generator.choice(self.secrets)))
        for _ in range(self.guesses):
            guess = generator.choice(self.secrets)
            turn = environment.step(guess)
            text += f" {guess}{self.end} {turn.observation}"
            if turn.terminated:
                break
        return text


def tiny_llama(vocab_size: int, hidden_size: int = 64) -> LlamaForCausalLM:
    """Two layers: 110,000 parameters with a width of 64, 450,000 with 128."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, max_position_embeddings=96, hidden_size=hidden_size,
            intermediate_size=3 * hidden_size, num_hidden_layers=2, num_attention_heads=4,
        )
    )  # fmt: skip


def imitate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, transcripts: Sequence[str]) -> None:
    """Learn the form of transcripts: two epochs of supervised fine-tuning."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in list(range(0, len(transcripts), 64)) * 2:
        batch = tokenizer(transcripts[start : start + 64], return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prompt_dataset(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
    """Prompts whose columns go to the environment's `reset`."""
    return PromptDataset(datasets.Dataset.from_list(rows), tokenizer)


@dataclass
class TokenBudget:
    """Callback of the trainer that ends the run after a number of sampled tokens."""

    config: RunConfig
    used: float = 0.0

    def __call__(self, _: object, state: TrainState) -> bool:
        self.used += state.metrics["env/sampled_tokens"] * self.config.batch_size
        return self.used >= self.config.tokens

    def learning_rate_factor(self, step: int) -> float:
        """10 iterations of warm-up, then a straight line to 0 at the last token."""
        return min((step + 1) / 10, 1.0) * max(1 - self.used / self.config.tokens, 0.0)


def train(
    config: RunConfig,
    language_model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    algorithm: AlgorithmConfig,
    evaluate: Callable[[PPOTrainer], dict[str, float]],
    *,
    start: float,
    **arguments: Any,
) -> dict[str, float]:
    """Train without a reference model; return, and write, what `evaluate` finds before and after.

    Args:
        evaluate: Called with the trainer.
        start: CPU seconds of the process when the recipe began.
        arguments: Prompts and environment of `PPOTrainer.train`; sampling and limits of its `TrainConfig`.
    """
    model = AutoModelForCausalLMWithValueHead.from_pretrained(language_model)
    settings = PPOConfig(
        batch_size=config.batch_size, mini_batch_size=config.mini_batch_size, ppo_epochs=3, init_kl_coef=0.0,
        kl_penalty="none", seed=config.seed,
    )  # fmt: skip
    budget = TokenBudget(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = LambdaLR(optimizer, budget.learning_rate_factor)
    trainer = PPOTrainer(
        settings, model, None, tokenizer, optimizer=optimizer, lr_scheduler=schedule, algorithm=algorithm
    )
    imitation_seconds = time.process_time() - start
    result = {f"before/{name}": value for name, value in evaluate(trainer).items()}
    loop = TrainConfig(
        iterations=max(config.tokens // config.batch_size, 1), sampling=arguments.pop("sampling"),
        episodes=arguments.pop("episodes"), output_dir=config.output_dir, resume=False,
    )  # fmt: skip
    state = trainer.train(None, loop, callbacks=[budget], **arguments)
    if state.interrupted:
        raise SystemExit(f"stopped by {state.stopped} after {budget.used:.0f} of {config.tokens} tokens: no result")
    result |= {f"after/{name}": value for name, value in evaluate(trainer).items()}
    result |= {"iterations": state.iteration, "tokens": budget.used}
    result |= {"imitation_seconds": imitation_seconds, "cpu_seconds": time.process_time() - start}
    Path(config.output_dir, "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result
