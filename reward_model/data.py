"""Parse rows of preference data in any accepted format into `Comparison`s; malformed rows raise `BadRow`.

Formats are told apart by their columns: `chosen` and `rejected` (with or without `prompt`, plain text or chat
messages), `completions` with `ranks` or `scores`, and `text` with `label` (see `pairs.py`).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from reward_model.text import Text

Row = Mapping[str, Any]
PAIR_COLUMNS = ("prompt", "chosen", "rejected", "margin", "weight", "preference", "tie", "source")
RANKED_COLUMNS = ("prompt", "completions", "ranks", "scores", "weight", "source")
LABELED_COLUMNS = ("text", "label", "source")
COLUMNS = tuple(dict.fromkeys(PAIR_COLUMNS + RANKED_COLUMNS + LABELED_COLUMNS))
LONGEST_TEXT = 1_000_000
"""Characters above which a text is taken for a mistake (a whole file in one field)."""


class BadRow(ValueError):
    """A malformed row; the message names its location, the field, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Completions of one prompt, ordered by preference, best first; a pair of a preference below 0.5 is turned."""

    prompt: Text
    """Text or messages; "" or [] if the completions hold the whole text."""
    completions: tuple[Text, ...]
    ranks: tuple[int, ...] = (0, 1)
    """0 is best; equal numbers are ties."""
    margin: float = 0.0
    weight: float = 1.0
    preference: float = 1.0
    """Probability that the first of two completions is the better one."""
    source: str = ""
    where: str = ""
    """Location for messages: file and line, or row number."""

    def __post_init__(self) -> None:
        if self.is_pair and not self.is_tie and self.preference < 0.5:
            turned = {"completions": self.completions[::-1], "margin": -self.margin, "preference": 1 - self.preference}
            for name, value in turned.items():
                object.__setattr__(self, name, value)

    @property
    def is_pair(self) -> bool:
        """Whether exactly two completions are compared."""
        return len(self.completions) == 2

    @property
    def is_tie(self) -> bool:
        """Whether all completions are equally good."""
        return len(set(self.ranks)) == 1

    @property
    def is_decided(self) -> bool:
        """Whether one completion is better than another; the other comparisons are left out of accuracies."""
        return not self.is_tie and self.preference != 0.5

    def key(self) -> str:
        """Key for finding duplicates: equal for equal comparisons."""
        return json.dumps([self.prompt, self.completions, self.ranks, self.preference], sort_keys=True, default=list)

    def prompt_key(self) -> str:
        """The prompt as one string; "" if there is none."""
        return json.dumps(self.prompt, sort_keys=True, default=list) if self.prompt else ""


def parse_row(row: Row, where: str) -> Comparison:
    """Parse one row of preference data.

    Raises:
        BadRow: A field is missing or malformed.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"{where}: expected an object with named fields, got {type(row).__name__}.")
    if row.get("completions") is not None:
        return _ranked(row, where)
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise BadRow(
                f"{where}: field {name!r} is missing; the row has {sorted(str(key) for key in row)}. A pair needs "
                "'chosen' and 'rejected' (and 'prompt' unless they hold it); map other names with --columns."
            )
    chosen, rejected = _text(row["chosen"], "chosen", where), _text(row["rejected"], "rejected", where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(f"{where}: field 'rejected' must be of the same kind as 'chosen': both text or both messages.")
    prompt, (chosen, rejected) = _split_prompt(row.get("prompt"), (chosen, rejected), where)
    if chosen == rejected:
        raise BadRow(f"{where}: fields 'chosen' and 'rejected' are identical: the pair says nothing.")
    tie = row.get("tie")
    if tie not in (None, True, False):
        raise BadRow(f"{where}: field 'tie' must be true or false, got {tie!r:.40}.")
    return Comparison(
        prompt=prompt,
        completions=(chosen, rejected),
        ranks=(0, 0) if tie else (0, 1),
        margin=_number(row, "margin", 0.0, where),
        weight=_number(row, "weight", 1.0, where, low=0.0),
        preference=_number(row, "preference", 1.0, where, low=0.0, high=1.0),
        source=_source(row, where),
        where=where,
    )


def as_comparisons(rows: Iterable[Row | Comparison], name: str) -> list[Comparison]:
    """Rows, a `datasets.Dataset` or comparisons as a list of comparisons; the first bad row raises.

    Raises:
        BadRow: Names the row as `name` row N.
    """
    return [
        row if isinstance(row, Comparison) else parse_row(row, f"{name} row {index}") for index, row in enumerate(rows)
    ]


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """`row` with the fields that `columns` maps (ours -> theirs) under our names."""
    if not columns:
        return row
    theirs = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in theirs}
    return kept | {ours: row[name] for ours, name in columns.items() if name in row}


