"""The five phases of the sentiment recipe, tiny, undisturbed and with a kill in each of them: `FOLDER/found.json`.

    python -m tests.recipes.killed_demo FOLDER [SIGTERM] [SIGKILL]

Every run is a fork of one process that has its imports behind it; autograd must not have run in it. A run counts the
steps of each phase in a file and sends itself a signal when one of them begins.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import ppo_gpt2_sentiment as recipe

from reward_model import RewardModelConfig
from reward_model.training.preference_trainer import PreferenceTrainer
from rlhf_ppo import PPOTrainer
from sentiment import command_line, language_models, rewards, sft
from sentiment.reviews import load_reviews
from tests.recipes.tiny_world import save_gpt2, write_reviews

KILLED_AT = {"1": 31, "2": 18, "3": 12, "4": 8, "5": 5}
"""Phase: when this step of it begins: optimizer steps, twice; pieces of the evaluation; iterations; pieces."""
OPTIONS = (
    "--iterations 20 --batch-size 4 --mini-batch-size 4 --new-tokens 4 --eval-prompts 20 --threads 1 --log-with None"
)


class Killer:
    """Counts steps of phases, for all processes of a chain, and sends this one a signal."""

    def __init__(self, counts: Path, kill: tuple[str, int, int] | None) -> None:
        self.counts, self.kill, self.phase, self.own = counts, kill, "0", Counter[str]()

    def step(self) -> None:
        """A step of the phase begins."""
        self.own[self.phase] += 1
        with self.counts.open("a") as file:
            file.write(f"{self.phase}\n")
        if self.kill is not None and self.kill[:2] == (self.phase, self.own[self.phase]):
            os.kill(os.getpid(), self.kill[2])

    def before(self, function: Any) -> Any:
        """The function, of which each call is a step."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.step()
            return function(*arguments, **options)

        return counted

    def enter(self, phases: command_line.Phases, name: str, *, begin: Any = command_line.Phases.__call__) -> None:
        """A phase begins."""
        begin(phases, name)
        self.phase = str(phases.number)


def make_tiny(folder: Path, killer: Killer) -> None:
    """The recipe's models and trainings of a size for tests, counted."""
    models: Any = {"sft": sft, "rewards": rewards, "command_line": command_line, "language_models": language_models}
    models["language_models"].load_reviews = lambda: load_reviews(str(folder / "reviews.csv"))
    models["sft"].SFTConfig = partial(
        sft.SFTConfig, vocabulary_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, row_length=24, batch_size=4,
        steps=50,
    )  # fmt: skip
    models["sft"].learning_rate = killer.before(sft.learning_rate)
    models["rewards"].fetch = lambda asset: folder / "gpt2"
    models["rewards"].PAIRS = 80
    models["rewards"].RewardModelConfig = lambda **known: RewardModelConfig(**known | {"batch_size": 2})
    trainer: Any = PreferenceTrainer
    trainer.training_step = killer.before(trainer.training_step)
    policy: Any = PPOTrainer
    policy.learn, policy.evaluate = killer.before(policy.learn), killer.before(policy.evaluate)
    models["command_line"].Phases.__call__ = lambda phases, name: killer.enter(phases, name)


def run(folder: Path, name: str, kill: tuple[str, int, int] | None = None) -> int:
    """The exit status of a run, or the rest of one, in a child process; what it says is appended to `NAME.out`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 99
    try:
        for number, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        make_tiny(folder, Killer(folder / f"{name}.counts", kill))
        os.environ["RLHF_PPO_CACHE"] = str(folder / f"{name}.cache")
        told = ["--output-dir", str(folder / name), "--dataset", str(folder / "reviews.csv"), *OPTIONS.split()]
        sys.argv = ["recipe", *told]
        status = 0
        command_line.run(recipe.main, recipe.Config, None)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def result(folder: Path, name: str) -> dict[str, Any]:
    """Everything that must not depend on kills, and the steps that were begun."""
    run_folder = folder / name
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not key.startswith(("time/", "work/"))} for row in rows]
    weights = sorted((folder / f"{name}.cache").rglob("model.safetensors")) + [run_folder / "model/model.safetensors"]
    return {
        "weights": [hashlib.sha256(file.read_bytes()).hexdigest() for file in weights],
        "metrics": hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
        "evaluation": json.loads((run_folder / "evaluation.json").read_text()),
        "samples": (run_folder / "samples.jsonl").read_text(),
        "counts": Counter((folder / f"{name}.counts").read_text().split()),
    }


def main(folder: Path, *names: str) -> None:
    """An undisturbed run, and for each signal a chain of runs that it ends, one in each phase."""
    write_reviews(folder / "reviews.csv", count=800)
    save_gpt2(folder / "gpt2")
    found: dict[str, Any] = {"undisturbed": {"statuses": [run(folder, "undisturbed")]}}
    for number in (signal.Signals[name] for name in names):
        kills = [(phase, step, int(number)) for phase, step in KILLED_AT.items()]
        found[number.name] = {"statuses": [run(folder, number.name, kill) for kill in [*kills, None]]}
    for name, one in found.items():
        one |= result(folder, name)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
