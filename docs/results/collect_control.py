"""The page docs/results/control.md and its plot, from the files that tests/benchmarks/control.py left.

python docs/results/collect_control.py
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
Run = dict[str, Any]

FIGURES = (
    # runs, task, measure, least, aim, published
    ("pendulum-clip", "InvertedPendulum-v5, 61k, ppo-clip", "deterministic", "each ≥ 950", 950, "CleanRL 963 ± 22, 1M"),
    ("pendulum-trpo", "InvertedPendulum-v5, 61k, trpo", "deterministic", "each ≥ 950", 950, "–"),
    ("cartpole-clip", "CartPole-v1, 102k, ppo-clip", "last_100", "≥ 475", 475, "CleanRL 490 ± 6 at 500k"),
    ("hopper-clip", "Hopper-v5, 1M, ppo-clip", "last_100", "≥ 2000, none < 1000", 2400, "CleanRL 2383 ± 272"),
    ("walker-clip", "Walker2d-v5, 1M, ppo-clip", "last_100", "≥ 1700", 2300, "CleanRL 2288 ± 572"),
    ("cheetah-clip", "HalfCheetah-v5, 1M, ppo-clip", "last_100", "≥ 1300", 1600, "CleanRL 1443 ± 46"),
    ("hopper-trpo", "Hopper-v5, 300k, trpo", "last_100", "≥ 1500", 1800, "–"),
)  # fmt: skip
INTRODUCTION = """\
This page shows the returns of all measured runs of [control](../control.md). `python tests/benchmarks/control.py`
made the runs (one process, one thread, on a machine with other jobs). `python docs/results/collect_control.py` wrote
this page. `docs/results/control/` holds one JSON file per run, with its settings, curve, commit and versions.

