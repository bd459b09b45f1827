"""The sentiment recipe's job, small, in many settings: one JSON file a setting and seed. For other scripts here.

The language model is the recipe's in a smaller size, trained once. The reward model is that language model, trained on
pairs of the recipe's reviews: it is causal and shares the policy's tokenizer, so that a critic can start from it.
"""

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from reward_model import RewardModel, RewardModelConfig, train_reward_model  # noqa: E402
from rlhf_ppo import AlgorithmConfig, PPOConfig, PPOTrainer, TrainConfig, TrainState  # noqa: E402
from rlhf_ppo.algorithms import PPOClip  # noqa: E402
from rlhf_ppo.learner.ppo_learner import PPOLearner  # noqa: E402
from rlhf_ppo.samplers.base import Sampler, SamplingConfig  # noqa: E402
from rlhf_ppo.updates.optimizers import adam, linear_to_zero  # noqa: E402
from sentiment.assets import build_once  # noqa: E402
from sentiment.evaluation import load_judges, prompt_datasets  # noqa: E402
from sentiment.language_models import SMALL_GPT2, load_policy  # noqa: E402
from sentiment.reviews import load_reviews, preference_pairs, split_reviews  # noqa: E402
from sentiment.settings import model_settings  # noqa: E402
from sentiment.sft import SFTConfig, small_language_model  # noqa: E402

LANGUAGE_MODEL = SFTConfig(vocabulary_size=2048, n_embd=128, n_layer=3, row_length=48, steps=700)
NEW_TOKENS, HELD_OUT = 24, 256
PACKAGES = ("torch", "transformers", "accelerate")
CURVE = {
    "score": "ppo/mean_scores", "kl": "objective/kl", "entropy": "objective/entropy", "sampler_kl": "sampler/kl",
    "ratio_max": "sampler/ratio_max", "effective_share": "sampler/effective_share",
}  # fmt: skip
"""Name in the curve -> metric."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of PPO on the sentiment job."""

    algorithm: AlgorithmConfig = field(default_factory=PPOClip)
    group_size: int = 1
    """Responses to a prompt."""
    iterations: int
    batch_size: int = 128
    """Responses of a rollout; four minibatches."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `PPOConfig`."""
    prepare: Callable[["Workbench", Any, int], None] | None = None
    """Called with the workbench, the policy and the seed before the trainer is built."""
    make_sampler: Callable[[Any], Sampler] | None = None
    """From the tokenizer; None: the policy itself samples."""
    keep: Callable[["Workbench", PPOTrainer, int], None] | None = None
    """Called with the trained policy."""


class Workbench:
    """What all cases share: reviews, language model, reward model, judges and a folder for results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reviews = split_reviews(load_reviews())
        self.judges, _ = load_judges(self.reviews)
        self.language_model = str(small_language_model(self.reviews.language_model, LANGUAGE_MODEL))
        self.reward = causal_reward_model(self)

    def run(self, case: Case, seed: int) -> dict[str, Any]:
        """Train and evaluate one case."""
        began = time.process_time()
        torch.manual_seed(seed)
        policy, tokenizer = load_policy(self.language_model)
        if case.prepare is not None:
            case.prepare(self, policy, seed)
        prompts, held_out = prompt_datasets(self.reviews, tokenizer, held_out=HELD_OUT)
        trainer = make_trainer(case, policy, tokenizer, prompts, seed)
        curve: list[dict[str, float]] = []
        config = TrainConfig(
            iterations=case.iterations, progress=False,
            sampling=SamplingConfig(max_new_tokens=NEW_TOKENS, num_return_sequences=case.group_size),
        )  # fmt: skip
        sampler = None if case.make_sampler is None else case.make_sampler(tokenizer)
        state = trainer.train(self.reward, config, callbacks=[Recorder(curve)], sampler=sampler)
        if state.stopped is not None:
            raise SystemExit(f"{state.stopped}: this run is not kept")
        found = trainer.evaluate(held_out, self.reward, config.sampling, judges=self.judges)
        if case.keep is not None:
            case.keep(self, trainer, seed)
        return {
            "curve": {name: [row.get(name, math.nan) for row in curve] for name in curve[-1]},
            "evaluation": found.summary(), "cpu_seconds": round(time.process_time() - began),
        }  # fmt: skip


class Recorder:
    """Callback that keeps what a page shows of every iteration, with the critic's fit before the update."""

    def __init__(self, rows: list[dict[str, float]]) -> None:
        self.rows = rows

    def __call__(self, trainer: PPOLearner, state: TrainState) -> None:
        """Add a row."""
        before = self.rows[-1]["tokens"] if self.rows else 0.0
        row = {name: round(state.metrics[key], 5) for name, key in CURVE.items() if key in state.metrics}
        row["tokens"] = before + round(state.metrics["tokens/responses_len_mean"] * trainer.config.batch_size)
        self.rows.append(row | explained_variance(trainer))


