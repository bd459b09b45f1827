"""Write docs/results/robustness.md from kill-campaign.json and soak.json: `python docs/results/robustness.py`."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def kills(found: dict[str, Any]) -> list[str]:
    """The campaign as Markdown."""
    rows = [f"| {name} | {count} |" for name, count in sorted(found["by_phase"].items(), key=lambda item: -item[1])]
    ways = found["by_way"]
    text = (
        f"{found['kills']} kills of {found['runs']} runs of {found['iterations']} iterations, up to three kills a run. "
        f"{ways.get('clock', 0)} came at a random time, {ways.get('file operation', 0)} before a random one of the "
        f"run's {found['file_operations_of_a_run']} file operations."
    )
    same = "Runs that ended with the weights, metrics, best model and frontier of an undisturbed run, bit for bit"
    return [
        "## Kill -9", "", "`python -m tests.robustness.kill_campaign`", "", text, "", "| | |", "|---|---|",
        f"| {same} | {found['equal']} of {found['runs']} |",
        f"| Unreadable checkpoints | {found['unreadable']} |",
        f"| Kills after which the newest checkpoint was gone | {found['lost']} |", "",
        "| Killed during | Kills |", "|---|---|", *rows, "",
    ]  # fmt: skip


def soak(found: dict[str, Any]) -> list[str]:
    """The soak as Markdown."""
    verdict, rows = found["verdict"], found["rows"]
    shown = [row for row in rows if row["iteration"] % 200 == 0]
    text = (
        f"{found['steps']:,} iterations with a checkpoint every 20, an evaluation every 50, a kept best model and "
        f"TensorBoard. Growth is counted from iteration {found['warm_up']}; drift is the median of the last quarter "
        "against that of the first, in processor time over that of a fixed computation done in turn with the "
        "iterations, which others on the machine slow down alike. The caches of kernels, one a shape, of oneDNN and of "
        "torch are held at 16 entries. At their own 1,024 they grew by 86 MB from iteration 200 to 1,600, and no "
        "more until 2,000."
    )
    return [
        "## Soak", "", "`python -m tests.robustness.soak`", "", text, "",
        "| | Found | Limit |", "|---|---|---|",
        f"| Growth of resident memory | {verdict['rss_growth']:+.2%} | 1 % |",
        f"| Growth of open files | {verdict['open_files_growth']:+.0f} | 0 |",
        f"| Growth of threads | {verdict['threads_growth']:+.0f} | 0 |",
        f"| Drift of processor time an iteration | {verdict['cpu_drift']:+.1%} | 5 % |", "",
        "| Iteration | Resident, MB | Open files | Processor, ms an iteration |", "|---|---|---|---|",
        *(f"| {row['iteration']} | {row['rss_mb']:.1f} | {row['open_files']} | {row['cpu_ms']:.1f} |" for row in shown),
        "",
    ]  # fmt: skip


if __name__ == "__main__":
    origin = "A GPT-2 of 40,000 parameters on one CPU thread; what the figures are about is [here](../robustness.md)."
    parts = ["# Kills and soak", "", origin, ""]
    for name, write in (("kill-campaign", kills), ("soak", soak)):
        path = HERE / f"{name}.json"
        parts += write(json.loads(path.read_text())) if path.exists() else []
    (HERE / "robustness.md").write_text("\n".join(parts))
