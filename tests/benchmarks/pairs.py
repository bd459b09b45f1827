"""An epoch of reward-model training over pairs of unequal lengths: ours, our plain path, TRL 0.11.4's `RewardTrainer`.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.pairs --classic ~/trl-0.11.4/bin/python

As `tests.benchmarks.ppo`: a process a side, taking turns, the same weights and pairs. The learning rate is next to 0,
so that the mean loss over the epoch is the same in whichever order the pairs come, and must be equal on all sides.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.benchmarks.pair_sides import write_pairs
from tests.benchmarks.ppo import Process
from tests.benchmarks.records import add_rounds
from tests.benchmarks.workloads import WORKLOADS, Task, Workload


def prepare(workload: Workload, folder: Path) -> None:
    """A model with a score head, and pairs of random tokens."""
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**workload.model_config(), num_labels=1)).save_pretrained(folder)
    responses = [torch.randint(1, workload.vocab, (length,)) for length in workload.lengths()]
    Task.write(workload, folder, responses, {})
    write_pairs(folder)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classic", required=True, help="Python of an environment with TRL 0.11.4")
    parser.add_argument("--rows", type=int, default=64, help="pairs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance-pairs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload = replace(WORKLOADS["rm-pairs"], rows=options.rows)
    with tempfile.TemporaryDirectory() as name:
        prepare(workload, Path(name))
        pythons = {"ours": sys.executable, "plain": sys.executable, "classic": options.classic}
        sides = [Process(side, python, Path(name), {}, "pair_sides") for side, python in pythons.items()]

        def one_round(number: int) -> dict[str, Any]:
            costs = {side.name: side("epoch") for side in (sides if number % 2 == 0 else sides[::-1])}
            losses = [cost["loss"] for cost in costs.values()]
            if max(losses) - min(losses) > 1e-5:
                raise RuntimeError(f"all sides must have the same mean loss over the epoch, got {costs}")
            return costs

        add_rounds(options.output, workload, one_round, rounds=options.rounds)
        for side in sides:
            side.stop()


if __name__ == "__main__":
    main()
