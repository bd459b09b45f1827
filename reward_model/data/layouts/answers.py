"""Layouts of two or more answers in one row: side by side, in a list, as objects, and as best of K."""

import re
from typing import Any

from reward_model.data.layouts.base import (
    Layout,
    are_objects,
    as_list,
    number,
    prompt_columns,
    ranking_columns,
    text_source,
)
from reward_model.data.rows import Row, read_number

LIST_NAMES = ("responses", "generations", "answers", "outputs")
SCORE_NAMES = ("scores", "ratings", "ranks", "rating")
_OBJECT_NAMES = ("completions", *LIST_NAMES)
_ANSWER_KEYS = ("response", "answer", "text", "content", "completion", "output")
_SCORE_KEYS = ("overall_score", "fine-grained_score", "score", "rating", "rank")


def object_column(row: Row) -> str | None:
    """The column of answers as objects with a score or rank each, as UltraFeedback and Nectar have them."""
    for name in _OBJECT_NAMES:
        if are_objects(row.get(name)) and any(item.get(key) is not None for item in row[name] for key in _SCORE_KEYS):
            return name
    return None


def _objects(row: Row) -> dict[str, Any] | None:
    name = object_column(row) or ""
    rated = [item for item in row[name] if any(item.get(key) is not None for key in _SCORE_KEYS)]
    answer, score = (
        next((key for key in keys if all(item.get(key) is not None for item in rated)), None)
        for keys in (_ANSWER_KEYS, _SCORE_KEYS)
    )
    if answer is None or score is None:
        keys = _ANSWER_KEYS if answer is None else _SCORE_KEYS
        raise ValueError(f"field {name!r} must be a list of objects that all have one of {list(keys)}.")
    sign = -1 if score == "rank" else 1
    scores = [sign * number(item, score) for item in rated]
    completions, source = [item[answer] for item in rated], text_source(row, "source")
    return ranking_columns(prompt_columns(row)[0], completions, scores, source=source)


def list_columns(row: Row) -> tuple[str, str] | None:
    """The columns of a list of answers and of a list of their scores."""
    answers = next((name for name in LIST_NAMES if row.get(name) and as_list(row[name])), None)
    scores = next((name for name in SCORE_NAMES if row.get(name) and as_list(row[name])), None)
    return (answers, scores) if answers and scores else None


def _lists(row: Row) -> dict[str, Any] | None:
    answer_name, name = list_columns(row) or ("", "")
    answers, values = as_list(row[answer_name]) or [], as_list(row[name]) or []
    if len(values) != len(answers):
        raise ValueError(f"field {name!r} must hold one number for each of the answers, got {values!r:.60}.")
    rated = [(answer, value) for answer, value in zip(answers, values, strict=True) if answer and value is not None]
    scores = [number({name: value}, name) for _, value in rated]
    sign = -1 if name == "ranks" else 1
    return ranking_columns(prompt_columns(row)[0], [answer for answer, _ in rated], [sign * score for score in scores])


_SIDES = re.compile(r"(response|answer|completion|output|reply|chosen|rejected|text)[ _-]?(a|b|[0-9])?$")
WINNER_NAMES = ("winner", "preferred", "preference", "better", "choice", "verdict", "selected", "chosen", "label")
_SAID = re.compile(
    r"\[*(?:(?:model|response|assistant|answer)_?)?(\w)\]*(?:>+\w|is(?:slightly|clearly|much|significantly)?better)?"
)


def sides(row: Row) -> list[str]:
    """The columns of a row that hold answers side by side: response_a, response_b; response1, response2; ..."""
    found = [str(name) for name in row if isinstance(name, str) and (m := _SIDES.match(name)) and m[2] and row[name]]
    stems = {_SIDES.sub(r"\1", name) for name in found}
    return sorted(found) if len(found) > 1 and len(stems) == 1 else []


def side_of(value: Any, names: list[str]) -> str | None:
    """The column that a verdict names: by its name, or by what ends it (`a`, `model_a`, `[[A]]`, `A>B`, 1 of output_1).

    A letter also names columns that end in numbers, in their order; a number names no column that ends in a letter,
    because it may count from 0 or from 1.
    """
    said = str(int(value) if isinstance(value, float) and value.is_integer() else value).lower().replace(" ", "")
    ending = found[1] if (found := _SAID.fullmatch(said)) else None
    for name, letter in zip(names, "abcdefghij", strict=False):
        if said in (name.lower(), name.lower().replace("_", "")) or ending in (name[-1].lower(), letter):
            return name
    return None


