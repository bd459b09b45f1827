"""What the games have in common: their words, random play, and a language model that imitates it."""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_ppo.environments import EnvironmentFactory


@dataclass(frozen=True, kw_only=True)
class Game:
    """A game in which a secret is found by guesses, each of which is answered."""

    environment: EnvironmentFactory
    """`reset(secret)`, `step(guess)`."""
    secrets: list[str]
    """All secrets; every one of them is a guess, too."""
    words: list[str]
    """All words of secrets and answers."""
    guesses: int = 10
    """Maximum number of guesses."""

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word; "." ends a guess."""
        words = ["<pad>", ".", "guess", *self.words]
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
            text += f" {guess} . {turn.observation}"
            if turn.terminated:
                break
        return text


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    """Two layers of 64, 110,000 parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, max_position_embeddings=96, hidden_size=64, intermediate_size=192,
            num_hidden_layers=2, num_attention_heads=4,
        )
    )  # fmt: skip


def imitate_random_play(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, game: Game, *, games: int, seed: int
) -> None:
    """Learn the form of the game: two epochs over transcripts of random play."""
    generator = random.Random(seed)
    texts = [game.random_transcript(generator) for _ in range(games)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in list(range(0, len(texts), 64)) * 2:
        batch = tokenizer(texts[start : start + 64], return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
