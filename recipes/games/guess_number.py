"""Guess a number, told higher or lower."""

from games.play import Game
from rlhf_ppo.environments import Turn


class GuessNumber:
    """A guess costs 0.1, the right one earns 1."""

    def reset(self, secret: str) -> str:
        self.secret = int(secret)
        return "guess"

    def step(self, reply: str) -> Turn:
        guess = int(reply) if reply.isdigit() else None
        if guess == self.secret:
            return Turn(reward=0.9, terminated=True)
        return Turn("nonsense" if guess is None else "higher" if guess < self.secret else "lower", reward=-0.1)


def guess_number(largest: int) -> Game:
    """The game with numbers from 1 to `largest`."""
    numbers = [str(number) for number in range(1, largest + 1)]
    return Game(environment=GuessNumber, secrets=numbers, answers=["higher", "lower", "nonsense"])
