"""Collect rows of all layouts into comparisons; single answers wait for the others to their prompt."""

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from reward_model.data.comparisons import Comparison, parse_recognized
from reward_model.data.layouts import Recognized, recognize
from reward_model.data.pairs import label_number, pairs_from_labels
from reward_model.data.rows import BadRow, OnBadRow, Row, checked_row, rename_columns, set_aside, with_class_names
from reward_model.data.sources import LocatedRow
from reward_model.data.threads import MessageThreads

_LIKE_A_PROMPT = re.compile(r"(^|_)(prompt|question|instruction|query|context|input|history|post|messages)$")


@dataclass
class _Answers:
    """The rated answers of one prompt: where the first was, its row, and the ratings of each answer."""

    where: str
    row: dict[str, Any]
    ratings: dict[str, tuple[Any, list[float]]] = field(default_factory=dict)


class Collector:
    """Sorts rows into comparisons, answers that wait for others of their prompt, labeled texts, and bad rows."""

    def __init__(self, columns: Mapping[str, str], on_bad_row: OnBadRow, *, group: str | None = None) -> None:
        """Set up the collector.

        Args:
            columns: Our column names -> the source's.
            group: The source's column of what is held out together.
        """
        self.columns = columns
        self.on_bad_row = on_bad_row
        self.group = group
        self.rows = 0
        self.undecided = 0
        """Rows without a verdict, or without another answer to compare with."""
        self.bad_rows: list[dict[str, Any]] = []
        self.names: set[str] = set()
        """Columns of the source."""
        self.seen: set[str] = set()
        """Columns of the source with a value in some row."""
        self.texts: set[str] = set()
        """Those of them that hold texts or lists."""
        self.used: set[str] = {group} if group else set()
        self._comparisons: list[Comparison] = []
        self._answers: dict[str, _Answers] = {}
        self._threads = MessageThreads()
        self._texts: list[str] = []
        self._labels: list[float] = []

    def read(self, rows: Iterable[LocatedRow]) -> None:
        """Take all rows; a BadRow at a malformed one, with on_bad_row="stop"."""
        for where, row in rows:
            self.rows += 1
            with self._guard(where, None if isinstance(row, BadRow) else row):
                self._take(row, where)

    def comparisons(self, *, seed: int, pair_rounds: int) -> list[Comparison]:
        """All comparisons; single answers become one for each prompt, labeled texts become pairs.

        Raises:
            BadRow: Answers of one prompt are malformed, with on_bad_row="stop".
            ValueError: Labeled texts have fewer than two labels.
        """
        found = list(self._comparisons)
        for where, row in [*self._rankings(), *self._threads.rankings()]:
            recognized = Recognized(kind="comparison", row=row, used=frozenset(), group=row.get("group", ""))
            with self._guard(where, row):
                found.append(parse_recognized(recognized, where))
        self.undecided += self._threads.alone
        if self._texts and self.group:
            raise ValueError(
                f"group={self.group!r} cannot hold out labeled texts: they are paired across groups. Give them a "
                "`prompt`, or leave group out."
            )
        if self._texts:
            found += pairs_from_labels(self._texts, self._labels, seed=seed, rounds=pair_rounds)
        return found

    def check_prompts(self) -> None:
        """Raise a ValueError if a column looks like a prompt and is not read, where comparisons have none."""
        lost = sorted(name for name in self.texts - self.used if _LIKE_A_PROMPT.search(name.lower()))
        bare = sum(not comparison.prompt for comparison in self._comparisons)
        if lost and bare:
            raise ValueError(
                f"columns {lost} look like prompts and are not read, and {bare} comparisons have no prompt: what was "
                f"asked would be lost. Map the column, --columns prompt={lost[0]}, or leave it out, --columns "
                f"{lost[0]}= (columns= in Python)."
            )

    def unused_columns(self) -> tuple[str, ...]:
        """Columns that no row was read from."""
        return tuple(sorted(self.seen - self.used))

    @contextmanager
    def _guard(self, where: str, row: Any) -> Iterator[None]:
        """Context manager: a bad row is set aside, or raises."""
        try:
            yield
        except BadRow as error:
            self.bad_rows.append(set_aside(error, where, row, self.on_bad_row))

    def _take(self, row: Row | BadRow, where: str) -> None:
        row = with_class_names(checked_row(row, where))
        self.names |= set(map(str, row))
        self.seen |= {str(name) for name, value in row.items() if value not in (None, "")}
        self.texts |= {str(name) for name, value in row.items() if value and isinstance(value, str | list)}
        recognized = recognize(rename_columns(row, self.columns), where)
        mapped = {ours: theirs for ours, theirs in self.columns.items() if theirs in row}
        self.used |= {mapped.get(name, name) for name in recognized.used}
        self.used |= {ours for ours, theirs in self.columns.items() if not theirs}  # left out on purpose
        match recognized.kind:
            case "undecided":
                self.undecided += 1
            case "rated":
                self._add_answer(recognized.row, self._group(row), where)
            case "thread":
                self._threads.add(recognized.row, where, self._group(row))
            case "labeled":
                self._add_text(recognized.row, where)
            case "comparison":
                recognized = replace(recognized, group=self._group(row) or recognized.group)
                self._comparisons.append(parse_recognized(recognized, where))

    def _group(self, row: Row) -> str:
        """The row's group; "" where it has none: empty cells are nothing that rows have in common."""
        value = None if self.group is None else row.get(self.group)
        is_empty = value is None or value == "" or (isinstance(value, float) and value != value)
        return "" if is_empty else json.dumps(value, sort_keys=True, default=str)

    def _add_text(self, row: Row, where: str) -> None:
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"{where}: field 'text' must be text that is not empty, got {text!r:.40}.")
        self._labels.append(label_number(row["label"], where))
        self._texts.append(text)

    def _add_answer(self, row: Row, group: str, where: str) -> None:
        key = json.dumps([row["prompt"], row.get("tools")], sort_keys=True, default=str)
        rating = label_number(row["label"], where)
        answers = self._answers.setdefault(key, _Answers(where, {**row, "group": group}))
        text = json.dumps(row["completion"], sort_keys=True, default=str)
        answers.ratings.setdefault(text, (row["completion"], []))[1].append(rating)

    def _rankings(self) -> Iterator[tuple[str, Row]]:
        """The answers of each prompt as a ranking by their mean ratings, if these differ."""
        for answers in self._answers.values():
            completions, ratings = zip(*answers.ratings.values(), strict=True)
            scores = [statistics.mean(values) for values in ratings]  # exact: equal ratings stay equal
            if len(set(scores)) < 2:
                self.undecided += sum(map(len, ratings))
                continue
            yield answers.where, {**answers.row, "completions": list(completions), "scores": scores}
