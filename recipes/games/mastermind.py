"""Mastermind with three pegs of four colors: 64 codes, answered by the number of right and of misplaced pegs."""

from collections import Counter, defaultdict
from functools import cache
from itertools import product

from games.play import Game
from rlhf_ppo.environments import Turn

COLORS, PEGS = "abcd", 3


@cache
def answer(guess: str, secret: str) -> tuple[int, int]:
    """Pegs of the right color at the right place, and of the right color elsewhere."""
    right = sum(one == other for one, other in zip(guess, secret, strict=True))
    return right, sum((Counter(guess) & Counter(secret)).values()) - right


CODES = ["".join(code) for code in product(COLORS, repeat=PEGS)]


class Mastermind:
    """A guess costs 0.1."""

    def reset(self, secret: str) -> str:
        """Begin a game."""
        self.secret = secret
        return "guess"

    def step(self, reply: str) -> Turn:
        """Answer a guess."""
        if reply == self.secret:
            return Turn(reward=-0.1, terminated=True)
        heard = "{}+{}".format(*answer(reply, self.secret)) if reply in CODES else "nonsense"
        return Turn(heard, reward=-0.1)


MASTERMIND = Game(
    environment=Mastermind, secrets=CODES, end="", guesses=8,
    answers=["nonsense", *(f"{right}+{misplaced}" for right in range(PEGS) for misplaced in range(PEGS + 1 - right))],
)  # fmt: skip


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


FIRST = [CODES.index(code) for code in ("aaa", "aab", "abc")]
"""First guesses that differ by more than the names of colors and places."""
