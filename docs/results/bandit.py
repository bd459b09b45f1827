"""Every algorithm and variant on the token bandit with a known optimum: JSON and table, three seeds.

python docs/results/bandit.py            # what is not yet in bandit.json
python docs/results/bandit.py --all      # everything anew
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
NOTES = [
    "",
    "The formula of the optimum holds for every loss that depends on the data only through the advantages, however",
    "these are scaled, clipped, weighed or selected. The reason: at the optimum with the KL, all actions have the",
    "same reward minus KL, so every advantage is 0. The formula does not hold for `positive_nll`, `ent_coef`,",
    "`adaptive_entropy` and `PretrainingMix`, which add another goal to the loss. Tests compare these four with",
    "their own formulas.",
    "",
]
"""What the closed form applies to."""


def measured(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Total variation to the optimum after learning, one row a case; what is known is not measured again."""
    cases: list[tuple[str, Any, float, dict[str, Any]]] = [
        (name, algorithm, kl_coef, {}) for name, algorithm in ALGORITHMS.items() for kl_coef in (0.5, 0.0)
    ]
    cases += [
        ("trpo", region, kl_coef, {"iterations": REGION_ITERATIONS[kl_coef]}) for kl_coef, region in REGIONS.items()
    ]
    cases += [(name, *case) for name, case in VARIANTS.items()]
    recorded = {(row["name"], row["kl_coef"]): row for row in known}
    rows = []
    for name, algorithm, kl_coef, settings in cases:
        if (name, kl_coef) in recorded:
            rows.append(recorded[name, kl_coef])
            continue
        found = [distance(algorithm, kl_coef, group_size=group_of(algorithm), seed=seed, **settings) for seed in SEEDS]
        row = {"name": name, "algorithm": repr(algorithm), "kl_coef": kl_coef, "settings": settings, "tv": found}
        rows.append(row | {"commit": revision("HEAD")})
    return rows


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# The token bandit", "", "`python docs/results/bandit.py`", "",
        "This page tests each algorithm on a task whose optimum is known. A tiny GPT-2 answers one prompt with one",
        "token out of eight, in 128 responses per iteration. With the KL to the reference (coefficient 0.5) the",
        "optimal policy is π_ref exp(r / 0.5) / Z; without the KL, it is the best token alone. The table shows",
        "the total variation distance between the trained policy and the optimum, one number per seed. The tests",
        "require less than 0.02.",
        "", "| Algorithm | KL coefficient | total variation | largest |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in found["rows"]:
        each = ", ".join(f"{value:.4f}" for value in row["tv"])
        lines.append(f"| {row['name']} | {row['kl_coef']} | {each} | {max(row['tv']):.4f} |")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"][:12] for row in found["rows"]))
    return "\n".join([*lines, *NOTES, f"Seeds {', '.join(map(str, SEEDS))}; commits {commits}; {versions}.", ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = HERE / "bandit.json"
    known = [] if "--all" in sys.argv else json.loads(path.read_text())["rows"]
    record = {
        "versions": {name: version(name) for name in PACKAGES}, "seeds": SEEDS, "python": platform.python_version(),
        "rows": measured(known),
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "bandit.md").write_text(table(record))
