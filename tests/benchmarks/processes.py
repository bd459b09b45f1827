"""Throughput of two single-thread processes against one: PPO iterations on cpu-skew, generation included.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.processes

One and two processes take turns, each start doing some iterations after a first one that is not counted. `same-batch`:
two processes share the batch of the one. `more-rows`: each has as many rows as the one, as the sizes in `PPOConfig` are
meant. Throughput counts tokens of prompts and responses once an iteration, by wall time; CPU seconds are those of the
busiest process. On a machine with other work wall time says little: look at the CPU seconds beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from tests.benchmarks.ppo import prepare
from tests.benchmarks.records import ROOT, add_rounds
from tests.benchmarks.sides import Ours
from tests.benchmarks.workloads import WORKLOADS, Task, Workload
from tests.distributed.launching import free_port

KINDS = ("same-batch", "more-rows")


class Share(Ours):
    """What one of several processes does of the workload."""

    def build(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        super().build()
        own = slice(self.rank, None, self.count)
        self.prompts = self.prompts[own]
        self.scores = self.workload.scores()[own]
        self.lengths = self.workload.lengths()[own]
        self.task = replace(self.task, responses=self.task.responses[own])

    def settings(self) -> dict[str, Any]:
        """Sizes are those of a process."""
        known = super().settings()
        return known | {name: known[name] // self.count for name in ("batch_size", "mini_batch_size")}

    def reset(self) -> None:
        """Weights move on from iteration to iteration: only time is measured."""

    def iteration(self) -> dict[str, float]:
        """One: wall and CPU seconds of its phases."""
        clocks = [(time.perf_counter(), time.process_time())]
        self.generate()
        clocks.append((time.perf_counter(), time.process_time()))
        self.learn()
        clocks.append((time.perf_counter(), time.process_time()))
        (wall, cpu), (wall_drawn, cpu_drawn), (wall_end, cpu_end) = clocks
        return {
            "wall": wall_end - wall, "cpu": cpu_end - cpu, "generate_wall": wall_drawn - wall,
            "generate_cpu": cpu_drawn - cpu, "imbalance": self.trainer.metrics["work/imbalance"],
        }  # fmt: skip


def work(folder: Path, iterations: int) -> None:
    """In each process: warm up, iterate, and let the first one write what all have measured."""
    torch.set_num_threads(1)
    side = Share(Task.read(folder), {})
    side.iteration()
    found = [gather_object([side.iteration()]) for _ in range(iterations)]
    if side.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def start(processes: int, folder: Path, iterations: int) -> dict[str, float]:
    """Seconds of an iteration, and tokens a second, on so many processes."""
    module = ("-m", "tests.benchmarks.processes")
    command = [sys.executable, *module, "--work", str(folder), "--iterations", str(iterations)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    # Without a launcher: it would put them into sessions of their own, where a priority given to this one is lost.
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment | rank) for rank in ranks]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"one of {processes} processes failed: see its output above")
    rows: list[list[dict[str, float]]] = json.loads((folder / "found.json").read_text())
    workload = Task.read(folder).workload
    tokens = sum(workload.lengths()) + workload.rows * workload.prompt
    seconds = {
        name: sum(max(rank[name] for rank in row) for row in rows) / len(rows)
        for name in ("wall", "cpu", "generate_wall", "generate_cpu")
    }
    return {
        "tokens": tokens, **seconds, "tokens_per_second": tokens / seconds["wall"],
        "tokens_per_cpu_second": tokens / seconds["cpu"], "imbalance": rows[-1][0]["imbalance"],
    }  # fmt: skip


def sizes(workload: Workload, kind: str, processes: int) -> Workload:
    """The workload of all processes together."""
    factor = processes if kind == "more-rows" else 1
    return replace(workload, rows=workload.rows * factor, minibatch=workload.minibatch * factor)


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="cpu-skew")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/results/processes.json"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work is not None:
        work(options.work, options.iterations)
        return
    workload = WORKLOADS[options.workload]

    def one_round(number: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in KINDS:
            for processes in (1, 2):
                with tempfile.TemporaryDirectory() as name:
                    prepare(sizes(workload, kind, processes), Path(name))
                    found[f"{kind}, {processes}"] = start(processes, Path(name), options.iterations)
        return found

    add_rounds(options.output, workload, one_round, rounds=options.rounds, iterations=options.iterations)


if __name__ == "__main__":
    main()
