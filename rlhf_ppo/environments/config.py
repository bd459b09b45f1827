"""`EpisodeConfig`: limits of an episode, concurrency, and what happens when an environment fails."""

from dataclasses import dataclass
from typing import Literal

from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """Settings of episodes with an environment. `SamplingConfig.max_new_tokens` is the limit of one reply."""

    max_turns: int = 16
    """Maximum number of replies; an episode that reaches it is truncated."""
    max_tokens: int | None = None
    """Maximum number of tokens after the prompt, observations included; None: as many as the model has positions. A
    turn begins only if a whole reply fits; otherwise the episode is truncated."""
    history: Literal["auto", "append"] = "auto"
    """What happens if the chat template rewrites the conversation so far (strips the thinking of earlier replies, for
    instance). "auto", with a critic: the next turn begins a segment. A segment is a row of its own; the row before
    bootstraps from the segment's first value. "append": all turns are in one row, as they were sampled."""
    max_concurrency: int = 32
    """Maximum number of environments that run at the same time. With 1, and no timeout, they run in the main thread."""
    timeout: float | None = 120.0
    """Seconds per call of an environment; one that takes longer has failed. None: no limit."""
    retries: int = 1
    """How often a failed call is repeated: in a new environment, with the same seed and the same earlier replies. If
    all retries fail, the episode is dropped with its group, and counted as `env/failed`. One exception, with a critic:
    an episode that times out after its first turn is truncated, and counted as `env/timed_out`."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, minimum in {"max_turns": 1, "max_concurrency": 1, "retries": 0}.items():
            if getattr(self, name) < minimum:
                raise ValueError(
                    f"EpisodeConfig.{name} must be at least {minimum}, got {getattr(self, name)}: no episode could be "
                    "played. Raise it."
                )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"EpisodeConfig.max_tokens must be at least 1 or None, got {self.max_tokens}.")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(
                f"EpisodeConfig.timeout must be > 0 seconds, got {self.timeout}: every call would time out. Use None "
                "for no limit."
            )
