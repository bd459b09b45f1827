"""Tables of docs/performance.md and docs/results/performance.md: `python -m tests.benchmarks.table`."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.switches import SWITCHES, USUAL

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "performance.md", DOCS / "results" / "performance.md")
PROCESSORS = {
    "performance": "AMD EPYC (AVX-512, bfloat16)", "performance-zen4": "AMD EPYC (Zen 4)",
    "performance-avx2": "AMD EPYC (Zen 3)", "performance-intel": "Intel Xeon",
}  # fmt: skip
SIDES = {"ours": "rlhf_ppo", "bf16": "rlhf_ppo, bfloat16", "plain": "plain path", "classic": "TRL 0.11.4"}
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
    head = ["workload", "", *SIDES.values(), "TRL / ours", "TRL / ours in bfloat16", "plain / ours"]
    rows = []
    for name, entry in found.items():
        for phase, cost in PHASES.items():
            of = {side: [cost(costs[side]) for costs in entry["rounds"] if side in costs] for side in SIDES}
            cells = [_median(values) if values else "" for values in of.values()]
            pairs_of = (("classic", "ours"), ("classic", "bf16"), ("plain", "ours"))
            ratios = [_ratio(of[other], of[own]) for other, own in pairs_of]
            rows.append([name, phase, *cells, *ratios])
    return _table(head, rows)


def summary(_: dict[str, Any]) -> str:
    """TRL's CPU time of an iteration over ours: a row for each processor."""
    cost = PHASES["**iteration**"]
    head, rows = ["processor"], []
    for file, processor in PROCESSORS.items():
        found = json.loads((DOCS / "results" / f"{file}.json").read_text(encoding="utf-8"))
        cells = {}
        for name, entry in found.items():
            for side, suffix in (("ours", ""), ("bf16", ", bfloat16")):
                of = {
                    kind: [cost(costs[kind]) for costs in entry["rounds"] if kind in costs]
                    for kind in (side, "classic")
                }
                cells[f"{name}{suffix}"] = _ratio(of["classic"], of[side])
        head = ["processor", *(head[1:] or cells)]
        rows.append([processor, *(cells.get(column, "") for column in head[1:])])
    return _table(head, rows)


def floors(found: dict[str, Any]) -> str:
    """The update beside its bare matrix products, and counted work."""
    head = ["workload", "update, CPU s", "bare products, CPU s", "update / products"]
    head += ["with weights alone, CPU s", "update / those", "those by torch's own, CPU s", "update / torch's own"]
    head += ["trunk / real tokens", "head rows / response tokens"]
    rows = []
    for name, side, entry in [(name, side, entry) for name, entry in found.items() for side in ("ours", "bf16")]:
        rounds = [costs for costs in entry["rounds"] if side in costs]
        if not rounds:
            continue
        of = [costs[side] for costs in rounds]
        # Taken in turns with its products, step by step; earlier rounds measured them one behind the other.
        updates = [costs["floor"].get("update", costs["step"]["update"]) for costs in of]
        bounds = {way: [costs["floor"][way] for costs in of] for way in ("fastest", "torch")}
        # Attention runs in float32 on either side.
        attention = [costs["ours"]["floor"]["attention"] for costs in rounds]
        bounds["all"] = [sum(both) for both in zip(bounds["fastest"], attention, strict=True)]
        work = of[-1]["work"]
        passes = work["work/real_tokens"] / entry["tokens"]
        cells = [
            cell for way in ("all", "fastest", "torch") for cell in (_median(bounds[way]), _ratio(updates, bounds[way]))
        ]
        padding = work["work/trunk_tokens"] / work["work/real_tokens"]
        heads = work["work/head_rows"] / passes / entry["response_tokens"]
        words = name if side == "ours" else f"{name}, bfloat16"
        rows.append([words, _median(updates), *cells, f"{padding:.3f}", f"{heads:.3f}"])
    return _table(head, rows)


def equality(found: dict[str, Any]) -> str:
    """How far apart the sides' results were, at worst over rounds."""
    head = ["workload", "compared with", "statistics", "clipped fractions", "log-probabilities, nats"]
    head += ["parameter change", "rounds"]
    rows = []
    for name, entry in found.items():
        for side in ("classic", "plain", "bf16"):
            gaps = [costs["equal"][side] for costs in entry["rounds"] if side in costs["equal"]]
            if gaps:
                whats = ("statistics", "clipped", "logprobs", "change")
                worst = [max((gap[what] for gap in gaps if what in gap), default=None) for what in whats]
                cells = ("with the statistics" if gap is None else f"{gap:.0e}" if gap else "0" for gap in worst)
                rows.append([name, SIDES[side], *cells, str(len(gaps))])
    return _table(head, rows)


