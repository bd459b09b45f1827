"""Tell the layout of a row from its columns, and convert it to ours."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reward_model.data.layouts import argilla
from reward_model.data.layouts.answers import (
    BEST_OF_K,
    LIST_NAMES,
    LISTS,
    OBJECTS,
    PAIRS,
    SCORE_NAMES,
    SIDE_BY_SIDE,
    WINNER_NAMES,
    is_best_of_k,
    list_columns,
    object_column,
    score_columns,
    sides,
    winner_column,
)
from reward_model.data.layouts.base import (
    CONVERSATION_NAMES,
    PROMPT_NAMES,
    SYSTEM_NAMES,
    Kind,
    Layout,
    is_blank,
    messages_of_cell,
    prepend_system_message,
    prompt_columns,
    system_messages,
)
from reward_model.data.layouts.public_sets import PUBLIC_SETS
from reward_model.data.layouts.rated import ANSWER_NAMES, RATED, RATING_NAMES, THREADS, rated_columns
from reward_model.data.rows import BadRow, Row, with_lower_names

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "tools", "margin", "weight", "preference", "tie", "source")
RANKED_COLUMNS = ("prompt", "completions", "ranks", "scores", "tools", "weight", "source")
LABELED_COLUMNS = ("text", "label", "source")
OWN_COLUMNS = tuple(dict.fromkeys((*PAIR_COLUMNS, *RANKED_COLUMNS, *LABELED_COLUMNS)))
_OTHER = (
    *PROMPT_NAMES, *CONVERSATION_NAMES, "input", *SYSTEM_NAMES, *ANSWER_NAMES, *RATING_NAMES, *LIST_NAMES,
    *SCORE_NAMES, *(name for pair in PAIRS for name in pair),
)  # fmt: skip
_NAMED = tuple(name for layout in (*PUBLIC_SETS, *THREADS, BEST_OF_K) for name in (*layout.needs, *layout.uses))
COLUMNS = tuple(dict.fromkeys((*OWN_COLUMNS, *_OTHER, *_NAMED)))
"""Every column that some layout reads."""


@dataclass(frozen=True, kw_only=True)
class Recognized:
    """A row under our column names."""

    kind: Kind
    row: Row
    used: frozenset[str]
    """Columns of the original row that were read."""
    group: str = ""
    """What is held out together, if the layout says."""


def recognize(row: Row, where: str) -> Recognized:
    """Tell what `row` is and convert it; a BadRow if it has no known layout, or a malformed value."""
    if argilla.question_column(row) and argilla.fields(row):
        return _converted(argilla.ARGILLA, row, where, argilla.used_columns(row))
    if is_best_of_k(row):
        return _converted(BEST_OF_K, row, where, (*BEST_OF_K.uses, "chosen", "rejected", *prompt_columns(row)[1]))
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _own(row, PAIR_COLUMNS)
    if _given(row, "completions") and (_given(row, "ranks") or _given(row, "scores")):
        return _own(row, RANKED_COLUMNS)
    for layout in (*PUBLIC_SETS, *THREADS):
        if layout.matches(row):
            return _converted(layout, row, where, (*layout.needs, *layout.uses))
    _, prompt_used = prompt_columns(row)
    if name := object_column(row):
        return _converted(OBJECTS, row, where, (name, "source", *prompt_used))
    if found := list_columns(row):
        return _converted(LISTS, row, where, (*found, *prompt_used))
    if (names := sides(row)) and (verdicts := winner_column(row) or score_columns(row, names)):
        return _converted(SIDE_BY_SIDE, row, where, (*names, *verdicts, *prompt_used))
    for pair in PAIRS:
        if all(row.get(name) is not None for name in pair):
            own = _own({**row, "chosen": row[pair[0]], "rejected": row[pair[1]]}, PAIR_COLUMNS)
            return replace(own, used=own.used | set(pair))
    if _is_undecided(row):
        return Recognized(kind="undecided", row=row, used=frozenset(map(str, row)))
    if columns := rated_columns(row):
        return _converted(RATED, row, where, (*columns, *RATED.uses, *prompt_used))
    if "label" in row and "text" in row:
        return Recognized(kind="labeled", row=row, used=frozenset(LABELED_COLUMNS))
    if _given(row, "completions"):
        return _own(row, RANKED_COLUMNS)
    return _otherwise(row, where)


def _otherwise(row: Row, where: str) -> Recognized:
    """Recognize a row of no layout by its names in lower case, or raise a BadRow."""
    lower = with_lower_names(row)
    if lower is not None:
        found_lower = recognize(lower, where)
        used = frozenset(name for name in row if str(name).strip().lower() in found_lower.used)
        return replace(found_lower, used=used)
    missing = next(name for name in ("chosen", "rejected") if row.get(name) is None)
    empty = sorted(str(name) for name, value in row.items() if value in (None, ""))
    raise BadRow(
        f"{where}: field {missing!r} is {'empty' if missing in row else 'missing'}; the row has "
        f"{sorted(map(str, row))}{f', of which {empty} are empty' if empty else ''}. A pair needs 'chosen' and "
        "'rejected' (and 'prompt' unless they hold it); map other names with --columns."
    )


def _is_undecided(row: Row) -> bool:
    """Whether a row has all of a layout but its verdict or rating, which is empty."""
    is_judged = bool(sides(row)) and is_blank(row, *WINNER_NAMES)
    would_be_rated = rated_columns(row) is None and rated_columns({**row, RATING_NAMES[0]: 0}) is not None
    lacks_rating = would_be_rated and is_blank(row, *RATING_NAMES)
    lacks_label = _given(row, "text") and "label" in row and is_blank(row, "label") and rated_columns(row) is None
    return (
        is_judged
        or lacks_rating
        or lacks_label
        or any(layout.verdict and layout.lacks_verdict(row) for layout in PUBLIC_SETS)
    )


def _given(row: Row, name: str) -> bool:
    return row.get(name) not in (None, "")


def _own(row: Row, columns: tuple[str, ...]) -> Recognized:
    """A row under our names; the prompt may stand under another, and a list in `preference` is none of ours."""
    used = set(columns)
    changed: dict[str, Any] = {}
    prompt, prompt_used = prompt_columns(row)
    if prompt_used and prompt_used != ("prompt",):
        changed["prompt"] = prompt
        used |= set(prompt_used)
    said = system_messages(row)
    answers = {name: messages_of_cell(row.get(name)) for name in ("chosen", "rejected")}
    if not prompt_used and said is not None and isinstance(answers["chosen"], list | tuple):
        used |= set(SYSTEM_NAMES)
        changed |= {
            name: prepend_system_message(said, messages)
            for name, messages in answers.items()
            if isinstance(messages, list | tuple)
        }
    if row.get("source") is None and isinstance(row.get("subset"), str):  # as RewardBench has it
        changed["source"] = row["subset"]
        used.add("subset")
    if isinstance(row.get("preference"), list | tuple | Mapping):
        changed["preference"] = None
        used.discard("preference")
    return Recognized(kind="comparison", row={**row, **changed} if changed else row, used=frozenset(used))


def _converted(layout: Layout, row: Row, where: str, used: tuple[str, ...]) -> Recognized:
    try:
        converted = layout.convert(row)
    except ValueError as error:
        raise BadRow(f"{where}: {error} The row has the columns of {layout.name}.") from error
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise BadRow(
            f"{where}: the row has the columns of {layout.name}, but not its values ({type(error).__name__}: "
            f"{error!s:.80}). Map the columns with --columns, or repair the row."
        ) from error
    if converted is None:
        return Recognized(kind="undecided", row=row, used=frozenset(used))
    for name in ("tools", "weight", "margin"):  # ours, whatever the layout
        if row.get(name) is not None and layout.kind == "comparison":
            converted.setdefault(name, row[name])
            used = (*used, name)
    group = str(converted.pop("group", ""))
    return Recognized(kind=layout.kind, row=converted, used=frozenset(used), group=group)
