"""Run the guessing recipe with every algorithm at equal sampled tokens, and write what came of it.

python docs/results/environments.py run --folder runs/guess      # goes on where it was interrupted
python docs/results/environments.py write --folder runs/guess
"""

import argparse
import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = {
    "ppo": "PPO, GAE over tokens", "ppo-turn": "PPO, GAE over turns", "reinforce++": "REINFORCE++",
    "rloo": "RLOO, groups of 8", "grpo": "GRPO, groups of 8",
}  # fmt: skip
SEEDS = {"ppo": 5, "grpo": 5}
"""Numbers of seeds other than 3."""
COMMAND = (
    "python recipes/ppo_guess_number.py --game guess-ten --algorithm ALGORITHM --seed SEED --tokens 40000 "
    "--batch-size 128 --mini-batch-size 64 --learning-rate 2e-3 --eval-games 20"
)
EPISODES = 128


def run(folder: Path) -> None:
    """Every algorithm for every seed, one after the other; finished ones are left alone.

    Runs of one seed begin with the same weights, which have imitated random play.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(max(SEEDS.values())):
        for name in (name for name in NAMES if seed < SEEDS.get(name, 3)):
            output = folder / f"{name}-{seed}"
            if not (output / "result.json").is_file():
                command = COMMAND.replace("ALGORITHM", name).replace("SEED", str(seed)).split()
                command += ["--output-dir", str(output), "--imitated", str(folder / f"imitated-{seed}.pt")]
                subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)


def collect(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results and curves (thousands of sampled tokens, guesses per episode) of the finished runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in NAMES:
        for path in sorted(folder.glob(f"{name}-[0-9]*/result.json")):
            rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
            tokens = accumulate(row["env/sampled_tokens"] * EPISODES / 1000 for row in rows)
            seed = {"seed": int(path.parent.name.rpartition("-")[2])} | json.loads(path.read_text())
            curve = {"tokens": [round(x, 1) for x in tokens], "guesses": [round(row["env/turns"], 3) for row in rows]}
            found.setdefault(name, []).append(seed | curve)
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of the page's table: every seed, and the mean."""
    lines = ["| Algorithm | seeds | sampled, mean | sampled | greedy | CPU seconds |", "|---|---|---|---|---|---|"]
    for name, seeds in found.items():
        mean = sum(seed["after/sampled"] for seed in seeds) / len(seeds)
        columns = [
            ", ".join(f"{seed[key]:.{digits}f}" for seed in seeds)
            for key, digits in (("seed", 0), ("after/sampled", 2), ("after/greedy", 2), ("cpu_seconds", 0))
        ]
        columns.insert(1, f"{mean:.2f}")
        lines.append(f"| {NAMES[name]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Guesses per episode against sampled tokens: mean over seeds, in a band from the lowest to the highest."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (name, seeds) in enumerate(found.items()):
        grid = np.linspace(1, min(seed["tokens"][-1] for seed in seeds), 60)
        curves = np.array([np.interp(grid, seed["tokens"], seed["guesses"]) for seed in seeds])
        axes.plot(grid, curves.mean(0), color=f"C{number}", linewidth=1.2, label=NAMES[name])
        axes.fill_between(grid, curves.min(0), curves.max(0), color=f"C{number}", alpha=0.2, linewidth=0)
    axes.axhline(2.9, color="black", linewidth=0.8, linestyle="--", label="optimum, 2.9")
    axes.set(xlabel="sampled tokens, thousands", ylabel="guesses per episode", ylim=(2.5, 7))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.folder)
        return
    found = collect(arguments.folder)
    (HERE / "environments.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, HERE / "environments.png")
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
