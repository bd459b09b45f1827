"""Games of textarena for one player."""

import re
from collections.abc import Callable
from typing import Any

from rlhf_ppo.environments.adapters.conversion import IsolatedRandomState, as_observation, finite_numbers
from rlhf_ppo.environments.base import EnvironmentFactory, Observation, Turn


def from_textarena(make: Callable[[], Any], *, chat: bool = True) -> EnvironmentFactory:
    """A game of textarena for one player; its reward, known when the game is closed, is that of the last turn.

        environment = from_textarena(lambda: ta.make("GuessTheNumber-v0"))

    A game that tells its whole history in each observation is heard once: what was read before, and the player's own
    move, are left out.

    Args:
        make: Makes the game of an episode.
        chat: Whether an observation is the message of a user, rendered by the chat template; otherwise it is appended
            as it is.
    """

    class TextArenaEnvironment:
        def reset(self, seed: int) -> Observation:
            self.numbers, self.read = IsolatedRandomState(seed), ""
            with self.numbers.active():
                self.env = make()
                self.env.reset(num_players=1, seed=seed)
                return self._observe()

        def step(self, reply: str) -> Turn:
            with self.numbers.active():
                done, _ = self.env.step(reply)
                if not done:
                    return Turn(self._observe(reply))
                rewards, info = self.env.close()
            return Turn(reward=float((rewards or {}).get(0, 0.0)), terminated=True, info=finite_numbers(info.get(0)))

        def _observe(self, reply: str | None = None) -> Observation:
            player, observation = self.env.get_observation()
            if player != 0:
                raise ValueError(f"expected a game for one player, got a turn of player {player}: nobody would play it")
            if not isinstance(observation, str):  # an unwrapped game: (sender, message, kind) of what is new
                return as_observation("\n".join(text for sender, text, _ in observation if sender != 0), chat=chat)
            new, self.read = observation.removeprefix(self.read), observation
            if reply is not None:  # the game repeats the player's move: "[Player] ..."
                new = re.sub(rf"\A\s*\[[^\]\n]*\] {re.escape(reply)}", "", new)
            return as_observation(new.strip("\n"), chat=chat)

    return TextArenaEnvironment
