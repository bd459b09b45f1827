"""Imitation in hindsight: the labels of random play are the secrets, and the best prediction is known."""

import math
from dataclasses import replace

import pytest
import torch

from games.guess_number import guess_number
from games.hindsight import Games, RandomPlay, imitate_in_hindsight
from games.mastermind import CODES, MASTERMIND, answer
from games.play import Game, tiny_llama


def one_token(largest: int) -> Game:
    """Numbers from 1 to `largest`, each guessed with one token."""
    return replace(guess_number(largest), end="")


def test_labels_are_the_secret_until_it_is_guessed() -> None:
    tokenizer = MASTERMIND.make_tokenizer()
    games = RandomPlay(MASTERMIND, tokenizer, seed=0).draw(300, guesses=4)
    won = 0
    for ids, labels, possible in zip(*games, strict=True):
        opening, *turns = tokenizer.convert_ids_to_tokens(ids)
        (secret,) = set(tokenizer.convert_ids_to_tokens(labels[labels != -100]))
        codes = set(CODES)
        assert (opening, possible[0]) == ("guess", 64)
        for turn, (guess, heard) in enumerate(zip(turns[::2], turns[1::2], strict=True), start=1):
            if guess == secret:
                won += 1
                assert labels[turn:].eq(-100).all()
                break
            assert heard == "{}+{}".format(*answer(guess, secret))
            codes = {code for code in codes if answer(guess, code) == answer(guess, secret)}
            assert (int(possible[turn]), secret in codes) == (len(codes), True)
            assert labels[turn] == tokenizer.convert_tokens_to_ids(secret)
    assert won > 0


def test_the_ideal_loss_is_the_mean_logarithm_of_the_possible_secrets() -> None:
    """Numbers 1 to 3: log 3 before a guess; after a wrong 1 or 3, two are possible; after a wrong 2, one."""
    labels, possible = torch.tensor([[5, 5], [6, 6], [7, -100]]), torch.tensor([[3, 2], [3, 1], [3, 1]])
    by_hand = (3 * math.log(3) + math.log(2)) / 5
    assert Games(torch.zeros(3, 3), labels, possible).ideal_loss == pytest.approx(by_hand)
    game = one_token(3)
    drawn = RandomPlay(game, game.make_tokenizer(), seed=0).draw(20_000, guesses=1)
    expected = (math.log(3) + 6 / 9 * 4 / 6 * math.log(2)) / (1 + 6 / 9)
    assert drawn.ideal_loss == pytest.approx(expected, abs=0.01)


def test_guesses_of_several_tokens_are_refused() -> None:
    game = guess_number(3)
    with pytest.raises(ValueError, match="guesses of one token"):
        RandomPlay(game, game.make_tokenizer(), seed=0)


@pytest.mark.slow
def test_a_tiny_model_learns_which_secrets_are_possible() -> None:
    """At random, it would predict with log 12 = 2.48 nats."""
    torch.manual_seed(0)
    game = one_token(12)
    tokenizer = game.make_tokenizer()
    model = tiny_llama(len(tokenizer))
    loss, ideal_loss = imitate_in_hindsight(model, RandomPlay(game, tokenizer, seed=0), batches=400)
    assert loss < ideal_loss + 0.1
