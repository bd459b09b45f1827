"""Tables of docs/performance.md from docs/results/performance*.json: `python -m tests.benchmarks.table`."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "performance.md"
SIDES = {"ours": "rlhf_ppo", "plain": "plain path", "classic": "TRL 0.11.4"}
PHASES: dict[str, Callable[[dict[str, Any]], float]] = {
    "generate": lambda costs: costs["generate"]["cpu"],
    "score": lambda costs: costs["step"]["score"],
    "update": lambda costs: costs["step"]["update"],
    "**iteration**": lambda costs: costs["generate"]["cpu"] + costs["step"]["cpu"],
    "iteration, wall": lambda costs: costs["generate"]["wall"] + costs["step"]["wall"],
    "peak memory, MiB": lambda costs: max(costs["generate"]["peak_mib"], costs["step"]["peak_mib"]),
}


def iterations(found: dict[str, Any]) -> str:
    """One PPO iteration: a row for each workload and phase."""
    head = ["workload", "", *SIDES.values(), "TRL / ours", "plain / ours"]
    rows = []
    for name, entry in found.items():
        for phase, cost in PHASES.items():
            of = {side: [cost(costs[side]) for costs in entry["rounds"] if side in costs] for side in SIDES}
            cells = [_number(statistics.median(values)) if values else "" for values in of.values()]
            ratios = [_ratio(of[side], of["ours"]) for side in ("classic", "plain")]
            rows.append([name, phase, *cells, *ratios])
    return _table(head, rows)


def floors(found: dict[str, Any]) -> str:
    """The update beside its bare matrix products, work counters, and how equal the results were."""
    head = [
        "workload",
        "update, CPU s",
        "bare products, CPU s",
        "update / products",
        "trunk / real tokens",
        "head rows / response tokens",
    ]
    head += ["statistics differ by", "log-probabilities", "parameter change", "rounds"]
    rows = []
    for name, entry in found.items():
        updates = [costs["ours"]["step"]["update"] for costs in entry["rounds"]]
        bounds = [costs["ours"]["floor"]["floor"] for costs in entry["rounds"]]
        work = entry["rounds"][-1]["ours"]["work"]
        passes = work["work/real_tokens"] / entry["tokens"]
        gaps = {
            what: max(gap[what] for costs in entry["rounds"] for gap in costs["equal"].values())
            for what in ("statistics", "logprobs", "change")
        }
        rows.append(
            [
                name, _number(statistics.median(updates)), _number(statistics.median(bounds)), _ratio(updates, bounds),
                f"{work['work/trunk_tokens'] / work['work/real_tokens']:.3f}",
                f"{work['work/head_rows'] / passes / entry['response_tokens']:.3f}",
                *(f"{gap:.0e}" for gap in gaps.values()), str(len(entry["rounds"])),
            ]
        )  # fmt: skip
    return _table(head, rows)


def conditions(found: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    lines = []
    for name, entry in found.items():
        versions = ", ".join(f"{package} {number}" for package, number in entry["versions"].items())
        settings = f", settings {json.dumps(entry['ours'])}" if entry["ours"] else ""
        shape = entry["workload"]
        lines.append(
            f"- `{name}`: {shape['layers']} layers of width {shape['width']}, vocabulary {shape['vocab']:,}, "
            f"{shape['rows']} prompts of {shape['prompt']} tokens, {entry['response_tokens']:,} response tokens "
            f"(at most {shape['cap']} each), minibatches of {shape['minibatch']}, {shape['epochs']} epochs, "
            f"{shape['dtype']}{settings}. Commit {entry['commit'][:12]}; {entry['machine']}; threads: "
            f"{entry['threads']}; {versions}."
        )
    return "\n".join(lines)


def written(page: str, results: Path) -> str:
    """The page with every block `<!-- begin: FILE FUNCTION -->` ... `<!-- end -->` made anew."""

    def block(match: re.Match[str]) -> str:
        file, function = match["file"], match["function"]
        path = results / f"{file}.json"
        table = (
            globals()[function](json.loads(path.read_text(encoding="utf-8"))) if path.exists() else "Not measured yet."
        )
        return f"<!-- begin: {file} {function} -->\n\n{table}\n\n<!-- end -->"

    pattern = r"<!-- begin: (?P<file>[\w-]+) (?P<function>\w+) -->.*?<!-- end -->"
    return re.sub(pattern, block, page, flags=re.DOTALL)


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median of the rounds' ratios and their range; rounds that only one side took part in do not count."""
    ratios = [one / other for one, other in zip(above, below, strict=False)]
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), DOCS / "results"), encoding="utf-8")
