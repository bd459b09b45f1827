"""Parse rows of preference data into `Comparison`s; malformed rows raise `BadRow`."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from reward_model.data.layouts import Recognized, recognize
from reward_model.data.prompt_split import split_prompt
from reward_model.data.rows import BadRow, Row, checked_row, read_number
from rlhf_ppo.chat.cells import parse_cell, parse_literal
from rlhf_ppo.chat.messages import Text, is_empty, read_text, read_tools
from rlhf_ppo.chat.nested import UnreadableText

__all__ = ["BadRow", "Comparison", "Row", "as_comparisons", "parse_row"]

LONGEST_TEXT = 1_000_000
"""Characters above which a text is taken for a mistake (a whole file in one field)."""
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": None}
Result = TypeVar("Result")


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
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that the conversation may call."""
    group: str = ""
    """What is held out together, if not the prompt."""
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
        said = [self.prompt, self.completions, self.ranks, self.preference, *([self.tools] if self.tools else [])]
        return json.dumps(said, sort_keys=True, default=list)

    def prompt_key(self) -> str:
        """The prompt as one string; "" if there is none."""
        return json.dumps(self.prompt, sort_keys=True, default=list) if self.prompt else ""


def parse_row(row: Row, where: str) -> Comparison:
    """Parse one row of preference data; a BadRow if a field is missing or malformed."""
    return parse_recognized(recognize(checked_row(row, where), where), where)


def parse_recognized(recognized: Recognized, where: str) -> Comparison:
    """Parse a row that `recognize` has converted; errors as of `parse_row`."""
    if recognized.kind == "undecided":
        raise BadRow(f"{where}: the row prefers none of its completions: it says nothing.")
    if recognized.kind != "comparison":
        raise BadRow(
            f"{where}: the row holds a single completion, which is compared with others of its prompt: load all rows "
            "together by load_comparisons."
        )
    is_ranked = recognized.row.get("completions") not in (None, "")
    comparison = (_ranked if is_ranked else _pair)(recognized.row, where)
    return replace(comparison, group=recognized.group)


def _pair(row: Row, where: str) -> Comparison:
    chosen, rejected = _text(row["chosen"], "chosen", where), _text(row["rejected"], "rejected", where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(f"{where}: field 'rejected' must be of the same kind as 'chosen': both text or both messages.")
    prompt, (chosen, rejected) = _split(row, (chosen, rejected), where)
    if chosen == rejected:
        raise BadRow(f"{where}: fields 'chosen' and 'rejected' are identical: the pair says nothing.")
    return Comparison(
        prompt=prompt,
        completions=(chosen, rejected),
        ranks=(0, 0) if _tie(row, where) else (0, 1),
        margin=_number(row, "margin", 0.0, where),
        weight=_number(row, "weight", 1.0, where, low=0.0),
        preference=_number(row, "preference", 1.0, where, low=0.0, high=1.0),
        source=_source(row, where),
        tools=() if isinstance(chosen, str) else _tools(row, where),
        where=where,
    )


def as_comparisons(rows: Iterable[Row | Comparison], name: str) -> list[Comparison]:
    """Rows, a `datasets.Dataset` or comparisons as comparisons; a BadRow names the first bad one, `name` row N."""
    return [
        row if isinstance(row, Comparison) else parse_row(row, f"{name} row {index}") for index, row in enumerate(rows)
    ]


def _ranked(row: Row, where: str) -> Comparison:
    completions = _list(row["completions"])
    if not isinstance(completions, list | tuple) or len(completions) < 2:
        raise BadRow(f"{where}: field 'completions' must be a list of two or more, got {completions!r:.60}.")
    texts = [_text(text, f"completions[{index}]", where) for index, text in enumerate(completions)]
    if len({isinstance(text, str) for text in texts}) > 1:
        raise BadRow(f"{where}: field 'completions' mixes texts and messages.")
    name = "ranks" if row.get("ranks") is not None else "scores"
    values = _list(row.get(name))
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
    prompt, split = _split(row, texts, where)
    places = {(json.dumps(text, sort_keys=True), value) for text, value in zip(split, signed, strict=True)}
    if len({text for text, _ in places}) < len(places) or (len(split) == 2 and split[0] == split[1]):
        raise BadRow(f"{where}: field 'completions' holds the same completion twice, with different {name}.")
    return Comparison(
        prompt=prompt,
        completions=tuple(split[index] for index in order),
        ranks=tuple(levels[signed[index]] for index in order),
        weight=_number(row, "weight", 1.0, where, low=0.0),
        source=_source(row, where),
        tools=() if isinstance(split[0], str) else _tools(row, where),
        where=where,
    )


def _text(value: Any, name: str, where: str) -> Text:
    """A non-empty text or list of messages."""
    text = _read(read_text, _read(parse_cell, value, name, where), name, where)
    for content in [text] if isinstance(text, str) else [message["content"] or "" for message in text]:
        if len(content) > LONGEST_TEXT:
            raise BadRow(f"{where}: field {name!r} has {len(content):,} characters, more than {LONGEST_TEXT:,}.")
        if "\x00" in content:
            raise BadRow(f"{where}: field {name!r} holds a zero byte: it is binary data, not text.")
    if is_empty(text):
        what = "" if isinstance(text, str) else ": its last message has no content"
        raise BadRow(f"{where}: field {name!r} is empty{what}.")
    return text


def _split(row: Row, completions: Sequence[Text], where: str) -> tuple[Text, tuple[Text, ...]]:
    prompt = _prompt(row, where)
    return _read(lambda texts, _: split_prompt(prompt, texts), completions, "", where)


def _prompt(row: Row, where: str) -> Text | None:
    """The prompt of a row; None if it has none."""
    value = row.get("prompt")
    if value is None or (isinstance(value, str | list | tuple) and not len(value)):
        return None
    text = _read(parse_cell, value, "prompt", where)
    if isinstance(text, str) and not text.strip():
        return _read(read_text, text, "prompt", where)
    return _text(text, "prompt", where)


def _tools(row: Row, where: str) -> tuple[Mapping[str, Any], ...]:
    tools = _read(read_tools, row.get("tools"), "tools", where)
    return tuple(tools or ())


def _read(reader: Callable[[Any, str], Result], value: Any, name: str, where: str) -> Result:
    """What `reader` reads; what it cannot read is a bad row."""
    try:
        return reader(value, name)
    except UnreadableText as error:
        raise BadRow(f"{where}: {error}") from error


def _list(value: Any) -> Any:
    """A list, which tables hold as text."""
    return (parse_literal(value) or value) if isinstance(value, str) else value


def _tie(row: Row, where: str) -> bool:
    tie = row.get("tie")
    if isinstance(tie, str):
        tie = _BOOLEANS.get(tie.strip().lower(), tie)
    if tie is not None and not isinstance(tie, bool) and tie not in (0, 1):
        raise BadRow(f"{where}: field 'tie' must be true or false, got {tie!r:.40}.")
    return bool(tie)


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
    number = read_number(value)
    if not math.isfinite(number):
        raise BadRow(f"{where}: field {name!r} must be a finite number, got {value!r:.40} ({type(value).__name__}).")
    return number


def _source(row: Row, where: str) -> str:
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise BadRow(f"{where}: field 'source' must be text, got {type(source).__name__}.")
    return str(_read(read_text, source or "", "source", where))
