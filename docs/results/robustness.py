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
        f"{found['runs']} runs of {found['iterations']} iterations were killed {found['kills']} times in total, each "
        f"at most three times. {ways.get('clock', 0)} kills came at a random time, {ways.get('file operation', 0)} "
        f"before a random one of the run's {found['file_operations_of_a_run']} file operations. After each kill the "
        "run was resumed."
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
        f"A run of {found['steps']:,} iterations writes a checkpoint every 20 iterations, evaluates every 50, "
        f"keeps the best model and logs to TensorBoard. Growth is counted from iteration {found['warm_up']}. Drift "
        "compares the median processor time of an iteration in the last quarter with that in the first. Each time is "
        "divided by the time of a fixed computation that runs between the iterations, because other jobs on the "
        "machine slow down the iteration and this computation alike. oneDNN and torch cache one kernel per shape. "
        "These caches are limited to 16 entries here. With their default of 1,024, memory grew by 86 MB from iteration "
        "200 to 1,600, and did not grow further until 2,000."
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
    origin = (
        "This page has the results of two long tests of [stopping and resuming](../robustness.md). Both train a "
        "GPT-2 of 40,000 parameters on one CPU thread."
    )
    parts = ["# Kills and soak", "", origin, ""]
    for name, write in (("kill-campaign", kills), ("soak", soak)):
        path = HERE / f"{name}.json"
        parts += write(json.loads(path.read_text())) if path.exists() else []
    (HERE / "robustness.md").write_text("\n".join(parts))
