"""Run the guessing recipe with every algorithm, and write table, JSON and plot of what came of it.

python docs/results/environments.py run --folder runs/guess --seeds 0 1 2      # goes on where it was interrupted
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

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = {
    "ppo": "PPO, GAE over tokens", "ppo-turn": "PPO, GAE over turns", "reinforce++": "REINFORCE++", "rloo": "RLOO",
    "grpo": "GRPO",
}  # fmt: skip
COMMAND = "python recipes/ppo_guess_number.py --algorithm ALGORITHM --seed SEED"
EPISODES = 512


def run(folder: Path, seeds: list[int]) -> None:
    """Every algorithm for every seed, one after the other; finished ones are left alone."""
    for seed in seeds:
        for name in NAMES:
            output = folder / f"{name}-{seed}"
            if not (output / "result.json").is_file():
                command = COMMAND.replace("ALGORITHM", name).replace("SEED", str(seed)).split()
                subprocess.run([sys.executable, *command[1:], "--output-dir", str(output)], cwd=ROOT, check=True)


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
    """The rows of the page's table."""
    lines = ["| Algorithm | seeds | greedy | sampled | CPU seconds |", "|---|---|---|---|---|"]
    for name, seeds in found.items():
        columns = [
            ", ".join(f"{seed[key]:.{digits}f}" for seed in seeds)
            for key, digits in (("seed", 0), ("after/greedy", 2), ("after/sampled", 2), ("cpu_seconds", 0))
        ]
        lines.append(f"| {NAMES[name]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Guesses per episode against sampled tokens, one line per seed."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (name, seeds) in enumerate(found.items()):
        for seed in seeds:
            label = NAMES[name] if seed is seeds[0] else None
            axes.plot(seed["tokens"], seed["guesses"], color=f"C{number}", linewidth=1, label=label)
    axes.axhline(3.7, color="black", linewidth=0.8, linestyle="--", label="optimum, 3.7")
    axes.set(xlabel="sampled tokens, thousands", ylabel="guesses per episode", ylim=(3, 10))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.folder, arguments.seeds)
        return
    found = collect(arguments.folder)
    (HERE / "environments.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, HERE / "environments.png")
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
