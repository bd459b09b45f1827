"""How cost grows: with the responses of an iteration, and with the vocabulary.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.scaling

Each size runs in a process of its own, the sizes taking turns. Time is CPU time; memory is the highest resident memory
above that of the loaded models, gradients and Adam's moments (12 bytes a parameter).
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.ppo import Process, prepare
from tests.benchmarks.records import add_rounds
from tests.benchmarks.workloads import SKEW, Workload

ROWS = {
    str(rows): replace(SKEW, name="rows", vocab=4000, layers=2, width=128, heads=2, inner=344, rows=rows, epochs=1)
    for rows in (32, 128, 512)
}
VOCABULARIES = {
    str(vocab): replace(
        SKEW, name="vocabulary", vocab=vocab, layers=1, width=256, heads=4, inner=256, rows=16, prompt=2, epochs=1
    )
    for vocab in (32_000, 64_000, 128_000)
}
"""Minibatches of some 300 response tokens, which do not fill what the LM head's walk may hold at 32,000."""
LARGER = {
    vocab: replace(workload, name="vocabulary-larger", rows=32, minibatch=16)
    for vocab, workload in VOCABULARIES.items()
}
"""Of some 600, which do."""


def cost(side: Process, workload: Workload) -> dict[str, float]:
    """CPU seconds per unit of work, and memory; responses are drawn 32 at a time."""
    side("reset")
    phases = {"generate": side("generate", 32), "step": side("step")}
    for phase in phases.values():
        phase["peak_mib"] -= side.resident
    tokens = sum(workload.lengths()) + workload.rows * workload.prompt
    head_flop = 2 * workload.width * workload.vocab * sum(workload.lengths()) * 3 * workload.epochs
    parameters = workload.model().num_parameters()
    return {
        "microseconds_per_token": (phases["generate"]["cpu"] + phases["step"]["cpu"]) / tokens * 1e6,
        "update_ns_per_head_mflop": phases["step"]["update"] / head_flop * 1e15,
        "peak_mib": max(phase["peak_mib"] for phase in phases.values()) - 12 * parameters / 2**20,
    }


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance-scaling.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for sizes in (ROWS, VOCABULARIES, LARGER):
        with tempfile.TemporaryDirectory() as name:
            sides = {}
            for size, workload in sizes.items():
                (folder := Path(name) / size).mkdir()
                prepare(workload, folder)
                sides[size] = Process("ours", sys.executable, folder, {})

            def one_round(
                number: int, sides: dict[str, Process] = sides, sizes: dict[str, Workload] = sizes
            ) -> dict[str, Any]:
                return {size: cost(side, sizes[size]) for size, side in sides.items()}

            add_rounds(options.output, next(iter(sizes.values())), one_round, rounds=options.rounds)
            for side in sides.values():
                side.stop()


if __name__ == "__main__":
    main()
