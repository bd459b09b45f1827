"""Critics and groups on the small sentiment job: how a critic starts, and PPO against GRPO at equal sampled tokens.

python docs/results/critics.py run --folder runs/critics       # goes on where it was interrupted
python docs/results/critics.py write --folder runs/critics
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from sentiment_cases import (  # noqa: E402
    Case,
    Workbench,
    collect,
    command_line,
    held_out,
    origin,
    run_pending,
    spread,
)

from rlhf_ppo import GRPO, PPOClip, PPOTrainer  # noqa: E402
from rlhf_ppo.algorithms import GAE, Critic  # noqa: E402
from rlhf_ppo.models.critic import SeparateCritic, attach_critic, attach_saved_critic, save_critic  # noqa: E402

WARMUP, CRITIC_ITERATIONS, CRITIC_BATCH, BUDGET_ITERATIONS = 5, 15, 64, 30
BUDGET_SEEDS, CRITIC_SEEDS = 5, 3


def cold(bench: Workbench, policy: Any, seed: int) -> None:
    """A separate critic from the policy's own weights, whose head says 0."""
    attach_critic(policy, SeparateCritic.from_policy(policy))


def keep_critic(bench: Workbench, trainer: PPOTrainer, seed: int) -> None:
    """Save the critic for `warm_start`."""
    folder = bench.folder / f"critic-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_critic(trainer.accelerator.unwrap_model(trainer.model), folder)


def warm_start(bench: Workbench, policy: Any, seed: int) -> None:
    """The critic that a run of another seed left behind."""
    attach_saved_critic(policy, bench.folder / f"critic-{(seed + 1) % CRITIC_SEEDS}")


def from_reward_model(bench: Workbench, policy: Any, seed: int) -> None:
    """A critic that starts as the reward model."""
    scale = bench.reward.contract.normalization
    attach_critic(policy, SeparateCritic.from_reward_model(bench.reward.model, gain=scale.gain, bias=scale.bias))


def critic_case(start: Callable[[Workbench, Any, int], None], warmup: int = 0, **changes: Any) -> Case:
    """PPO with a separate critic that starts in one way."""
    algorithm = PPOClip(gae=GAE(value_lam=1.0), critic=Critic(vf_coef=0.5, warmup_iterations=warmup))
    return Case(
        algorithm=algorithm, iterations=CRITIC_ITERATIONS, batch_size=CRITIC_BATCH, prepare=start, **changes
    )  # fmt: skip


BUDGET = {
    "ppo": Case(algorithm=PPOClip(critic=Critic(vf_coef=0.5)), iterations=BUDGET_ITERATIONS),
    "grpo": Case(algorithm=GRPO(), group_size=8, iterations=BUDGET_ITERATIONS),
}  # fmt: skip
STARTS = {
    "cold": critic_case(cold, keep=keep_critic),
    "warmed-up": critic_case(cold, warmup=WARMUP),
    "from-reward-model": critic_case(from_reward_model),
    "warm-started": critic_case(warm_start),
}  # fmt: skip
"""Value targets are Monte Carlo returns (`value_lam=1`), so that explained variance means the same for all."""


def run(folder: Path, seconds: float) -> None:
    """Everything that has no result yet."""
    seeds = dict.fromkeys(BUDGET, BUDGET_SEEDS) | dict.fromkeys(STARTS, CRITIC_SEEDS)
    first = {"cold": STARTS["cold"]}  # its critics are what others start from
    for cases in (BUDGET, first, STARTS):
        seconds = run_pending(folder, cases, seeds, seconds)


def at_token(run: dict[str, Any], name: str, tokens: float) -> float:
    """A curve's mean over the five iterations up to so many sampled tokens."""
    reached = max(1, sum(value <= tokens for value in run["curve"]["tokens"]))
    return float(np.mean(run["curve"][name][max(0, reached - 5) : reached]))


