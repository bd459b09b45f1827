"""A sampler three updates behind, on the token bandit: the distance to the optimum with each correction.

python docs/results/mismatch.py
"""

import json
import sys
import warnings
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from rlhf_ppo import PPOClip  # noqa: E402
from rlhf_ppo.batch import TokenInputs  # noqa: E402
from rlhf_ppo.rollout.experience import Responses  # noqa: E402
from tests.benchmarks.records import revision  # noqa: E402
from tests.learning.bandit import PROMPT, REWARDS, ROWS, bandit, optimum, probabilities, total_variation  # noqa: E402

SEEDS, LAG, ITERATIONS, KL_COEF = (0, 1, 2), 3, 40, 0.5
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "the present policy": (0, {}),
    "no correction": (LAG, {"importance_sampling": "off"}),
    "truncated at 2": (LAG, {"importance_sampling": "truncate"}),
    "masked outside 0.5 to 5 (IcePop)": (LAG, {"importance_sampling": "mask"}),
    "the sampler as the old policy (bypass)": (LAG, {"importance_sampling": "bypass"}),
}


def distance(lag: int, seed: int, settings: dict[str, Any]) -> float:
    """Total variation to the optimum after learning from a sampler that many updates behind."""
    trainer = bandit(PPOClip(), kl_coef=KL_COEF, iterations=ITERATIONS, seed=seed, **settings)
    goal, past = optimum(trainer, KL_COEF), deque([probabilities(trainer)], maxlen=lag + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(ITERATIONS):
        sampler = past[0]
        actions = torch.multinomial(sampler, ROWS, replacement=True, generator=generator)
        trainer.learn(
            Responses(
                inputs=TokenInputs(prompts=[PROMPT] * ROWS, responses=list(actions.split(1))),
                mask=torch.ones(ROWS, 1, dtype=torch.bool), scores=REWARDS[actions],
                sampler_logprobs=sampler[actions].log()[:, None],
            )
        )  # fmt: skip
        past.append(probabilities(trainer))
    return total_variation(probabilities(trainer), goal)


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# A sampler that lags behind", "", "`python docs/results/mismatch.py`", "",
        f"The [token bandit](bandit.md) with the KL in the reward (coefficient {KL_COEF}), {ITERATIONS} iterations,",
        f"tokens drawn by the policy of {LAG} updates ago. What is left is the total variation to the optimum",
        f"π_ref exp(r / {KL_COEF}) / Z, one number a seed.",
        "", "| Correction | total variation | mean |", "|---|---|---|",
    ]  # fmt: skip
    for name, values in record["tv"].items():
        lines.append(f"| {name} | {', '.join(f'{value:.3f}' for value in values)} | {sum(values) / len(values):.3f} |")
    seeds = ", ".join(map(str, SEEDS))
    lines += [
        "",
        "The differences are within the spread of the seeds: here neither the lag nor a correction costs anything.",
    ]
    return "\n".join([*lines, "", f"Seeds {seeds}; commit {record['commit'][:12]}; torch {record['torch']}.", ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {name: [distance(lag, seed, settings) for seed in SEEDS] for name, (lag, settings) in CASES.items()}
    record = {"commit": revision("HEAD"), "torch": version("torch"), "seeds": SEEDS, "lag": LAG, "tv": found}
    (HERE / "mismatch.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "mismatch.md").write_text(table(record))
