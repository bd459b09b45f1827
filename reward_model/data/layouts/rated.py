"""Layouts of one answer or message in a row."""

from collections.abc import Mapping
from typing import Any

from reward_model.data.layouts.base import (
    CONVERSATION_NAMES,
    PROMPT_NAMES,
    Layout,
    are_objects,
    is_unanswered,
    messages_of_cell,
    prompt_columns,
    text_source,
)
from reward_model.data.rows import Row

ANSWER_NAMES = ("completion", "response", "answer", "output", "text")
RATING_NAMES = ("label", "score", "rating", "helpfulness", "kto_tag", "reward")


def rated_columns(row: Row) -> tuple[str, str] | None:
    """The columns of the answer and of its rating, if the row has a rating and one answer, with its prompt or in it."""
    rating = next((name for name in RATING_NAMES if row.get(name) is not None), None)
    if any(row.get(name) for name in PROMPT_NAMES):
        answer = next((name for name in ANSWER_NAMES if row.get(name) is not None), None)
    else:
        answer = next((name for name in CONVERSATION_NAMES if _is_answered(row.get(name))), None)
    return (answer, rating) if answer and rating else None


def _is_answered(value: Any) -> bool:
    value = messages_of_cell(value)
    return are_objects(value) and len(value) > 1 and not is_unanswered(value)


def _rated(row: Row) -> dict[str, Any]:
    answer, rating = rated_columns(row) or ("", "")
    prompt, completion = prompt_columns(row)[0], row[answer]
    if answer in CONVERSATION_NAMES:
        turns = messages_of_cell(completion)
        prompt, completion = list(turns[:-1]), [turns[-1]]
    return {
        "prompt": prompt, "completion": completion, "label": row[rating], "source": text_source(row, "source"),
        "tools": row.get("tools"),
    }  # fmt: skip


def _thread(row: Row) -> dict[str, Any]:
    return dict(row)


RATED = Layout(name="rated answers", needs=(), uses=("source", "tools"), kind="rated", convert=_rated)
THREADS = (
    Layout(
        name="OpenAssistant messages", needs=("message_id", "text", "role"),
        uses=("parent_id", "rank", "deleted", "lang"), kind="thread", convert=_thread,
    ),
    Layout(
        name="OpenAssistant trees", needs=("message_tree_id", "prompt"), kind="thread", convert=_thread,
        fits=lambda row: isinstance(row["prompt"], Mapping),
    ),
)  # fmt: skip
