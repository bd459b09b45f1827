"""Every algorithm and variant on the token bandit with a known optimum: JSON and table, three seeds.

python docs/results/bandit.py
"""

import json
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from tests.benchmarks.records import revision  # noqa: E402
from tests.learning.test_bandit import (  # noqa: E402
    ALGORITHMS,
    REGION_ITERATIONS,
    REGIONS,
    VARIANTS,
    distance,
    group_of,
)

SEEDS = (0, 1, 2)
PACKAGES = ("torch", "transformers", "accelerate")


def measured() -> list[dict[str, Any]]:
    """Total variation to the optimum after learning, one row a case."""
    cases: list[tuple[str, Any, float, dict[str, Any]]] = [
        (name, algorithm, kl_coef, {}) for name, algorithm in ALGORITHMS.items() for kl_coef in (0.5, 0.0)
    ]
    cases += [
        ("trpo", region, kl_coef, {"iterations": REGION_ITERATIONS[kl_coef]}) for kl_coef, region in REGIONS.items()
    ]
    cases += [(name, *case) for name, case in VARIANTS.items()]
    rows = []
    for name, algorithm, kl_coef, settings in cases:
        found = [distance(algorithm, kl_coef, group_size=group_of(algorithm), seed=seed, **settings) for seed in SEEDS]
        rows.append({"name": name, "algorithm": repr(algorithm), "kl_coef": kl_coef, "settings": settings, "tv": found})
    return rows


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# The token bandit", "", "`python docs/results/bandit.py`", "",
        "One prompt, responses of one token out of eight, a tiny GPT-2, 128 responses an iteration. With the KL to the",
        "reference (coefficient 0.5) the optimum is π_ref exp(r / 0.5) / Z, without it the best token. What is left at",
        "the end is the total variation between policy and optimum, one number a seed; tests ask for less than 0.02.",
        "", "| | KL coefficient | total variation | largest |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in found["rows"]:
        each = ", ".join(f"{value:.4f}" for value in row["tv"])
        lines.append(f"| {row['name']} | {row['kl_coef']} | {each} | {max(row['tv']):.4f} |")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join(
        [*lines, "", f"Seeds {', '.join(map(str, SEEDS))}; commit {found['commit'][:12]}; {versions}.", ""]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    record = {
        "commit": revision("HEAD"), "versions": {name: version(name) for name in PACKAGES}, "seeds": SEEDS,
        "python": platform.python_version(), "rows": measured(),
    }  # fmt: skip
    (HERE / "bandit.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "bandit.md").write_text(table(record))
