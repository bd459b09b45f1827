"""Mastermind with three pegs of four colors: 64 codes, answered by the number of right and of misplaced pegs."""

from collections import Counter
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
        self.secret = secret
        return "guess"

    def step(self, reply: str) -> Turn:
        if reply == self.secret:
            return Turn(reward=-0.1, terminated=True)
        heard = "{}+{}".format(*answer(reply, self.secret)) if reply in CODES else "nonsense"
        return Turn(heard, reward=-0.1)


MASTERMIND = Game(
    environment=Mastermind, secrets=CODES, end="", guesses=8,
    answers=["nonsense", *(f"{right}+{misplaced}" for right in range(PEGS) for misplaced in range(PEGS + 1 - right))],
)  # fmt: skip
