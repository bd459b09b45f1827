"""Collect finished run folders into docs/results/<name>.json and the table docs/results/<name>.md.

python docs/results/collect.py sentiment runs/seed0 runs/seed1 runs/seed2 --title "..." --command "..."
"""

import argparse
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "datasets")
MEASURES = ("vader", "classifier", "score", "kl", "distinct_1", "distinct_2", "repetition", "perplexity", "length")


def collect(folders: list[Path], command: str, revision: str, note: str) -> dict[str, Any]:
    """Everything needed to read the figures later: settings, commit, versions, machine, every seed."""
    commit = subprocess.run(["git", "rev-parse", revision], capture_output=True, text=True, check=True).stdout.strip()
    runs = []
    for folder in folders:
        rows = _rows(folder / "metrics.jsonl")
        settings = _read(folder / "config.json")
        runs.append(
            {
                "config": {name: value for name, value in settings.items() if name not in ("output_dir", "threads")},
                "evaluation": _read(folder / "evaluation.json"),
                "seconds_in_ppo": sum(row["time/iteration"] for row in rows),
                "samples": _rows(folder / "samples.jsonl")[:5],
                "largest_rollout_kl": max(row["objective/kl"] for row in rows),
            }
        )
    return {
        "command": command,
        "note": note,
        "commit": commit,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()} CPU, no GPU",
        "runs": runs,
    }


def table(title: str, found: dict[str, Any]) -> str:
    """Markdown: one row for each seed, each measure before -> after training."""
    head = ["seed", *MEASURES, "PPO, s"]
    lines = [
        f"# {title}",
        "",
        f"`{found['command']}`",
        "",
        fill(
            f"The table shows means over held-out prompts, before → after training, ± standard error. {found['note']}",
            160,
        ),
        "",
    ]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for run in found["runs"]:
        before, after = run["evaluation"]["before"], run["evaluation"]["after"]
        cells = [_cell(before.get(name), after.get(name)) for name in MEASURES]
        lines.append(f"| {run['config']['seed']} | {' | '.join(cells)} | {run['seconds_in_ppo']:.0f} |")
    lines += ["", "The first five held-out prompts, without any selection:", ""]
    lines += ["| prompt | before | after |", "|---|---|---|"]
    for sample in found["runs"][0]["samples"]:
        lines.append(f"| {_text(sample['prompt'])} | {_text(sample['before'])} | {_text(sample['after'])} |")
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in (*PACKAGES, "python"))
    return "\n".join([*lines, "", f"Commit {found['commit'][:12]}; {found['machine']}; {versions}.", ""])


def _cell(before: dict[str, float] | None, after: dict[str, float] | None) -> str:
    if before is None or after is None:
        return "–"
    return f"{before['mean']:.3g} → **{after['mean']:.3g}** ± {after['stderr']:.2g}"


def _text(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--commit", default="HEAD", help="what the runs were made with")
    parser.add_argument("--note", default="", help="what a reader of the table must know")
    wishes = parser.parse_args()
    here = Path(__file__).parent
    result = collect(wishes.folders, wishes.command, wishes.commit, wishes.note)
    (here / f"{wishes.name}.json").write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    (here / f"{wishes.name}.md").write_text(table(wishes.title, result))
