"""A sampler that is another policy, and every correction: on the small sentiment job, and on the token bandit.

python docs/results/mismatch.py run --folder runs/mismatch       # goes on where it was interrupted
python docs/results/mismatch.py write --folder runs/mismatch
"""

import copy
import json
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from sentiment_cases import Case, collect, command_line, held_out, origin, run_pending, spread  # noqa: E402

from rlhf_ppo import PPOClip  # noqa: E402
from rlhf_ppo.algorithms import Critic  # noqa: E402
from rlhf_ppo.batch import TokenInputs  # noqa: E402
from rlhf_ppo.rollout.experience import Responses  # noqa: E402
from rlhf_ppo.samplers.base import Samples, unwrap_causal_lm  # noqa: E402
from rlhf_ppo.samplers.decode_loop import DecodeLoop  # noqa: E402
from tests.learning.bandit import PROMPT, REWARDS, ROWS, bandit, optimum, probabilities, total_variation  # noqa: E402

SEEDS, LAG, ITERATIONS, BATCH_SIZE = 3, 3, 12, 64
BANDIT_ITERATIONS, KL_COEF = 40, 0.5


class OtherPolicy:
    """Sampler whose weights are not the policy's: of some rollouts ago, or changed by a function."""

    def __init__(self, tokenizer: Any, *, lag: int = 0, change: Callable[[nn.Module], nn.Module] | None = None) -> None:
        self.loop, self.change = DecodeLoop(tokenizer), change
        self.past: deque[nn.Module] = deque(maxlen=lag + 1)

    def __call__(self, model: nn.Module, *arguments: Any, **settings: Any) -> Samples:
        """Sample with a copy of the language model; a copy has no value head, so nothing of it stands in for V."""
        copied = copy.deepcopy(unwrap_causal_lm(model)).requires_grad_(False)
        self.past.append(copied if self.change is None else self.change(copied))
        return self.loop(self.past[0], *arguments, **settings)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """Weights and arithmetic in bfloat16."""
    return model.bfloat16()


@torch.no_grad()
def in_int8(model: nn.Module) -> nn.Module:
    """Matrices rounded to 8 bits, symmetric, one scale a matrix."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            scale = parameter.abs().max() / 127
            parameter.copy_((parameter / scale).round() * scale)
    return model


SAMPLERS: dict[str, Callable[[Any], OtherPolicy]] = {
    "bfloat16": partial(OtherPolicy, change=in_bfloat16),
    "int8": partial(OtherPolicy, change=in_int8),
    "stale": partial(OtherPolicy, lag=LAG),
}
CORRECTIONS: dict[str, dict[str, str]] = {
    "off": {"importance_sampling": "off"}, "bypass": {"importance_sampling": "bypass"},
    **{
        f"{mode}-{level}": {"importance_sampling": mode, "importance_sampling_level": level}
        for level in ("token", "sequence", "geometric") for mode in ("truncate", "mask")
    },
}  # fmt: skip


def case(sampler: Callable[[Any], OtherPolicy] | None, correction: dict[str, str]) -> Case:
    """PPO whose sampler is another policy; None: the policy itself."""
    algorithm = PPOClip(critic=Critic(vf_coef=0.5))
    return Case(
        algorithm=algorithm, iterations=ITERATIONS, batch_size=BATCH_SIZE, settings=correction, make_sampler=sampler
    )  # fmt: skip


CASES = {"itself": case(None, CORRECTIONS["off"])} | {
    f"{name}-{correction}": case(sampler, settings)
    for name, sampler in reversed(SAMPLERS.items()) for correction, settings in CORRECTIONS.items()
}  # fmt: skip
FIRST = {name: one for name, one in CASES.items() if name == "itself" or "stale" in name or "off" in name}
"""Run before the others: a correction can repair no more than what the sampler without one spoils."""


def bandit_distance(lag: int, seed: int, settings: dict[str, Any]) -> float:
    """Total variation to the bandit's optimum after learning from a sampler that many updates behind."""
    trainer = bandit(PPOClip(), kl_coef=KL_COEF, iterations=BANDIT_ITERATIONS, seed=seed, **settings)
    goal, past = optimum(trainer, KL_COEF), deque([probabilities(trainer)], maxlen=lag + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(BANDIT_ITERATIONS):
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


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One row per sampler and correction."""
    heads = ("Sampler", "Correction", "score", "KL, nats", "second classifier", "KL to the sampler", "largest ratio")
    lines = [f"| {' | '.join(heads)} | effective share |", "|" + "---|" * 8]
    for name, runs in found.items():
        sampler, _, correction = name.partition("-")
        curves = [run["curve"] for run in runs]
        worth = [float(np.mean(curve["effective_share"])) for curve in curves if "effective_share" in curve]
        cells = held_out(runs, score=2, kl=1, classifier=3)
        cells += [
            f"{np.mean([np.mean(curve['sampler_kl']) for curve in curves]):.1e}",
            f"{max(chain(*(curve['ratio_max'] for curve in curves))):.2f}",
            f"{np.mean(worth):.2f}" if worth else "–",
        ]
        lines.append(f"| {sampler} | {correction or 'none needed'} | {' | '.join(cells)} |")
    return lines


def run(folder: Path, seconds: float) -> None:
    """Everything that has no result yet."""
    left = run_pending(folder, FIRST, dict.fromkeys(CASES, SEEDS), seconds)
    run_pending(folder, CASES, dict.fromkeys(CASES, SEEDS), left)


def write(folder: Path) -> None:
    """JSON, and the bandit's results that are not there yet; the tables go to the screen, for mismatch.md."""
    path = HERE / "mismatch.json"
    distances = json.loads(path.read_text())["bandit"]
    for name in ("itself", "off", "bypass", "truncate-token", "mask-token"):  # of one token: other levels are the same
        if name not in distances:
            lag, settings = (0, {}) if name == "itself" else (LAG, dict(CORRECTIONS[name]))
            distances[name] = [bandit_distance(lag, seed, settings) for seed in range(SEEDS)]
    found = collect(folder, CASES)
    path.write_text(json.dumps({"bandit": distances, "sentiment": found}) + "\n")
    rows = [f"| {name} | {spread(values, 3)} |" for name, values in distances.items()]
    sys.stdout.write("\n".join([*table(found), "", *rows, "", origin(found), ""]))


if __name__ == "__main__":
    command_line(__doc__, run, write)
