"""`Environment`, which speaks text, and `Turn`, its answer to one reply of the policy."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

Messages: TypeAlias = list[dict[str, Any]]
"""A conversation for the chat template: [{"role": "user", "content": "..."}, ...]."""
Observation: TypeAlias = str | Messages
"""Text that is appended as it is, or messages that the chat template renders."""

RESERVED = frozenset(
    {
        "turns", "segments", "truncated", "sampled_tokens", "observed_tokens", "failed", "retried", "timed_out",
        "token_drift", "rollouts_lost",
    }
)  # fmt: skip
"""Names of `env/...` metrics that are no environment's."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Turn:
    """What an environment answers to one reply of the policy."""

    observation: Observation = ""
    """What the policy reads next; not read after a terminated turn."""
    reward: Any = 0.0
    """Reward of the reply, credited to its last token: a number, or an array or tensor of one; kept as a float."""
    terminated: Any = False
    """The episode ended: it has no future."""
    truncated: Any = False
    """The episode was cut off: the value of the state after `observation` stands for its future."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers, logged as `env/<name>`; the last turn's value of each name counts."""

    def __post_init__(self) -> None:
        check_observation(self.observation, "Turn.observation")
        object.__setattr__(
            self, "reward", _number("Turn.reward", self.reward, "raise an exception to drop the episode")
        )
        for name in ("terminated", "truncated"):
            value = single_item(getattr(self, name))
            if not isinstance(value, bool):
                raise TypeError(
                    f"Turn.{name} must be True or False, got {value!r:.80}: it would be unknown whether the episode "
                    "goes on. Return bool(...)."
                )
            object.__setattr__(self, name, value)
        if not isinstance(self.info, Mapping):
            raise TypeError(f"Turn.info must be a mapping of names to numbers, got {self.info!r:.80}. Leave it out.")
        if taken := RESERVED & set(self.info):
            raise ValueError(
                f"Turn.info must not hold {', '.join(sorted(taken))}: the trainer counts these itself. Rename it."
            )
        info = {name: _number(f"Turn.info[{name!r}]", value, "leave it out") for name, value in self.info.items()}
        object.__setattr__(self, "info", info)


def single_item(value: Any) -> Any:
    """The number in an array or a tensor of one; anything else unchanged."""
    is_array = isinstance(value, np.generic | np.ndarray | Tensor)
    return value.item() if is_array and value.reshape(-1).shape == (1,) else value


def _number(name: str, value: Any, alternative: str) -> float:
    number = single_item(value)
    if not isinstance(number, Real) or not abs(number) <= _LARGEST:  # type: ignore[operator]
        raise ValueError(
            f"{name} must be a finite number within float32, got {value!r:.80}: it would destroy the weights or a "
            f"mean. Return a float, or {alternative}."
        )
    return float(number)


@runtime_checkable
class Environment(Protocol):
    """One episode. Methods may be `async`.

    Two further attributes are read if they are there: `close()` is called at the end; `chat_template_kwargs`, a mapping
    such as `{"tools": [...]}`, is passed to the chat template.
    """

    def reset(self, *_: Any, **columns: Any) -> Any:
        """Return the first observation: text, or messages for the chat template.

        Args:
            columns: Columns of the prompt's row, and `seed`, the same within a group; only those that `reset` names
                (all, with `**columns`).
        """

    def step(self, reply: str) -> Any:
        """Return the `Turn` that answers a reply of the policy."""


EnvironmentFactory: TypeAlias = Callable[[], Environment]
"""Makes the environment of one episode: a class, or a function without arguments."""


def check_observation(observation: object, name: str) -> None:
    """Raise TypeError unless `observation` is text or messages."""
    if isinstance(observation, str):
        return
    if isinstance(observation, list) and all(
        isinstance(message, Mapping) and "role" in message for message in observation
    ):
        return
    raise TypeError(
        f"{name} must be text or a list of messages {{'role': ..., 'content': ...}}, got {observation!r:.80}: the "
        "policy could not read it."
    )


def accepted_columns(reset: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that `reset` names as arguments; all of them if it takes `**columns`.

    Raises:
        TypeError: `reset` has a required argument that is no column.
    """
    parameters = _parameters(getattr(reset, "__func__", reset), is_bound=hasattr(reset, "__func__"))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(columns)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.name not in columns and parameter.default is parameter.empty:
            raise TypeError(
                f"reset() wants {parameter.name!r}, which is no column of the prompts (it is given "
                f"{', '.join(columns)}): no episode could begin. Rename the argument, give it a default, or add the "
                "column."
            )
    return {p.name: columns[p.name] for p in named if p.name in columns}


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any], *, is_bound: bool) -> tuple[inspect.Parameter, ...]:
    """Parameters of a function, without `self`; cached, as every episode asks."""
    return tuple(inspect.signature(function).parameters.values())[int(is_bound) :]
