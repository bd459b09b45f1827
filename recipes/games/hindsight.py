"""Imitation in hindsight: when a game of random guesses is over, the guess that would have won is known for every turn.

It is the secret, which takes the place of the random guess as the label (hindsight relabeling, Andrychowicz et al.
2017). The best prediction is p(secret | guesses and answers so far), uniform over the secrets that fit all answers.
"""

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from games.play import Game


class Games(NamedTuple):
    """Games of random guesses."""

    input_ids: Tensor
    """[games, 2 guesses + 1]: the opening, then guesses and answers by turns."""
    labels: Tensor
    """[games, guesses + 1]: the secret, wherever a guess is due; -100 after the secret was guessed."""
    possible: Tensor
    """[games, guesses + 1]: number of secrets that fit all answers so far."""

    @property
    def ideal_loss(self) -> float:
        """Cross-entropy of the best prediction: the mean logarithm of the number of possible secrets."""
        return float(self.possible[self.labels != -100].log().mean())


class RandomPlay:
    """Random guesses, answered from a table; guesses and answers are one token each.

    Args:
        game: The game; it is asked once for each pair of guess and secret.
    """

    def __init__(self, game: Game, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        if game.end:
            raise ValueError(f"expected guesses of one token, got ones that end with {game.end!r}: use transcripts")
        environment = game.environment()

        def answer(guess: str, secret: str) -> int:
            environment.reset(secret=secret)
            return int(tokenizer.encode(str(environment.step(guess).observation) or tokenizer.pad_token)[0])

        answers = [answer(guess, secret) for guess, secret in product(game.secrets, repeat=2)]
        self.answers = torch.tensor(answers).view(len(game.secrets), -1)
        self.codes = torch.tensor(tokenizer.convert_tokens_to_ids(game.secrets))
        self.opening = tokenizer.encode(str(environment.reset(secret=game.secrets[0])))
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, games: int, guesses: int) -> Games:
        """Play games of so many answered guesses."""
        secrets = torch.randint(len(self.codes), (games, 1), generator=self.generator)
        guessed = torch.randint(len(self.codes), (games, guesses), generator=self.generator)
        answers = self.answers[guessed, secrets]
        fits = (self.answers[guessed] == answers[..., None]).cumprod(1).sum(-1)
        won = (guessed == secrets).cumsum(1) > 0
        start = torch.ones(games, 1, dtype=torch.long)
        turns = torch.stack([self.codes[guessed], answers], dim=-1).flatten(1)
        return Games(
            torch.cat([start * torch.tensor(self.opening), turns], 1),
            self.codes[secrets].masked_fill(torch.cat([start == 0, won], 1), -100),
            torch.cat([start * len(self.codes), fits], 1),
        )


def imitate_in_hindsight(
    model: PreTrainedModel, play: RandomPlay, *, batches: int, guesses: int = 4, batch_size: int = 256,
    learning_rate: float = 3e-3,
) -> tuple[float, float]:  # fmt: skip
    """Learn which secrets are possible; returns the loss at the end and the ideal loss, in nats.

    Games of one guess come first (40 % of the batches, as many tokens each): they show what a single answer rules out.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, 1.0) * (1 + math.cos(math.pi * step / batches)) / 2
    )

    def loss_of(games: Games) -> Tensor:
        logits = model(input_ids=games.input_ids).logits[:, ::2]
        return cross_entropy(logits.flatten(0, 1), games.labels.flatten())

    for batch in range(batches):
        short = batch < 0.4 * batches
        loss = loss_of(play.draw(batch_size * guesses, 1) if short else play.draw(batch_size, guesses))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        last = play.draw(4096, guesses)
        return float(loss_of(last)), last.ideal_loss
