"""Guess a number from 1 to 20: the environment, a tokenizer of its words, and the imitation of random play."""

import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_ppo.environments import Turn

HIGHEST, GUESSES = 20, 10


class GuessNumber:
    """The secret is one of 1 to 20; a guess costs 0.1, the right one earns 1."""

    def reset(self, secret: int) -> str:
        """Begin a game."""
        self.secret = secret
        return "guess"

    def step(self, reply: str) -> Turn:
        """Answer a guess."""
        guess = int(reply) if reply.isdigit() else None
        if guess == self.secret:
            return Turn(reward=0.9, terminated=True)
        return Turn("nonsense" if guess is None else "higher" if guess < self.secret else "lower", reward=-0.1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = ["<pad>", ".", "guess", "higher", "lower", "nonsense", *map(str, range(1, HIGHEST + 1))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=".")


def random_game(generator: random.Random) -> str:
    """The transcript of a game with random guesses."""
    game, text = GuessNumber(), "guess"
    game.reset(generator.randint(1, HIGHEST))
    for _ in range(GUESSES):
        guess = str(generator.randint(1, HIGHEST))
        turn = game.step(guess)
        text += f" {guess} . {turn.observation}"
        if turn.terminated:
            break
    return text


def imitate_random_play(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, games: int, seed: int) -> None:
    """Learn the form of the game: two epochs over transcripts of random play."""
    generator = random.Random(seed)
    texts = [random_game(generator) for _ in range(games)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in list(range(0, len(texts), 64)) * 2:
        batch = tokenizer(texts[start : start + 64], return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
