"""Load comparisons from a source: read, check, pair, drop duplicates, and count what was left out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from reward_model.data.collecting import Collector
from reward_model.data.comparisons import Comparison
from reward_model.data.layouts import COLUMNS, OWN_COLUMNS
from reward_model.data.rows import OnBadRow, check_mapping, json_line
from reward_model.data.sources import read_rows
from reward_model.data.splitting import describe_split, split_by_prompt
from reward_model.utils.commands import column_names
from reward_model.utils.options import DataOptions

__all__ = [
    "DataReport", "LoadedComparisons", "describe_split", "drop_duplicates", "load_comparisons", "load_data",
    "split_by_prompt", "write_bad_rows",
]  # fmt: skip


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
    undecided: int = 0
    """Rows that prefer nothing: all answers equal, no verdict, or no other answer to the prompt."""
    comparisons: int = 0
    unused_columns: tuple[str, ...] = ()
    """Columns of the source that were not read."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        undecided = f", {self.undecided} undecided left out" if self.undecided else ""
        return (
            f"{self.comparisons} comparisons from {self.rows} rows ({self.bad} malformed skipped, {self.duplicates} "
            f"duplicates dropped, {self.contradictions} contradicted by their reverse{undecided})"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedComparisons:
    """Comparisons of a source, with the counts and the rows that were skipped."""

    comparisons: list[Comparison]
    report: DataReport
    bad_rows: list[dict[str, Any]]
    """Location, reason and content of each row that was skipped."""


def load_data(data: DataOptions, **options: Any) -> LoadedComparisons:
    """Load the comparisons that a command's options name, with further `options` of `load_comparisons`."""
    given = {"split": data.split, "encoding": data.encoding, "on_bad_row": data.on_bad_row}
    return load_comparisons(data.data, columns=column_names(data.columns), **(given | options))


def load_comparisons(
    source: str | Dataset | Sequence[str],
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    on_bad_row: OnBadRow = "stop",
    seed: int = 0,
    pair_rounds: int = 1,
    group: str | None = None,
) -> LoadedComparisons:
    """Load a source: read and check rows, pair labeled texts, drop duplicates.

    Args:
        source: See `read_rows`.
        split: Split of a folder or hub dataset.
        columns: Our column names -> the source's; "" leaves a column out.
        encoding: Encoding of text files; None: what a byte order mark says, or UTF-8.
        on_bad_row: `stop` raises at the first malformed row; `skip` counts it and continues.
        seed: Seed of the pairs of labeled texts.
        pair_rounds: Maximum of pairs per labeled text.
        group: The source's column of what is held out together; None: the prompt.

    Raises:
        BadRow: A malformed row, with on_bad_row="stop".
        ValueError: `columns` or `group` names a column that does not exist, or there is no usable comparison.
    """
    columns = columns or {}
    unknown = sorted(name for name, theirs in columns.items() if theirs and name not in COLUMNS)
    if unknown:
        raise ValueError(
            f"columns maps unknown names {unknown}: the left side must be one of {list(OWN_COLUMNS)}, or a column of a "
            "public dataset that is read by its shape."
        )
    collector = Collector(columns, on_bad_row, group=group)
    collector.read(read_rows(source, split=split, encoding=encoding))
    _check_columns(collector, columns, group)
    collector.check_prompts()
    comparisons = collector.comparisons(seed=seed, pair_rounds=pair_rounds)
    if not comparisons:
        first = f" The first malformed one: {collector.bad_rows[0]['error']}" if collector.bad_rows else ""
        raise ValueError(
            f"No usable comparison in {collector.rows} rows: {len(collector.bad_rows)} were malformed, "
            f"{collector.undecided} prefer nothing or have no other answer to their prompt to be compared with.{first}"
        )
    kept = drop_duplicates(comparisons)
    report = DataReport(
        rows=collector.rows,
        bad=len(collector.bad_rows),
        duplicates=len(comparisons) - len(kept),
        contradictions=_contradictions(kept),
        undecided=collector.undecided,
        comparisons=len(kept),
        unused_columns=collector.unused_columns(),
    )
    return LoadedComparisons(comparisons=kept, report=report, bad_rows=collector.bad_rows)


def _check_columns(collector: Collector, columns: Mapping[str, str], group: str | None) -> None:
    if len(collector.bad_rows) == collector.rows:
        return
    check_mapping(columns, collector.names)
    if group is not None and group not in collector.names:
        raise ValueError(f"group names {[group]}, which no row has; the rows have {sorted(collector.names)}.")


def drop_duplicates(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Drop all but the first of equal comparisons."""
    return list({comparison.key(): comparison for comparison in reversed(comparisons)}.values())[::-1]


def write_bad_rows(bad_rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write skipped rows to a side file, one JSON object per line."""
    lines = [json_line(row) for row in bad_rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def _contradictions(comparisons: Sequence[Comparison]) -> int:
    pairs = [c for c in comparisons if c.is_pair and not c.is_tie]
    keys = {json.dumps([c.prompt, c.completions], sort_keys=True) for c in pairs}
    return sum(json.dumps([c.prompt, c.completions[::-1]], sort_keys=True) in keys for c in pairs)
