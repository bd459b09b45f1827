"""Layouts of one answer or message in a row, which becomes a comparison with the others of its prompt."""

from collections.abc import Mapping
from typing import Any

from reward_model.data.layouts.base import PROMPT_NAMES, Layout, prompt_columns, text_source
from reward_model.data.rows import Row

ANSWER_NAMES = ("completion", "response", "answer", "output", "text")
RATING_NAMES = ("label", "score", "rating", "helpfulness")


def rated_columns(row: Row) -> tuple[str, str] | None:
    """The columns of the answer and of its rating, if the row has a prompt, one answer and a rating."""
    if not any(row.get(name) for name in PROMPT_NAMES):
        return None
    answer = next((name for name in ANSWER_NAMES if row.get(name) is not None), None)
    rating = next((name for name in RATING_NAMES if row.get(name) is not None), None)
    return (answer, rating) if answer and rating else None


def _rated(row: Row) -> dict[str, Any]:
    answer, rating = rated_columns(row) or ("", "")
    source = text_source(row, "source")
    return {"prompt": prompt_columns(row)[0], "completion": row[answer], "label": row[rating], "source": source}


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