def explained_variance(trainer: PPOLearner) -> dict[str, float]:
    """1 - E[(R - V)²] / Var[R] and 1 - Var[R - V] / Var[R] over the rollout's tokens, V before the update."""
    if trainer.last_batch is None or trainer.last_batch[0].values is None:
        return {}
    batch, _ = trainer.last_batch
    returns, values = batch.returns[batch.mask], batch.values[batch.mask]
    error, variance = returns - values, float(returns.var())
    if not variance:
        return {}
    return {
        "explained": round(1 - float(error.square().mean()) / variance, 4),
        "explained_but_for_the_mean": round(1 - float(error.var()) / variance, 4),
    }


def make_trainer(case: Case, policy: Any, tokenizer: Any, prompts: Any, seed: int) -> PPOTrainer:
    """The recipe's trainer with the algorithm and the settings of the case."""
    usual = model_settings(SMALL_GPT2)
    config: dict[str, Any] = {
        "seed": seed, "batch_size": case.batch_size, "mini_batch_size": case.batch_size // 4,
        "ppo_epochs": usual.ppo_epochs, "init_kl_coef": usual.kl_coef, "target": usual.kl_target,
        "horizon": usual.kl_horizon, "score_clip": usual.score_clip, "max_grad_norm": 1.0, "diagnose": False,
        "learning_rate": usual.learning_rate,
    }  # fmt: skip
    settings = PPOConfig(**config | dict(case.settings))
    optimizer = adam([p for p in policy.parameters() if p.requires_grad], lr=settings.learning_rate)
    return PPOTrainer(
        settings, policy, tokenizer=tokenizer, dataset=prompts, optimizer=optimizer, algorithm=case.algorithm,
        lr_scheduler=linear_to_zero(optimizer, case.iterations),
    )  # fmt: skip


def causal_reward_model(bench: Workbench) -> RewardModel:
    """The language model, trained once more to tell positive from negative excerpts."""
    folder = bench.folder / "reward_model"

    def build(target: Path) -> None:
        reviews = bench.reviews.reward_model
        words = {"min_words": 12, "max_words": 40, "per_review": 3}
        config = RewardModelConfig(
            model=bench.language_model, output_dir=str(target), overwrite=True, learning_rate=5e-4, epochs=2.0,
            batch_size=32, max_length=128, append_eos=False, precision="bfloat16", progress=False,
        )  # fmt: skip
        held_out = len(reviews) // 10
        pairs = (preference_pairs(part, **words) for part in (reviews[held_out:], reviews[:held_out]))
        train_reward_model(config, train=next(pairs), evaluation=next(pairs))
        AcceleratorState._reset_state()

    return RewardModel.from_pretrained(build_once(folder, build))


def run_pending(folder: Path, cases: Mapping[str, Case], seeds: Mapping[str, int], seconds: float) -> float:
    """Run what has no result yet, a seed of all cases first; begin nothing after so many seconds, return those left."""
    end, commit = time.monotonic() + seconds, _head()
    bench: Workbench | None = None
    for seed in range(max(seeds[name] for name in cases)):
        for name, case in cases.items():
            path = folder / f"{name}-{seed}.json"
            if seed >= seeds[name] or path.is_file() or time.monotonic() > end:
                continue
            bench = bench or Workbench(folder)
            record = {"case": name, "seed": seed, "commit": commit} | bench.run(case, seed)
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")
            means = {measure: value["mean"] for measure, value in record["evaluation"].items()}
            line = f"{name} {seed}: score {means['score']:.3f}, KL {means['kl']:.1f}, {record['cpu_seconds']} CPU s"
            sys.stdout.write(f"{line}\n")
    return end - time.monotonic()


def _head() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def collect(folder: Path, cases: Mapping[str, Case]) -> dict[str, list[dict[str, Any]]]:
    """Results by case, in the order of seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in cases:
        for seed in range(20):
            with suppress(FileNotFoundError):
                found.setdefault(name, []).append(json.loads((folder / f"{name}-{seed}.json").read_text()))
    return found


def origin(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """The last line of a page: commits and versions."""
    commits = sorted({run["commit"] for runs in found.values() for run in runs})
    return f"Commits {', '.join(commits)}; {', '.join(f'{name} {version(name)}' for name in PACKAGES)}; one CPU thread."


def held_out(runs: list[dict[str, Any]], **digits: int) -> list[str]:
    """Means of the held-out evaluation over seeds, one for each measure, with so many digits."""
    return [spread([run["evaluation"][name]["mean"] for run in runs], places) for name, places in digits.items()]


def command_line(text: str, run: Callable[[Path, float], None], write: Callable[[Path], None]) -> None:
    """`run --folder FOLDER [--seconds S]`, or `write --folder FOLDER`, for a script that says so in `text`."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further run after so many")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.action == "run":
        run(arguments.folder, arguments.seconds)
    else:
        write(arguments.folder)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds; a single one alone."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