def winner_column(row: Row) -> list[str]:
    """The column, if any, that says which of the answers side by side is the better one."""
    return [name for name in WINNER_NAMES if row.get(name) != "" and isinstance(row.get(name), str | int | float)][:1]


def score_columns(row: Row, names: list[str]) -> list[str]:
    """The columns with a score for each of the answers side by side: score_a, score_b; rating1, rating2; ..."""
    found = {
        name: str(column)
        for name in names
        for column in row
        if isinstance(column, str) and re.fullmatch(rf"(score|rating|reward)[ _-]?{name[-1]}", column, re.IGNORECASE)
    }
    return [found[name] for name in names] if found.keys() == set(names) else []


def is_tie(value: Any) -> bool:
    """Whether a verdict says that no answer is better, such as `tie (bothbad)` and `both_bad`."""
    words = ("tie", "both", "neither", "equal", "draw", "[[c]]", "a=b")
    return isinstance(value, str) and value.strip().lower().startswith(words)


def _side_by_side(row: Row) -> dict[str, Any] | None:
    names, column = sides(row), winner_column(row)
    prompt, _ = prompt_columns(row)
    if not column:
        return ranking_columns(prompt, [row[n] for n in names], [number(row, n) for n in score_columns(row, names)])
    value = row[column[0]]
    if is_tie(value):
        return ranking_columns(prompt, [row[name] for name in names], [0.0] * len(names))
    best = side_of(value, names)
    if best is None:
        raise ValueError(f"field {column[0]!r} must name one of {names} or be 'tie', got {value!r:.40}.")
    return ranking_columns(prompt, [row[name] for name in names], [float(name == best) for name in names])


def is_best_of_k(row: Row) -> bool:
    """Whether a row has a prompt, and lists of texts where others have one completion, as RewardBench 2."""
    row = _with_lists(row)
    return bool(prompt_columns(row)[1]) and any(
        isinstance(row.get(name), list | tuple) and texts(row, name) for name in _COUNTED
    )


def _with_lists(row: Row) -> Row:
    """`row`, if it counts completions, with lists that a table holds as text."""
    if all(row.get(count) is None for count in _COUNTED.values()):
        return row
    return {**row, **{name: as_list(row.get(name)) or row.get(name) for name in _COUNTED}}


_COUNTED = {"chosen": "num_correct", "rejected": "num_incorrect"}
"""Columns of RewardBench 2, and those that say how many completions they hold."""


def texts(row: Row, name: str) -> list[str]:
    """The texts of a column: one, or a list of them; [] if it holds anything else."""
    value = row.get(name)
    found = [value] if isinstance(value, str) else value
    are_texts = isinstance(found, list | tuple) and all(isinstance(text, str) for text in found)
    return list(found or []) if are_texts else []


def _best_of_k(row: Row) -> dict[str, Any]:
    """A ranking of two ranks: the correct completions before the others."""
    row = _with_lists(row)
    sides = {name: texts(row, name) for name in _COUNTED}
    for name, found in sides.items():
        if not found:
            raise ValueError(f"field {name!r} must be a list of one or more texts, got {row.get(name)!r:.60}.")
        count = row.get(_COUNTED[name])
        if count is not None and read_number(count) != len(found):
            raise ValueError(f"field {_COUNTED[name]!r} is {count!r:.40}, but {name!r} has {len(found)} completions.")
    for name in ("id", "subset"):
        if not isinstance(row.get(name), str | int | None):
            raise ValueError(f"field {name!r} must be text, got {type(row[name]).__name__}.")
    ranks = [0] * len(sides["chosen"]) + [1] * len(sides["rejected"])
    source, group = str(row.get("subset") or ""), str(row.get("id") or "")
    prompt, completions = prompt_columns(row)[0], sides["chosen"] + sides["rejected"]
    return {"prompt": prompt, "completions": completions, "ranks": ranks, "source": source, "group": group}


BEST_OF_K = Layout(name="RewardBench 2", needs=(), uses=("id", "subset", *_COUNTED.values()), convert=_best_of_k)
PAIRS = (
    ("chosen_response", "rejected_response"), ("better", "worse"), ("preferred", "dispreferred"),
    ("preferred_output", "non_preferred_output"), ("positive", "negative"), ("pos", "neg"),
)  # fmt: skip
"""Other names of `chosen` and `rejected`."""
SIDE_BY_SIDE = Layout(name="answers side by side", needs=(), convert=_side_by_side)
OBJECTS = Layout(name="answers as objects", needs=(), convert=_objects)
LISTS = Layout(name="answers in a list", needs=(), convert=_lists)