def budget_table(found: dict[str, Any]) -> list[str]:
    """PPO and GRPO at equal sampled tokens, and at the end on held-out prompts."""
    budget = min(run["curve"]["tokens"][-1] for name in BUDGET for run in found[name])
    shares = (0.125, 0.25, 0.5, 1.0)
    heads = " | ".join(f"{share * budget / 1000:.0f}k tokens" for share in shares)
    lines = [
        f"| | {heads} | held-out score | second classifier | VADER | KL, nats | CPU s |", "|---|" + "---|" * 9
    ]  # fmt: skip
    for name, title in {"ppo": "PPO, 1 response a prompt", "grpo": "GRPO, 8 responses a prompt"}.items():
        runs = found[name]
        cells = [spread([at_token(run, "score", share * budget) for run in runs]) for share in shares]
        cells += held_out(runs, score=2, classifier=3, vader=2, kl=1)
        lines.append(f"| {title} | {' | '.join(cells)} | {spread([run['cpu_seconds'] for run in runs], 0)} |")
    return lines


def starts_table(found: dict[str, Any]) -> list[str]:
    """Explained variance and reward by how the critic starts."""
    titles = {
        "cold": "cold: the policy's weights, V = 0", "warmed-up": f"cold, {WARMUP} rollouts of warm-up",
        "warm-started": "the critic of another seed's run", "from-reward-model": "from the reward model",
    }  # fmt: skip
    tokens = found["from-reward-model"][0]["curve"]["tokens"]
    heads = [f"score at {tokens[k] / 1000:.0f}k tokens" for k in (9, len(tokens) - 1)]
    first = ("Critic", "seeds", "EV at the first update", "EV without a constant offset", "EV, last five")
    lines = [f"| {' | '.join([*first, *heads])} | KL, nats |", "|---|" + "---|" * 7]
    for name, title in titles.items():
        runs, begin = found.get(name, []), WARMUP if name == "warmed-up" else 0
        if not runs:
            continue
        cells = [
            str(len(runs)),
            spread([run["curve"]["explained"][begin] for run in runs]),
            spread([run["curve"]["explained_but_for_the_mean"][begin] for run in runs]),
            spread([float(np.mean(run["curve"]["explained"][-5:])) for run in runs]),
            *(spread([at_token(run, "score", tokens[k]) for run in runs]) for k in (9, len(tokens) - 1)),
            *held_out(runs, kl=1),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def draw(found: dict[str, Any], panels: list[tuple[dict[str, Case], str]], path: Path) -> None:
    """Mean over seeds with a band of one standard deviation, against sampled tokens; one panel per (cases, curve)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for ax, (cases, curve) in zip(axes[0], panels, strict=True):
        for name in cases:
            if not found.get(name):
                continue
            rows = np.array([run["curve"][curve] for run in found[name]])
            tokens = np.mean([run["curve"]["tokens"] for run in found[name]], axis=0) / 1000
            mean, deviation = rows.mean(axis=0), rows.std(axis=0, ddof=min(1, len(rows) - 1))
            ax.plot(tokens, mean, label=name)
            ax.fill_between(tokens, mean - deviation, mean + deviation, alpha=0.2)
        ax.set(xlabel="sampled tokens, thousands", ylabel=curve)
        if curve == "explained":
            ax.set(ylabel="explained variance before the update", ylim=(-1, 1))
        ax.legend(frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def write(folder: Path) -> None:
    """JSON and plots; the tables go to the screen, for critics.md."""
    found = collect(folder, BUDGET | STARTS)
    (HERE / "critics.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, [(BUDGET, "score"), (BUDGET, "kl")], HERE / "critics-budget.png")
    draw(found, [(STARTS, "explained"), (STARTS, "score")], HERE / "critics-starts.png")
    sys.stdout.write("\n".join([*budget_table(found), "", *starts_table(found), "", origin(found), ""]))


if __name__ == "__main__":
    command_line(__doc__, run, write)
