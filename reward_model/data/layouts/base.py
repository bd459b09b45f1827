"""The `Layout` of a public dataset, and what the conversions of all layouts share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reward_model.data.rows import Row, read_number
from rlhf_ppo.chat.cells import parse_cell, parse_literal

Kind = Literal["comparison", "rated", "labeled", "thread", "undecided"]
"""What a row is: a pair or ranking, a completion with a rating, a text with a label, messages of a tree, no verdict."""

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input", "problem")
"""Columns that a prompt may stand in, if the row has no `prompt`."""
CONVERSATION_NAMES = ("context", "messages", "conversations", "conversation", "trajectory", "history")
"""Columns that hold a prompt if they hold messages that are to be answered."""
SYSTEM_NAMES = ("system", "system_prompt")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns of a public dataset, and how a row of it becomes one of ours."""

    name: str
    needs: tuple[str, ...]
    """Columns that tell the layout; a row has it if none of them is null."""
    uses: tuple[str, ...] = ()
    """Further columns that are read."""
    verdict: str = ""
    """The column of `needs` that prefers an answer; a row in which it alone is empty is undecided."""
    kind: Kind = "comparison"
    convert: Callable[[Row], dict[str, Any] | None]
    """Our columns; None if the row has no verdict. A ValueError says what is wrong with it."""
    fits: Callable[[Row], bool] = lambda row: True
    """Whether the values are the layout's, where columns of these names may mean something else."""

    def matches(self, row: Row) -> bool:
        """Whether `row` has this layout."""
        return all(row.get(name) is not None for name in self.needs) and self.fits(row)

    def lacks_verdict(self, row: Row) -> bool:
        """Whether `row` has this layout but for its verdict, which is empty."""
        others = (name for name in self.needs if name != self.verdict)
        return is_blank(row, self.verdict) and all(row.get(name) is not None for name in others)


def is_blank(row: Row, *names: str) -> bool:
    """Whether one of these columns is there and empty."""
    return any(name in row and row[name] in (None, "") for name in names)


def number(row: Row, name: str) -> float:
    """A finite number of a row, or a ValueError."""
    found = read_number(row.get(name))
    if not math.isfinite(found):
        raise ValueError(f"field {name!r} must be a number, got {row.get(name)!r:.40}.")
    return found


def choice(row: Row, name: str, verdicts: Mapping[str, int]) -> int:
    """The verdict that a value stands for, or a ValueError."""
    value = row.get(name)
    key = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
    if key not in verdicts:
        raise ValueError(f"field {name!r} must be one of {list(verdicts)}, got {value!r:.40}.")
    return verdicts[key]


def pair_columns(prompt: Any, first: Any, second: Any, verdict: float, **more: Any) -> dict[str, Any]:
    """Our columns of two answers; a positive verdict prefers the first, a negative one the second, 0 is a tie."""
    chosen, rejected = (second, first) if verdict < 0 else (first, second)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": verdict == 0, **more}


def ranking_columns(
    prompt: Any, completions: Sequence[Any], scores: Sequence[float], **more: Any
) -> dict[str, Any] | None:
    """Our columns of several answers; None if there are fewer than two, or more than two that are all equal."""
    if len(completions) < 2 or (len(completions) > 2 and len(set(scores)) == 1):
        return None
    return {"prompt": prompt, "completions": list(completions), "scores": list(scores), **more}


def items(row: Row, name: str, *fields: str) -> list[Mapping[str, Any]]:
    """A list of objects that have `fields`, or a ValueError."""
    value = row[name]
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"field {name!r} must be a list of objects with {list(fields)}, got {value!r:.60}.")
    for index, item in enumerate(value):
        if lacking := [field for field in fields if item.get(field) is None]:
            raise ValueError(f"field {name}[{index}] lacks {lacking}, got {sorted(map(str, item))}.")
    return list(value)


def as_list(value: Any) -> list[Any] | None:
    """A list, which tables hold as text; None if it is none."""
    value = parse_literal(value) if isinstance(value, str) else value
    return list(value) if isinstance(value, list | tuple) else None


def are_objects(value: Any) -> bool:
    """Whether `value` is a list of one or more objects."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def text_source(row: Row, name: str) -> str | None:
    """A column as the source of a comparison, if it is text."""
    value = row.get(name)
    return value if isinstance(value, str) else None


def messages_of_cell(value: Any) -> Any:
    """The messages that a table holds as text; else `value`, also if it is malformed, which reading it says."""
    try:
        return parse_cell(value, "")
    except ValueError:
        return value


def is_unanswered(value: Any) -> bool:
    """Whether `value` is a list of messages, or such a cell of a table, whose last one is not the assistant's."""
    value = messages_of_cell(value)
    if not are_objects(value):
        return False
    speaker = value[-1].get("role") or value[-1].get("from")
    return isinstance(speaker, str) and speaker.lower() not in ("assistant", "gpt", "chatgpt", "model", "bot")


def _is_said(value: Any) -> bool:
    """Whether `value` is text or messages, and no number or record of something else."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, Mapping) for item in value))


def prompt_columns(row: Row) -> tuple[Any, tuple[str, ...]]:
    """The prompt of a row and the columns that it was read from.

    It stands in `prompt` or in one of its other names, with Alpaca's `input` after an `instruction`, or is the last
    message of a conversation beside it; a text in `system` and the pairs of LLaMA-Factory's `history` go before it.
    """
    name = next((name for name in PROMPT_NAMES if row.get(name) and (name == "prompt" or _is_said(row[name]))), None)
    talk = next((name for name in CONVERSATION_NAMES if is_unanswered(row.get(name))), None)
    used: tuple[str, ...] = tuple(filter(None, (name,)))
    turns: Any = messages_of_cell(row[talk]) if talk else ()
    if talk and (name is None or (len(turns) > 1 and _content(turns[-1]) == row[name])):
        name, used = talk, (*used, talk)
    if name is None:
        return None, ()
    prompt, further, before = messages_of_cell(row[name]), row.get("input"), system_messages(row)
    if name == "instruction" and isinstance(prompt, str) and isinstance(further, str):
        prompt = f"{prompt}\n\n{further}" if further.strip() else prompt
        used = (*used, "input")
    if before is not None:
        used = (*used, *SYSTEM_NAMES)
    if name == "instruction" and _is_history(row.get("history")):
        used = (*used, "history")
        turns = [message for turn in row["history"] for message in zip(("user", "assistant"), turn, strict=True)]
        before = [*(before or []), *({"role": role, "content": text} for role, text in turns)]
    if before is not None and isinstance(prompt, str | list | tuple):
        prompt = prepend_system_message(
            before, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        )
    return prompt, used


def prepend_system_message(before: list[dict[str, Any]], messages: Sequence[Any]) -> list[Any]:
    """`messages` after `before`, whose system message is not said again if they begin with it."""
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    is_system = bool(before) and before[0]["role"] == (first.get("role") or first.get("from")) == "system"
    return [*before, *messages[is_system and _content(first) == before[0]["content"] :]]


def _content(message: Any) -> Any:
    return (message.get("content") or message.get("value")) if isinstance(message, Mapping) else None


def system_messages(row: Row) -> list[dict[str, Any]] | None:
    """The system message of a row, [] if its column is empty; None if there is no such column."""
    texts = [row[name] for name in SYSTEM_NAMES if isinstance(row.get(name), str)]
    return [{"role": "system", "content": text} for text in texts if text.strip()] if texts else None


def _is_history(value: Any) -> bool:
    """Whether `value` is a list of (question, answer)."""
    turns = value if isinstance(value, list | tuple) else []
    return bool(turns) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    )