def conditions(found: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    lines = []
    for name, entry in found.items():
        versions = ", ".join(f"{package} {number}" for package, number in entry["versions"].items())
        settings = f", settings {json.dumps(entry['ours'])}" if entry["ours"] else ""
        # Measured before the change itself was committed.
        change = f" with the change of {entry['with'][:12]}" if "with" in entry else ""
        shape = entry["workload"]
        lines.append(
            f"- `{name}`: {shape['layers']} layers of width {shape['width']}, vocabulary {shape['vocab']:,}, "
            f"{shape['rows']} prompts of {shape['prompt']} tokens, {entry['response_tokens']:,} response tokens "
            f"(at most {shape['cap']} each), minibatches of {shape['minibatch']}, {shape['epochs']} epochs, "
            f"{shape['dtype']}{settings}. Commit {entry['commit'][:12]}{change}; {entry['machine']}; threads: "
            f"{entry['threads']}; {versions}."
        )
    return "\n".join(lines)


def pairs(found: dict[str, Any]) -> str:
    """An epoch of reward-model training."""
    sides = ("ours", "plain", "classic")
    head = ["", *(SIDES[side] for side in sides), "TRL / ours", "plain / ours", "rounds"]
    rows = []
    measures = {"CPU s": "cpu", "wall s": "wall", "peak memory of the process, MiB": "peak_mib"}
    for entry in found.values():
        for words, name in measures.items():
            of = {side: [costs[side][name] for costs in entry["rounds"]] for side in sides}
            ratios = [_ratio(of[other], of["ours"]) for other in ("classic", "plain")]
            rows.append([words, *map(_median, of.values()), *ratios, str(len(of["ours"]))])
    return _table(head, rows)


def generation(found: dict[str, Any]) -> str:
    """The decode loop against `model.generate`, one batch each."""
    head = ["model, lengths", "`generate`, CPU s", "`DecodeLoop`, CPU s", "ratio", "rounds"]
    rows = []
    for name, entry in found.items():
        loop, generate = ([costs[way] for costs in entry["rounds"]] for way in ("by_loop", "by_generate"))
        rows.append([name, _median(generate), _median(loop), _ratio(generate, loop), str(len(loop))])
    return _table(head, rows)


def scaling(found: dict[str, Any]) -> str:
    """Cost per unit of work at each size, and relative to the smallest."""
    head = ["", "size", "CPU per unit", "of the smallest", "memory beyond weights, gradients, moments, MiB"]
    units = {
        "rows": ("responses; µs a real token", "microseconds_per_token"),
        "vocabulary": ("vocabulary, minibatches of 8; ns an LM-head MFLOP", "update_ns_per_head_mflop"),
        "vocabulary-larger": ("vocabulary, minibatches of 16; ns an LM-head MFLOP", "update_ns_per_head_mflop"),
    }
    rows = []
    for name, entry in found.items():
        per_size = {size: [costs[size] for costs in entry["rounds"]] for size in entry["rounds"][0]}
        words, unit = units[name]
        first = [costs[unit] for costs in next(iter(per_size.values()))]
        for size, costs in per_size.items():
            spent = [cost[unit] for cost in costs]
            memory = _median([cost["peak_mib"] for cost in costs])
            rows.append([words, f"{int(size):,}", _median(spent), _ratio(spent, first), memory])
    return _table(head, rows)


def learning(found: dict[str, Any]) -> str:
    """Held-out score and KL of each seed on either path, of the seeds that both have run."""
    head = ["seed", "score, fast", "score, plain", "KL, fast", "KL, plain"]
    fast, plain = (found["runs"][path] for path in ("fast", "plain"))
    rows = [[seed, *(f"{path[seed][what]:.2f}" for what in ("score", "kl") for path in (fast, plain))] for seed in fast]
    means = [f"{found['verdict'][what][path]:.2f}" for what in ("score", "kl") for path in ("fast", "plain")]
    gaps = "; ".join(
        f"{what}: means {gap['distance']:.2f} apart, standard deviation over seeds {gap['spread']:.2f}"
        for what, gap in found["verdict"].items()
    )
    return f"{_table(head, [*rows, ['mean', *means]])}\n\n{gaps}. Commit {found['commit'][:12]}."


def kernels(found: dict[str, Any]) -> str:
    """What an iteration takes with each fast path off, relative to everything on."""
    head = ["fast path", "module", "what it replaces"]
    head += [f"{name}, {what}" for name in USUAL for what in ("time", "peak")] + ["elsewhere", ""]
    names = dict.fromkeys(path for entry in found.values() for path in entry["paths"])
    rows = []
    for path in sorted(names, key=lambda name: list(SWITCHES).index(name) if name in SWITCHES else len(SWITCHES)):
        entries = {name: entry["paths"][path] for name, entry in found.items() if path in entry["paths"]}
        cells = {name: (_time_off(entry), _peak_off(entry)) for name, entry in entries.items()}
        words = next(iter(entries.values()))
        elsewhere = [f"{name}: {', '.join(cell)}" for name, cell in cells.items() if name not in USUAL]
        usual = [cell for name in USUAL for cell in cells.get(name, ("", ""))]
        verdict = SWITCHES[path].kept_for or "kept" if path in SWITCHES else "deleted"
        rows.append([path, f"`{words['module']}`", words["twin"], *usual, "; ".join(elsewhere), verdict])
    return _table(head, rows)


def _time_off(entry: dict[str, Any]) -> str:
    """CPU time without over with: of optimizer steps that took turns, where there are, else of iterations."""
    if entry["pairs"]:
        on, off = zip(*(step for epoch in entry["pairs"] for step in epoch), strict=True)
        return f"{_ratio(off, on)}*"
    return _ratio(*([pair[side]["cpu"] for pair in entry["rounds"]] for side in ("off", "on")))


def _peak_off(entry: dict[str, Any]) -> str:
    ratios = [pair["off"]["peak_mib"] / pair["on"]["peak_mib"] for pair in entry["rounds"]]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


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
    if len(ratios) == 1:
        return f"{ratios[0]:.2f} (one round)"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _median(values: Sequence[float]) -> str:
    value = statistics.median(values)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8"), DOCS / "results"), encoding="utf-8")