Unless a table says otherwise, a return is the mean of the last hundred *training* episodes, with sampled actions and
raw rewards. CleanRL publishes this mean, too. Evaluations with the most likely action usually give higher returns."""
PUBLISHED = """\
For InvertedPendulum, the goals "must" and "aim" refer to ten deterministic episodes; for the other tasks, to
training returns. The published figures are for other versions of the tasks (v4) and of MuJoCo. Three seeds say
little about the spread."""
SAME = """\
Both libraries ran with the same settings: two networks of 64 x 64 (tanh, orthogonal initialization), eight
environments, 2048 steps per batch, minibatches of 64, ten epochs, Adam with ε = 1e-5 and a rate annealed to 0,
normalized observations and rewards (`VecNormalize`), one thread. For TRPO, both used a KL of 0.01 and a learning
rate of 1e-3 for the critic, and otherwise their defaults."""
WORLDS = """\
Does randomization in training help in other worlds? Hopper-v5 was trained for 1M steps with ppo-clip, with and
without randomization: mass and friction x 0.7 to 1.3, motors x 0.8 to 1.2, sensor noise 0.01, sampled for every
episode. Each policy was evaluated on twenty deterministic episodes per world. Except for the first, the worlds are
outside the ranges of training. A cell shows the mean of each seed; the number in brackets is their mean in percent of
the mean in the first world."""
SINCE = """\
- PPO on InvertedPendulum, seed 0, repeated at f7d49d0, agrees in every number but the time. TRPO does not agree:
since 54495a6 the damping no longer shortens its step, so the step is longer."""
SPREAD = """\
The KL is the mean over minibatches of ½ (log π_θ - log π_old)². "no clip" uses the unclipped ratio for ten epochs.
Differences within the spread of the seeds say nothing."""
PAIRS = (
    ("hopper-clip", "Hopper-v5, 1M, PPO"),
    ("walker-clip", "Walker2d-v5, 1M, PPO"),
    ("cheetah-clip", "HalfCheetah-v5, 1M, PPO"),
    ("hopper-trpo", "Hopper-v5, 300k, TRPO"),
)
ENOUGH = 900


def page(runs: dict[str, Run]) -> str:
    """All of it; a part whose runs are not there yet says so."""
    parts = [
        "# Control: measured runs",
        INTRODUCTION,
        "## Returns",
        *_figures(runs),
        "![Learning curves](../assets/control.png)",
        "## Beside Stable-Baselines3",
        *_comparison(runs),
        "## Domain randomization",
        *_randomization(runs),
        "## What each part is worth",
        *_ablations(runs),
        "## Where the numbers come from",
        *_origin(runs),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(runs: dict[str, Run]) -> Iterable[str]:
    rows = []
    for name, task, measure, least, aim, published in FIGURES:
        found = seeds(runs, name)
        if not found:
            continue
        values = [_value(run, measure) for run in found]
        reached = "yes" if np.mean(values) >= aim else "no"
        greedy = [run["deterministic"]["mean"] for run in found]
        rows.append(
            [task, _list(values), f"**{np.mean(values):.0f}**", _list(greedy), least, f"{aim}: {reached}", published]
        )
    yield table(["task", "each seed", "mean", "deterministic", "must", "aim: reached", "published"], rows)
    yield PUBLISHED


def _comparison(runs: dict[str, Run]) -> Iterable[str]:
    rows = []
    for name, task in PAIRS:
        ours, theirs = seeds(runs, name), seeds(runs, f"sb3-{name}")
        if not theirs:
            continue
        rows.append([task, _returns(ours), _returns(theirs), _speed(ours), _speed(theirs)])
    yield (
        table(["task", "return", "return of SB3", "steps per CPU s", "steps per CPU s of SB3"], rows)
        if rows
        else "Not run yet."
    )
    pairs = [
        (ours["steps_per_cpu_second"], theirs["steps_per_cpu_second"])
        for ours, theirs in zip(seeds(runs, "speed-ours"), seeds(runs, "speed-sb3"), strict=False)
    ]
    if pairs:
        yield (
            "SB3 is Stable-Baselines3. On Hopper-v5 with 102k steps, both libraries also ran in turns on one machine. "
            f"rlhf_ppo made {', '.join(str(ours) for ours, _ in pairs)} environment steps per CPU second, and SB3 "
            f"{', '.join(str(theirs) for _, theirs in pairs)}; the ratios are "
            f"{', '.join(f'{ours / theirs:.2f}' for ours, theirs in pairs)}."
        )
    yield SAME


def _randomization(runs: dict[str, Run]) -> Iterable[str]:
    plain, worlds = seeds(runs, "hopper-clip"), seeds(runs, "hopper-randomized")
    if not worlds:
        yield "Not run yet."
        return
    rows = []
    for shift in worlds[0]["shifts"]:
        cells = [[run["shifts"][shift]["mean"] for run in group] for group in (plain, worlds)]
        first = [[run["shifts"][next(iter(run["shifts"]))]["mean"] for run in group] for group in (plain, worlds)]
        kept = [f"{np.mean(cell) / np.mean(base):.0%}" for cell, base in zip(cells, first, strict=True)]
        rows.append([shift, f"{_list(cells[0])} ({kept[0]})", f"{_list(cells[1])} ({kept[1]})"])
    yield WORLDS
    yield table(["world", "trained without", "trained with"], rows)


def _ablations(runs: dict[str, Run]) -> Iterable[str]:
    for task, title in (("pendulum", "InvertedPendulum-v5, 61k steps"), ("hopper", "Hopper-v5, 300k steps")):
        variants = list(dict.fromkeys(name.rpartition("-")[0] for name in runs if name.startswith(f"ablation-{task}-")))
        if not variants:
            continue
        rows = []
        for variant in variants:
            found = seeds(runs, variant)
            row = [
                variant.removeprefix(f"ablation-{task}-").replace("-", " "),
                _list([run["last_20"] for run in found]),
            ]
            row.append(_list([run["deterministic"]["mean"] for run in found]))
            if task == "pendulum":
                row.append(", ".join(_steps_to(run, ENOUGH) for run in found))
            row.append(_list([run["means"].get("policy/approxkl", float("nan")) for run in found], digits=4))
            row.append(_list([run["largest"].get("policy/approxkl", float("nan")) for run in found], digits=3))
            rows.append(row)
        reached = [f"steps to {ENOUGH}"] if task == "pendulum" else []
        head = ["variant", "last 20 episodes", "deterministic", *reached, "KL of an update, mean", "largest"]
        yield (
            f"**{title}.** Each row changes one thing; the algorithm is ppo-clip unless the row names another. "
            "There is one number per seed."
        )
        yield table(head, rows)
    yield SPREAD


def _origin(runs: dict[str, Run]) -> Iterable[str]:
    commits: dict[str, set[str]] = {}
    for name, run in runs.items():
        changed = " with uncommitted changes" if run["uncommitted_changes"] else ""
        commits.setdefault(f"{run['commit'][:12]}{changed}", set()).add(name.rpartition("-")[0])
    for commit, names in commits.items():
        yield f"- Commit {commit}: {', '.join(sorted(names))}."
    versions = next(iter(runs.values()))["versions"]
    yield (
        "- " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "; x86-64 CPU, one thread, no GPU."
    )
    yield SINCE
    notes = {run["note"] for run in runs.values() if "note" in run}
    yield from (f"- {note}" for note in sorted(notes))


def draw(runs: dict[str, Run], path: Path) -> None:
    """Return of the last twenty episodes over steps, each seed a line."""
    from matplotlib.figure import Figure

    panels = [(name, task) for name, task, *_ in FIGURES if seeds(runs, name) and not name.startswith(("pend", "cart"))]
    figure = Figure(figsize=(10, 2.9 * ((len(panels) + 1) // 2)), dpi=110, layout="constrained")
    axes = np.atleast_1d(figure.subplots((len(panels) + 1) // 2, 2)).flatten()
    for axis, (name, task) in zip(axes, panels, strict=False):
        for prefix, color, label in (("sb3-", "#d9622b", "Stable-Baselines3"), ("", "#2f62c8", "rlhf_ppo")):
            for index, run in enumerate(seeds(runs, prefix + name)):
                steps, values = zip(*run["curve"], strict=True)
                axis.plot(steps, values, color=color, linewidth=1.2, label=None if index else label)
        axis.set_title(task, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    figure.savefig(path, metadata={"Software": None})


def seeds(runs: dict[str, Run], name: str) -> list[Run]:
    """Runs `name-0`, `name-1`, ... that are there."""
    return [runs[key] for key in sorted(runs) if key.rpartition("-")[0] == name and key.rpartition("-")[2].isdigit()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _value(run: Run, measure: str) -> float:
    found = run[measure]
    return float(found["mean"] if isinstance(found, dict) else found)


def _list(values: Sequence[float], digits: int = 0) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _returns(runs: Sequence[Run]) -> str:
    return f"{_list([run['last_100'] for run in runs])} (mean {np.mean([run['last_100'] for run in runs]):.0f})"


def _speed(runs: Sequence[Run]) -> str:
    return _list([run["steps_per_cpu_second"] for run in runs])


def _steps_to(run: Run, least: float) -> str:
    return next((f"{steps / 1000:.0f}k" for steps, value in run["curve"] if value >= least), "not reached")


def main() -> None:
    """Read the files, write page and plot."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "control").glob("*.json"))}
    (HERE / "control.md").write_text(page(runs))
    draw(runs, HERE.parent / "assets" / "control.png")


if __name__ == "__main__":
    main()
