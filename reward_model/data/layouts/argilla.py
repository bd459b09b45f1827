"""Read Argilla's exports: annotators' answers to a question become a ranking of the fields that hold the completions.

Versions before 2 write a column `preference` with `{"user_id", "value", "status"}` for each annotator; version 2 writes
`preference.responses`. A value names the best field, or ranks the fields.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from reward_model.data.layouts.answers import side_of, sides
from reward_model.data.layouts.base import Layout, as_list, prompt_columns, ranking_columns
from reward_model.data.rows import Row


def question_column(row: Row) -> str | None:
    """The column that holds annotators' answers, or None."""
    for name, value in row.items():
        if isinstance(name, str) and name.endswith(".responses") and (value is None or as_list(value) is not None):
            return name
        if isinstance(name, str) and isinstance(value, list | tuple) and not name.endswith((".users", ".status")):
            one_by_one = bool(value) and all(isinstance(item, Mapping) and "value" in item for item in value)
            is_answered = one_by_one and not any("from" in item for item in value)
            if is_answered or (not value and f"{name}-suggestion" in row):
                return name
    return None


def fields(row: Row) -> list[str]:
    """The columns that hold the completions."""
    has_pair = all(isinstance(row.get(name), str) for name in ("chosen", "rejected"))
    return sides(row) or (["chosen", "rejected"] if has_pair else [])


def used_columns(row: Row) -> tuple[str, ...]:
    """The columns that the conversion reads."""
    question = question_column(row) or ""
    stem = question.removesuffix(".responses")
    return (question, f"{stem}.suggestion", f"{stem}-suggestion", *fields(row), *prompt_columns(row)[1])


def _convert(row: Row) -> dict[str, Any] | None:
    names, question = fields(row), question_column(row) or ""
    votes = list(_votes(row, question, names))
    if not votes:
        return None
    ranks = {name: sum(vote[name] for vote in votes) / len(votes) for name in names}
    return ranking_columns(prompt_columns(row)[0], [row[name] for name in names], [-ranks[name] for name in names])


def _votes(row: Row, question: str, names: list[str]) -> Iterator[dict[str, float]]:
    """The rank of each field, for each annotator; the suggestion's, if nobody answered."""
    answers = row[question]
    if question.endswith(".responses"):
        stem = question.removesuffix(".responses")
        answers, suggestion = as_list(answers), row.get(f"{stem}.suggestion")
    else:
        answers = [item["value"] for item in answers if item.get("status") in (None, "submitted")]
        suggestion = row.get(f"{question}-suggestion")
    for answer in answers or ([suggestion] if suggestion else []):
        yield _ranks(answer, names, question)


def _ranks(answer: Any, names: list[str], question: str) -> dict[str, float]:
    if isinstance(answer, Mapping) and isinstance(answer.get("rank"), list):  # as `datasets` turns lists of objects
        answer = [{"rank": rank, "value": value} for rank, value in zip(answer["rank"], answer["value"], strict=False)]
    if isinstance(answer, list | tuple):
        places = [
            item if isinstance(item, Mapping) else {"rank": place, "value": item} for place, item in enumerate(answer)
        ]
        found = {side_of(item.get("value"), names): float(item.get("rank") or 0) for item in places}
    else:
        best = side_of(answer, names)
        found = {best: 0.0} if best is None else {name: float(name != best) for name in names}
    if set(found) != set(names):
        raise ValueError(f"field {question!r} must name or rank the fields {names}, got {answer!r:.60}.")
    return {name: found[name] for name in names}


ARGILLA = Layout(name="Argilla", needs=(), convert=_convert)
