"""The command `python -m reward_model.preview`, which shows how preference data is read."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from reward_model.data.comparisons import Comparison
from reward_model.utils.commands import parse, run, table
from reward_model.utils.options import DataOptions

if TYPE_CHECKING:
    from reward_model.data.preparation import LoadedComparisons


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(DataOptions):
    """Data to show."""

    group: str | None = None
    """Column whose equal values are held out together."""
    on_bad_row: Literal["stop", "skip"] = "skip"
    """At a malformed row: count it and go on, or stop with its location."""
    show: int = 3
    """How many comparisons and bad rows to print."""
    seed: int = 0
    """Seed of the pairs drawn from labeled texts."""


def main(arguments: Sequence[str] | None = None) -> "LoadedComparisons":
    """Read the data, print what became of it, and return it."""
    (config,) = parse(
        (PreviewConfig,),
        arguments,
        program="python -m reward_model.preview",
        description="Show how preference data is read: counts, columns that are not used, the first comparisons.",
        examples="  python -m reward_model.preview --data preferences.jsonl --show 5",
    )
    from reward_model.data.preparation import load_data  # torch comes with it

    loaded = load_data(config, seed=config.seed, group=config.group)
    kinds = Counter(_kind(comparison) for comparison in loaded.comparisons)
    lines = {"data": str(loaded.report), "kinds": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())}
    if loaded.report.unused_columns:
        lines["not used"] = "columns " + ", ".join(loaded.report.unused_columns)
    for comparison in loaded.comparisons[: config.show]:
        lines[comparison.where or f"pair {len(lines)}"] = _shown(comparison)
    for bad_row in loaded.bad_rows[: config.show]:
        lines[f"{bad_row['where']} (bad)"] = bad_row["error"]
    print(table(lines))  # noqa: T201  the command's answer
    return loaded


def _kind(comparison: Comparison) -> str:
    form = "texts" if isinstance(comparison.completions[0], str) else "conversations"
    what = "ties" if comparison.is_tie else "pairs" if comparison.is_pair else "rankings"
    return f"{what} of {form}"


def _shown(comparison: Comparison) -> str:
    parts = [("prompt", comparison.prompt), *zip(map(str, comparison.ranks), comparison.completions, strict=True)]
    return "  ".join(f"{name}: {json.dumps(text, ensure_ascii=False, default=dict):.100}" for name, text in parts)


if __name__ == "__main__":
    run(main, alone=True)
