"""The fuzzing campaign: `python -m tests.fuzz.campaign --cases 30000`; the same command goes on where it was stopped.

Batches of 500 cases are numbered; what they found is added to the results file after each, so nothing is counted twice.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

BATCH = 500
MEMORY = Path("/dev/shm")
"""Where files live while the campaign runs, if there is such a place: a disk would be slow."""
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "fuzzing.json"


def targets() -> dict[str, Callable[[Path], Any]]:
    """Entry points by name; imported late, so that `--help` is quick."""
    from tests.fuzz import checkpoint_cases, config_cases, dataset_cases, step_cases

    return {
        "step": step_cases.target, "config": config_cases.target, "dataset": dataset_cases.target,
        "checkpoint": checkpoint_cases.target,
    }  # fmt: skip


def add(row: dict[str, Any], tally: Any) -> None:
    """Add a batch to a target's row of the results."""
    row["batches"] = row.get("batches", 0) + 1
    for name in ("cases", "refused", "accepted"):
        row[name] = row.get(name, 0) + getattr(tally, name)
    row["cpu_seconds"] = round(row.get("cpu_seconds", 0.0) + tally.seconds, 1)
    row["longest_ms"] = round(max(row.get("longest_ms", 0.0), tally.longest_ms), 1)
    for kind in ("findings", "outcomes"):
        for name, count in getattr(tally, kind).items():
            row.setdefault(kind, {})[name] = row.get(kind, {}).get(name, 0) + count
    for name, example in tally.examples.items():
        row.setdefault("examples", {}).setdefault(name, example)


def main() -> None:
    """Run until every target has its cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=30_000, help="of each target")
    parser.add_argument("--target", nargs="*", help="names; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    wishes = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    import torch

    from tests.fuzz.harness import run_batch

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    found: dict[str, Any] = json.loads(wishes.results.read_text()) if wishes.results.exists() else {}
    for name, build in targets().items():
        row = found.setdefault(name, {})
        if wishes.target and name not in wishes.target:
            continue
        if row.get("cases", 0) >= wishes.cases:
            continue
        folder = TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None)
        target = build(Path(folder.name))
        while row.get("cases", 0) < wishes.cases:
            add(row, run_batch(target, row.get("batches", 0), min(BATCH, wishes.cases)))
            command = ["git", "rev-parse", "--short", "HEAD"]
            found["about"] = {
                "commit": subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip(),
                "versions": {
                    package: version(package) for package in ("hypothesis", "torch", "transformers", "datasets")
                },
            }
            aside = wishes.results.with_suffix(".tmp")
            aside.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
            aside.replace(wishes.results)
            print(name, row["cases"], "cases", sum(row.get("findings", {}).values()), "findings", flush=True)
        folder.cleanup()


if __name__ == "__main__":
    main()
