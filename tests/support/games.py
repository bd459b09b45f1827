"""Small environments for tests: they count, echo, remember, fail on demand."""

from dataclasses import dataclass, field
from typing import Any

from rlhf_ppo.environments import Turn


@dataclass
class CountE:
    """Pays for each "e" of a reply, at most `turns` replies; answers with a text of fixed length."""

    turns: int = 3
    answer: str = " and"
    played: int = 0

    def reset(self, prompt: str = "The movie") -> str:
        return prompt

    def step(self, reply: str) -> Turn:
        self.played += 1
        is_over = self.played == self.turns
        return Turn(self.answer, reward=float(reply.count("e")), terminated=is_over, info={"e": reply.count("e")})


@dataclass
class Chat:
    """Speaks in messages; the episode is cut off after `turns` replies."""

    turns: int = 2
    seen: list[str] = field(default_factory=list)

    def reset(self, **columns: Any) -> list[dict[str, str]]:
        return [{"role": "user", "content": "hello"}]

    def step(self, reply: str) -> Turn:
        self.seen.append(reply)
        answer = [{"role": "user", "content": f"turn {len(self.seen)}"}]
        return Turn(answer, reward=1.0, truncated=len(self.seen) == self.turns)
