"""Score prompt-response texts with a trained reward model: `python -m reward_model.score --help`."""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from reward_model.commands import named_model, parse, run
from reward_model.data import BadRow
from reward_model.documented import documented
from reward_model.ensemble import load_reward_model
from reward_model.sources import read_rows

logger = logging.getLogger(__name__)


@documented
@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Reward model, data to score and output file."""

    model: str
    """Folder of a reward model or an ensemble, or another maker's reward model (or its first argument)."""
    label: str | None = None
    """Which label's logit is the score, by name or index; only for another maker's classifier with several labels."""
    data: str
    """Rows with `response` (and `prompt`): a .jsonl, .json, .csv, .tsv or .parquet file, a folder, or a hub name."""
    split: str = "train"
    """Split of a folder or hub dataset."""
    output: str = "-"
    """JSONL file for the rows with their `score`; - is standard output."""
    caution: float = 0.0
    """Standard deviations over the members that an ensemble's score is lowered by."""


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Score every row and write it with its score."""
    (config,) = parse(
        (ScoreConfig,),
        named_model(arguments),
        program="python -m reward_model.score",
        description="Score prompt-response texts with a trained reward model.",
    )
    model = load_reward_model(config.model, caution=config.caution, label=config.label)
    rows = []
    for where, row in read_rows(config.data, split=config.split):
        if isinstance(row, BadRow):
            raise row
        if row.get("response") is None:
            raise BadRow(f"{where}: field 'response' is missing; the row has {sorted(map(str, row))}.")
        rows.append(dict(row))
    scores = model([row.get("prompt") or "" for row in rows], [row["response"] for row in rows])
    with ExitStack() as stack:
        file = (
            sys.stdout if config.output == "-" else stack.enter_context(Path(config.output).open("w", encoding="utf-8"))
        )
        for row, score in zip(rows, scores, strict=True):
            file.write(json.dumps(row | {"score": score}, ensure_ascii=False) + "\n")
    return scores


if __name__ == "__main__":
    run(main)
