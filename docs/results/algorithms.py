"""Run the sentiment recipe with every algorithm, and write table, JSON and plot of what came of it.

python docs/results/algorithms.py run --seeds 0 1 2       # goes on where it was interrupted
python docs/results/algorithms.py write
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(Path(__file__).parent)]

from collect import collect  # noqa: E402

from sentiment.settings import AlgorithmName  # noqa: E402

NAMES: tuple[AlgorithmName, ...] = get_args(AlgorithmName)
COMMAND = "python recipes/ppo_gpt2_sentiment.py --algorithm ALGORITHM --seed SEED --threads 1"
INTRODUCTION = (
    "This page compares six algorithms on the [main job](sentiment.md): the embedded small GPT-2, its reward model, "
    "and 50 rollouts of 128 responses. The table shows 512 held-out prompts, before → after training, ± standard "
    "error. VADER and the second classifier take no part in training. The last column is the gain of the classifier, "
    "divided by the standard error of the difference. RLOO and GRPO sample 4 responses to each of 32 prompts. TRPO "
    "computes in float32, with max_kl 0.02 and curvature from an eighth of the rows. Everything else is the same for "
    "all."
)
SMOOTHED = 5
"""Iterations of the curves' moving average."""


def run(folder: Path, seeds: list[int]) -> None:
    """Every algorithm for every seed, one after the other; finished ones are left alone."""
    for seed in seeds:
        for name in NAMES:
            output = folder / f"{name}-{seed}"
            if (output / "evaluation.json").is_file():
                continue
            words = COMMAND.replace("ALGORITHM", name).replace("SEED", str(seed)).split()[1:]
            output.mkdir(parents=True, exist_ok=True)
            (output / "commit.txt").write_text(_head())
            subprocess.run([sys.executable, *words, "--log-with", "None", "--output-dir", str(output)], check=True)


def gather(folder: Path) -> dict[str, Any]:
    """All finished runs with their settings, evaluation and curve."""
    finished = [(name, path) for name in NAMES for path in sorted(folder.glob(f"{name}-[0-9]*")) if _done(path)]
    found = collect([path for _, path in finished], COMMAND, "HEAD")
    del found["commit"]  # each run has its own
    for run_found, (name, path) in zip(found["runs"], finished, strict=True):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        run_found["algorithm"], run_found["commit"] = name, (path / "commit.txt").read_text().strip()
        run_found["curve"] = [[row["objective/kl"], row["env/reward_mean"]] for row in rows]
        run_found["accepted"] = [row["ppo/policy/accepted"] for row in rows if "ppo/policy/accepted" in row]
        run_found["old_kl"] = [row["ppo/policy/reached_kl"] for row in rows if "ppo/policy/reached_kl" in row]
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: one row a run."""
    lines = ["# Six algorithms on the main job", "", f"`{found['command']}`", ""]
    lines += [
        INTRODUCTION, "",
        "![Reward of the rollouts against their KL to the reference, one curve per algorithm](algorithms.png)", "",
        "| algorithm | seed | VADER | classifier | score | KL, nats | distinct-2 | gain, s.e. |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for item in found["runs"]:
        before, after = item["evaluation"]["before"], item["evaluation"]["after"]
        cells = [_cell(before[name], after[name]) for name in ("vader", "classifier", "score", "kl", "distinct_2")]
        gain = _gain(before["classifier"], after["classifier"])
        lines.append(f"| {item['algorithm']} | {item['config']['seed']} | {' | '.join(cells)} | {gain:.0f} |")
    lines += ["", *_trust_region(found)]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    commits = ", ".join(sorted({item["commit"] for item in found["runs"]}))
    return "\n".join([*lines, f"Commits {commits}; {found['machine']}; {versions}.", ""])


def draw(found: dict[str, Any], path: Path) -> None:
    """Reward against KL, one color an algorithm, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.7), layout="constrained")
    colors = dict(zip(NAMES, pyplot.get_cmap("tab10").colors, strict=False))
    for item in found["runs"]:
        curve = [_mean(item["curve"][max(0, end - SMOOTHED) : end]) for end in range(1, len(item["curve"]) + 1)]
        is_first = item is next(other for other in found["runs"] if other["algorithm"] == item["algorithm"])
        axes.plot(
            [kl for kl, _ in curve], [reward for _, reward in curve], color=colors[item["algorithm"]], alpha=0.8,
            linewidth=1.6, label=item["algorithm"] if is_first else None,
        )  # fmt: skip
    axes.set_xlabel("KL to the reference of a rollout's response, nats")
    axes.set_ylabel("mean reward of a rollout")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _trust_region(found: dict[str, Any]) -> list[str]:
    lines = []
    for item in found["runs"]:
        if item["accepted"] and item["old_kl"]:
            taken = [kl for kl, accepted in zip(item["old_kl"], item["accepted"], strict=True) if accepted]
            lines.append(
                f"TRPO, seed {item['config']['seed']}: {len(taken)} of {len(item['accepted'])} steps accepted, exact "
                f"mean KL to the old policy {min(taken):.4f} to {max(taken):.4f} nats a token, median "
                f"{sorted(taken)[len(taken) // 2]:.4f}, with max_kl 0.02."
            )
    return [*lines, ""] if lines else []


def _cell(before: dict[str, float], after: dict[str, float]) -> str:
    return f"{before['mean']:.3g} → **{after['mean']:.3g}** ± {after['stderr']:.2g}"


def _gain(before: dict[str, float], after: dict[str, float]) -> float:
    return (after["mean"] - before["mean"]) / math.hypot(before["stderr"], after["stderr"])


def _mean(points: list[list[float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _head() -> str:
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _done(path: Path) -> bool:
    return (path / "evaluation.json").is_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "write"))
    parser.add_argument("--folder", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    wishes = parser.parse_args()
    if wishes.task == "run":
        run(wishes.folder, wishes.seeds)
    else:
        here = Path(__file__).parent
        result = gather(wishes.folder)
        (here / "algorithms.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        (here / "algorithms.md").write_text(table(result))
        draw(result, here / "algorithms.png")
