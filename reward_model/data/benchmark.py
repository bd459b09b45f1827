"""Read benchmarks in the shape of RewardBench 2: one prompt, a list of correct and a list of incorrect completions."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from datasets import Dataset

from reward_model.data.comparisons import Comparison
from reward_model.data.rows import BadRow, OnBadRow, Row, rename_columns, set_aside
from reward_model.data.sources import LocatedRow, read_rows
from rlhf_ppo.chat.messages import read_text
from rlhf_ppo.chat.nested import UnreadableText

COLUMNS = ("id", "prompt", "chosen", "rejected", "num_correct", "subset")


def read_benchmark(
    source: str | Dataset | Sequence[str],
    *,
    split: str,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "stop",
) -> tuple[list[Comparison], list[dict[str, Any]]] | None:
    """The comparisons of a benchmark, and the rows that were skipped; None if the source has another shape.

    A row becomes a ranking of two ranks, the correct completions before the others, with `subset` as its source and
    `id` as its group.

    Raises:
        BadRow: A malformed row, with on_bad_row="stop".
        ValueError: `columns` has an unknown name.
    """
    rows = _renamed(read_rows(source, split=split), columns or {})
    first = next(rows)
    if isinstance(first[1], BadRow) or not _is_item(first[1]):
        return None
    if unknown := sorted(set(columns or {}) - set(COLUMNS)):
        raise ValueError(f"columns maps unknown names {unknown}: a benchmark has {list(COLUMNS)}.")
    comparisons, bad_rows = [], []
    for where, row in chain([first], rows):
        try:
            comparisons.append(_comparison(row, where))
        except BadRow as error:
            bad_rows.append(set_aside(error, where, None if row is error else row, on_bad_row))
    return comparisons, bad_rows


def _renamed(rows: Iterator[LocatedRow], columns: Mapping[str, str]) -> Iterator[LocatedRow]:
    for where, row in rows:
        yield where, rename_columns(row, columns) if isinstance(row, Mapping) else row


def _is_item(row: Row) -> bool:
    """Whether a row has lists of texts where other formats have one completion."""
    return isinstance(row, Mapping) and any(_are_texts(row.get(name)) for name in ("chosen", "rejected"))


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(text, str) for text in value)


def _comparison(row: Row | BadRow, where: str) -> Comparison:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"{where}: expected an object with named fields, got {type(row).__name__}.")
    correct, wrong = _texts(row, "chosen", where), _texts(row, "rejected", where)
    count = row.get("num_correct")
    if count is not None and count != len(correct):
        raise BadRow(f"{where}: field 'num_correct' is {count!r:.40}, but 'chosen' has {len(correct)} completions.")
    for name in ("id", "subset"):
        if not isinstance(row.get(name), str | int | None):
            raise BadRow(f"{where}: field {name!r} must be text, got {type(row[name]).__name__}.")
    try:
        prompt = read_text(row.get("prompt") or "", "prompt")
    except UnreadableText as error:
        raise BadRow(f"{where}: {error}") from error
    return Comparison(
        prompt=prompt,
        completions=(*correct, *wrong),
        ranks=(0,) * len(correct) + (1,) * len(wrong),
        source=str(row.get("subset") or ""),
        group=str(row.get("id") or ""),
        where=where,
    )


def _texts(row: Row, name: str, where: str) -> list[str]:
    value = row.get(name)
    texts = [value] if isinstance(value, str) else value
    if not _are_texts(texts):
        raise BadRow(f"{where}: field {name!r} must be a list of one or more texts, got {value!r:.60}.")
    return list(texts or [])
