"""The guessing recipe: a tiny run, its game, and the optimum that its page compares with."""

import json
import random
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from ppo_guess_number import DEFAULTS, Config, check_flags, main

from games.guess_number import GuessNumber, guess_number
from games.mastermind import CODES, MASTERMIND, PEGS, Mastermind, answer
from games.play import Game, TokenBudget
from rlhf_ppo.loop.config import TrainState


def test_the_best_strategy_needs_as_many_guesses_as_the_recipe_says() -> None:
    """c(n) = n + min over guesses of c(below) + c(above): the total guesses over n secrets."""
    total = [0]
    for n in range(1, 21):
        total.append(n + min(total[guess] + total[n - 1 - guess] for guess in range(n)))
    assert (total[20] / 20, total[10] / 10) == (3.7, 2.9)
    assert "3.7 guesses" in Path(main.__code__.co_filename).read_text(encoding="utf-8")


def test_the_game_answers_higher_lower_and_nonsense_and_ends_with_the_secret() -> None:
    game = GuessNumber()
    assert game.reset(secret="7") == "guess"
    turns = [game.step(reply) for reply in ("5", "9", "guess", "", "7")]
    assert [turn.observation for turn in turns] == ["higher", "lower", "nonsense", "nonsense", ""]
    assert [turn.reward for turn in turns] == [-0.1] * 4 + [0.9]
    assert [turn.terminated for turn in turns] == [False] * 4 + [True]


def test_mastermind_counts_right_and_misplaced_pegs() -> None:
    """A color that the secret has once is found once."""
    assert answer("aab", "abb") == (2, 0)
    assert answer("aab", "baa") == (1, 2)
    assert answer("abc", "cab") == (0, 3)
    assert answer("aaa", "bcd") == (0, 0)
    game = Mastermind()
    game.reset(secret="abb")
    turns = [game.step(reply) for reply in ("aab", "ab", "xyz", "abb")]
    assert [turn.observation for turn in turns] == ["2+0", "nonsense", "nonsense", ""]
    assert [turn.terminated for turn in turns] == [False, False, False, True]
    assert [turn.reward for turn in turns] == [-0.1] * 4


FIRST = [CODES.index(code) for code in ("aaa", "aab", "abc")]
"""First guesses that differ by more than the names of colors and places."""


def fewest_guesses() -> float:
    """Mean number of guesses of the best strategy over all codes, by exhaustive search."""
    answers = [[answer(guess, secret) for secret in CODES] for guess in CODES]

    @cache
    def total(possible: frozenset[int]) -> int:
        """Guesses of the best strategy, summed over the secrets that are still possible."""
        floor = 2 * len(possible) - 1  # one secret is guessed at once, every other needs a second guess at least
        if len(possible) <= 2:
            return floor
        best = 10**6
        for guess in FIRST if len(possible) == len(CODES) else range(len(CODES)):
            parts = defaultdict(set)
            for secret in possible:
                parts[answers[guess][secret]].add(secret)
            parts.pop((PEGS, 0), None)
            if len(possible) in map(len, parts.values()):
                continue  # nothing is learned
            cost = len(possible) + sum(2 * len(part) - 1 for part in parts.values())  # a lower bound
            for part in sorted(parts.values(), key=len):
                if cost < best:
                    cost += total(frozenset(part)) - (2 * len(part) - 1)
            best = min(best, cost)
            if best == floor:
                break
        return best

    return total(frozenset(range(len(CODES)))) / len(CODES)


@pytest.mark.slow
def test_the_best_strategy_of_mastermind_needs_as_many_guesses_as_the_page_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "results" / "environments.md"
    assert f"{fewest_guesses():.3f}" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("game", [guess_number(20), MASTERMIND], ids=["numbers", "codes"])
def test_transcripts_of_random_play_are_words_of_the_tokenizer(game: Game) -> None:
    tokenizer = game.make_tokenizer()
    for seed in range(20):
        text = game.random_transcript(random.Random(seed))
        assert tokenizer.decode(tokenizer(text)["input_ids"]).split() == text.split()


@pytest.mark.slow
@pytest.mark.parametrize(("game", "algorithm"), [("guess-number", "ppo-turn"), ("mastermind", "rloo")])
def test_a_tiny_run_writes_its_metrics_and_results(tmp_path: Path, game: str, algorithm: str) -> None:
    config = replace(
        DEFAULTS[game], algorithm=algorithm, tokens=1, batch_size=8, mini_batch_size=4, group_size=2, transcripts=64,
        hindsight_batches=min(DEFAULTS[game].hindsight_batches, 2), eval_games=1,
        output_dir=str(tmp_path), imitated=str(tmp_path / "new" / "imitated.pt"),
    )  # fmt: skip
    result = main(config)
    assert 1 <= result["after/greedy"] <= 10
    assert result["iterations"] == 1
    assert result["tokens"] >= 8
    assert json.loads((tmp_path / "result.json").read_text())["after/sampled"] == result["after/sampled"]
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["env/failed"] == row["env/token_drift"] == 0
    again = main(replace(config, output_dir=str(tmp_path / "again")))
    assert again["before/greedy"] == result["before/greedy"]


@pytest.mark.parametrize(("algorithm", "flag"), [("grpo", "lam"), ("ppo", "group_size"), ("rloo", "vf_coef")])
def test_flags_of_another_algorithm_are_refused(algorithm: str, flag: str) -> None:
    default = DEFAULTS["guess-number"]
    check_flags(replace(default, algorithm=algorithm))
    with pytest.raises(ValueError, match=f"{flag}=3 is not read"):
        check_flags(replace(default, algorithm=algorithm, **{flag: 3}))


def test_a_run_ends_with_its_tokens_and_its_learning_rate_falls_to_zero_on_the_way() -> None:
    budget = TokenBudget(Config(tokens=100, batch_size=10))
    state = TrainState(metrics={"env/sampled_tokens": 4.0})
    assert [budget.learning_rate_factor(step) for step in (0, 8, 20)] == [0.1, 0.9, 1.0]
    assert [budget(None, state) for _ in range(2)] == [False, False]
    assert budget.learning_rate_factor(20) == pytest.approx(0.2)
    assert budget(None, state)
    assert budget.learning_rate_factor(20) == 0.0
