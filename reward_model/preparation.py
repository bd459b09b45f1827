"""Load, pair, deduplicate and split comparisons for training and evaluation, and count what was left out."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from reward_model.data import COLUMNS, Comparison, parse_row
from reward_model.pairs import label_number, pairs_from_labels
from reward_model.rows import BadRow, OnBadRow, Row, rename_columns, set_aside
from reward_model.sources import LocatedRow, read_rows


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of the rows of a source, by what was done with them."""

    rows: int = 0
    bad: int = 0
    """Malformed rows that were skipped; they are in the side file with the reason."""
    duplicates: int = 0
    """Comparisons that were dropped because an earlier one is equal."""
    contradictions: int = 0
    """Pairs whose reverse is in the data as well; both are kept."""
    comparisons: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.comparisons} comparisons from {self.rows} rows ({self.bad} malformed skipped, {self.duplicates} "
            f"duplicates dropped, {self.contradictions} contradicted by their reverse)"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedComparisons:
    """Comparisons of a source, with the counts and the rows that were skipped."""

    comparisons: list[Comparison]
    report: DataReport
    bad_rows: list[dict[str, Any]]
    """Location, reason and content of each row that was skipped."""


def load_comparisons(
    source: str | Dataset,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "stop",
    seed: int = 0,
    pair_rounds: int = 1,
) -> LoadedComparisons:
    """Load a source: read and check rows, pair labeled texts, drop duplicates.

    Args:
        source: See `read_rows`.
        split: Split of a folder or hub dataset.
        columns: Our column names -> the source's.
        on_bad_row: `stop` raises at the first malformed row; `skip` counts it and continues.
        seed: Seed of the pairs of labeled texts.
        pair_rounds: Maximum of pairs per labeled text.

    Raises:
        BadRow: A malformed row, with on_bad_row="stop".
        ValueError: `columns` has an unknown name, or there is no usable comparison.
    """
    unknown = sorted(set(columns or {}) - set(COLUMNS))
    if unknown:
        raise ValueError(f"columns maps unknown names {unknown}: the left side must be one of {list(COLUMNS)}.")
    reader = _Reader(columns or {}, on_bad_row)
    reader.read(read_rows(source, split=split))
    comparisons = reader.comparisons
    if reader.texts:
        comparisons = comparisons + pairs_from_labels(reader.texts, reader.labels, seed=seed, rounds=pair_rounds)
    if not comparisons:
        raise ValueError(f"No usable comparison in {reader.rows} rows: {len(reader.bad_rows)} were malformed.")
    kept = drop_duplicates(comparisons)
    report = DataReport(
        rows=reader.rows,
        bad=len(reader.bad_rows),
        duplicates=len(comparisons) - len(kept),
        contradictions=_contradictions(kept),
        comparisons=len(kept),
    )
    return LoadedComparisons(comparisons=kept, report=report, bad_rows=reader.bad_rows)


def drop_duplicates(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Drop all but the first of equal comparisons."""
    return list({comparison.key(): comparison for comparison in reversed(comparisons)}.values())[::-1]


def split_by_prompt(
    comparisons: Sequence[Comparison], *, fraction: float, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Split into (train, held-out) such that no prompt, or without prompts no completion, is in both.

    Args:
        comparisons: All of them.
        fraction: Share that is held out, in (0, 1), up to the size of one group.
        seed: Seed of the choice.

    Raises:
        ValueError: A side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The held-out fraction must be in (0, 1), got {fraction}.")
    groups = _linked_groups(comparisons)
    random.Random(seed).shuffle(groups)
    held_out: list[int] = []
    for group in groups:
        if len(held_out) >= fraction * len(comparisons):
            break
        held_out += group
    if not held_out or len(held_out) == len(comparisons):
        raise ValueError(
            f"{len(comparisons)} comparisons share prompts in {len(groups)} groups: too few to hold out {fraction:.0%} "
            "by prompt. Give more data, or an evaluation source of its own."
        )
    chosen = set(held_out)
    train = [comparison for index, comparison in enumerate(comparisons) if index not in chosen]
    return train, [comparisons[index] for index in sorted(chosen)]


def write_bad_rows(bad_rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write skipped rows to a side file, one JSON object per line."""
    lines = [json.dumps(row, default=str, ensure_ascii=False)[:20_000] + "\n" for row in bad_rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


class _Reader:
    """Sorts rows into comparisons, labeled texts and bad rows."""

    def __init__(self, columns: Mapping[str, str], on_bad_row: OnBadRow) -> None:
        self.columns = columns
        self.on_bad_row = on_bad_row
        self.rows = 0
        self.comparisons: list[Comparison] = []
        self.texts: list[str] = []
        self.labels: list[float] = []
        self.bad_rows: list[dict[str, Any]] = []

    def read(self, rows: Iterable[LocatedRow]) -> None:
        for where, row in rows:
            self.rows += 1
            try:
                self._take(row, where)
            except BadRow as error:
                self.bad_rows.append(set_aside(error, where, None if row is error else row, self.on_bad_row))

    def _take(self, row: Row | BadRow, where: str) -> None:
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, Mapping):
            raise BadRow(f"{where}: expected an object with named fields, got {type(row).__name__}.")
        row = rename_columns(row, self.columns)
        if "label" in row and "chosen" not in row and "completions" not in row:
            text = row.get("text")
            if not isinstance(text, str) or not text.strip():
                raise BadRow(f"{where}: field 'text' must be text that is not empty, got {text!r:.40}.")
            self.labels.append(label_number(row["label"], where))
            self.texts.append(text)
        else:
            self.comparisons.append(parse_row(row, where))


def _contradictions(comparisons: Sequence[Comparison]) -> int:
    pairs = [c for c in comparisons if c.is_pair and not c.is_tie]
    keys = {json.dumps([c.prompt, c.completions], sort_keys=True) for c in pairs}
    return sum(json.dumps([c.prompt, c.completions[::-1]], sort_keys=True) in keys for c in pairs)


def _linked_groups(comparisons: Sequence[Comparison]) -> list[list[int]]:
    """Group the indices of comparisons that share a prompt or, without prompts, directly or indirectly a completion."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = []
    for comparison in comparisons:
        names = [comparison.prompt_key()] if comparison.prompt else [json.dumps(t) for t in comparison.completions]
        for name in names[1:]:
            parent[root(name)] = root(names[0])
        keys.append(names[0])
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(root(key), []).append(index)
    return list(groups.values())