def _ranked(row: Row, where: str) -> Comparison:
    completions = row["completions"]
    if not isinstance(completions, list | tuple) or len(completions) < 2:
        raise BadRow(f"{where}: field 'completions' must be a list of two or more, got {completions!r:.60}.")
    texts = [_text(text, f"completions[{index}]", where) for index, text in enumerate(completions)]
    if len({isinstance(text, str) for text in texts}) > 1:
        raise BadRow(f"{where}: field 'completions' mixes texts and messages.")
    name = "ranks" if row.get("ranks") is not None else "scores"
    values = row.get(name)
    if not isinstance(values, list | tuple) or len(values) != len(texts):
        raise BadRow(
            f"{where}: field 'completions' needs 'ranks' (1 is best) or 'scores' (high is best), one number for each "
            f"of its {len(texts)} completions; got {name} = {values!r:.60}."
        )
    numbers = [_finite(value, f"{name}[{index}]", where) for index, value in enumerate(values)]
    signed = numbers if name == "ranks" else [-value for value in numbers]
    order = sorted(range(len(texts)), key=lambda index: signed[index])
    levels = {value: level for level, value in enumerate(sorted(set(signed)))}
    if len(levels) == 1 and len(texts) > 2:
        raise BadRow(f"{where}: field {name!r} ranks all {len(texts)} completions equally: the row says nothing.")
    prompt, split = _split_prompt(row.get("prompt"), tuple(texts), where)
    if len({json.dumps(text, sort_keys=True) for text in split}) < len(split):
        raise BadRow(f"{where}: field 'completions' holds the same completion twice.")
    return Comparison(
        prompt=prompt,
        completions=tuple(split[index] for index in order),
        ranks=tuple(levels[signed[index]] for index in order),
        weight=_number(row, "weight", 1.0, where, low=0.0),
        source=_source(row, where),
        where=where,
    )


def _text(value: Any, name: str, where: str) -> Text:
    """A non-empty text or list of messages."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{where}: field {name!r} is empty.")
        if len(value) > LONGEST_TEXT:
            raise BadRow(f"{where}: field {name!r} has {len(value):,} characters, more than {LONGEST_TEXT:,}.")
        if "\x00" in value:
            raise BadRow(f"{where}: field {name!r} holds a zero byte: it is binary data, not text.")
        return value
    if isinstance(value, list | tuple):
        return _messages(value, name, where)
    raise BadRow(f"{where}: field {name!r} must be text or a list of chat messages, got {type(value).__name__}.")


def _messages(value: Sequence[Any], name: str, where: str) -> list[dict[str, Any]]:
    if not value:
        raise BadRow(f"{where}: field {name!r} is an empty list: at least one message is needed.")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadRow(f"{where}: field {name}[{index}] must have 'role' and 'content', got {message!r:.60}.")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise BadRow(f"{where}: field {name}[{index}]: 'role' and 'content' must be text, got {message!r:.60}.")
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages[-1]["content"].strip():
        raise BadRow(f"{where}: field {name!r} is empty: its last message has no content.")
    return messages


def _split_prompt(prompt: Any, completions: tuple[Text, ...], where: str) -> tuple[Text, tuple[Text, ...]]:
    """Prompt and completions; without a prompt, the messages that all completions share at the start are the prompt."""
    if isinstance(completions[0], str):
        if prompt is not None and not isinstance(prompt, str):
            raise BadRow(f"{where}: field 'prompt' must be text like the completions, got {type(prompt).__name__}.")
        if prompt and len(prompt) > LONGEST_TEXT:
            raise BadRow(f"{where}: field 'prompt' has {len(prompt):,} characters, more than {LONGEST_TEXT:,}.")
        return prompt or "", completions
    if isinstance(prompt, list | tuple) and prompt:
        return _messages(prompt, "prompt", where), completions
    if isinstance(prompt, str) and prompt and completions[0][0].get("role") == "assistant":
        return [{"role": "user", "content": prompt}], completions
    shared = 0
    shortest = min(len(completion) for completion in completions)
    while shared < shortest - 1 and all(text[shared] == completions[0][shared] for text in completions):
        shared += 1
    return completions[0][:shared], tuple(completion[shared:] for completion in completions)


def _number(
    row: Row, name: str, default: float, where: str, low: float | None = None, high: float | None = None
) -> float:
    value = row.get(name)
    if value is None or value == "":
        return default
    number = _finite(value, name, where)
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"in [{low}, {high}]" if high is not None else f">= {low}"
        raise BadRow(f"{where}: field {name!r} must be {bounds}, got {number}.")
    return number


def _finite(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadRow(f"{where}: field {name!r} must be a number, got {value!r:.40} ({type(value).__name__}).")
    if not math.isfinite(value):
        raise BadRow(f"{where}: field {name!r} must be finite, got {value!r}.")
    return float(value)


def _source(row: Row, where: str) -> str:
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise BadRow(f"{where}: field 'source' must be text, got {type(source).__name__}.")
    return source or ""
