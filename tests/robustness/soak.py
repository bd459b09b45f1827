"""Thousands of iterations of a tiny run: memory, open files and the time of an iteration must stay where they are.

    python -m tests.robustness.soak --steps 2000 --results docs/results/soak.json

With checkpoints, held-out evaluations, a kept best model and TensorBoard, as a long run has them. Time is the
processor's, over that of a fixed reference computed in turn with the iterations: what others do on the machine slows
both alike.

oneDNN, and torch's layer above it, keep the kernels of every shape that they have met, up to 1,024 of them, some 80 kB
each; with responses of every length it takes a thousand iterations and more to fill. Here they may keep 16, so that
anything else that grows shows.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from rlhf_ppo import PPOTrainer, TrainState
from rlhf_ppo.checkpoints.folders import write_json
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_models import tiny_gpt2
from tests.support.tiny_run import TEXTS, config, share_of_e, trainer

CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


class Gauge:
    """A callback that reads memory, open files, threads and processor time every so many iterations.

    Args:
        every: Iterations of a row.
        record: Is shown all rows after each.
    """

    def __init__(self, every: int, record: Callable[[list[dict[str, float]]], None]) -> None:
        self.every, self.record = every, record
        self.process = psutil.Process()
        self.rows: list[dict[str, float]] = []
        self.model = tiny_gpt2(seed=0)
        self.reference = 0.0
        """Processor seconds of the reference since the last row."""
        self.before = time.process_time()

    def _compute_reference(self) -> None:
        start = time.process_time()
        with torch.no_grad():
            for _ in range(3):
                self.model(torch.ones(8, 16, dtype=torch.long))
        self.reference += time.process_time() - start

    def __call__(self, _: PPOTrainer, state: TrainState) -> None:
        self._compute_reference()
        if state.iteration % self.every == 0:
            now = time.process_time()
            row = {
                "iteration": state.iteration,
                "rss_mb": self.process.memory_info().rss / 1e6,
                "open_files": self.process.num_fds(),
                "threads": self.process.num_threads(),
                "cpu_ms": 1000 * (now - self.before - self.reference) / self.every,
                "relative": (now - self.before - self.reference) / self.reference,
            }
            self.rows.append(row)
            print({name: round(value, 2) for name, value in row.items()}, flush=True)
            self.record(self.rows)
            self.before, self.reference = time.process_time(), 0.0


def judge(rows: list[dict[str, float]], warm_up: int) -> dict[str, float]:
    """Growth after the warm-up: memory and files from its end to the end; time from the first to the last quarter."""
    after = [row for row in rows if row["iteration"] >= warm_up]
    quarter = max(1, len(after) // 4)
    early, late = ([row["relative"] for row in part] for part in (after[1 : quarter + 1], after[-quarter:]))
    return {
        "rss_growth": after[-1]["rss_mb"] / after[0]["rss_mb"] - 1,
        "open_files_growth": after[-1]["open_files"] - after[0]["open_files"],
        "threads_growth": after[-1]["threads"] - after[0]["threads"],
        "cpu_drift": statistics.median(late) / statistics.median(early) - 1,
    }


def soak(steps: int, gauge: Gauge, folder: Path) -> None:
    """The run, read by the gauge."""
    settings: dict[str, Any] = {"log_with": "tensorboard", "project_kwargs": {"logging_dir": str(folder)}}
    own = trainer(learning_rate=1e-5, **settings)
    own.train(
        share_of_e, config(folder, iterations=steps, save_every=20, eval_every=50, keep_best="score"),
        eval_prompts=PromptDataset.from_texts(TEXTS, own.tokenizer), callbacks=[gauge],
    )  # fmt: skip


def main() -> None:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--results", type=Path, required=True)
    wishes = parser.parse_args()
    if not CACHES.items() <= os.environ.items():  # read when the libraries are loaded
        command = [sys.executable, "-m", "tests.robustness.soak", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **CACHES})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def record(rows: list[dict[str, float]]) -> None:
        steps = int(rows[-1]["iteration"])
        if steps > wishes.warm_up + 8 * wishes.every:
            found = {"steps": steps, "warm_up": wishes.warm_up, "verdict": judge(rows, wishes.warm_up), "rows": rows}
            write_json(wishes.results, found)

    gauge = Gauge(wishes.every, record)
    with tempfile.TemporaryDirectory() as folder:
        soak(wishes.steps, gauge, Path(folder))
    print(judge(gauge.rows, wishes.warm_up))


if __name__ == "__main__":
    main()
