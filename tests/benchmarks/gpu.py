"""One PPO iteration on one large GPU, phase by phase; resumable, and dry on a CPU with tiny shapes.

    python -m tests.benchmarks.gpu                                        # gpu-dschat and gpu-skew
    python -m tests.benchmarks.gpu --classic ~/trl-0.11.4/bin/python      # TRL 0.11.4 beside them
    python -m tests.benchmarks.gpu --dry-run --output /tmp/dry.json       # no GPU: is the script whole?

Random weights of the named shapes, forced response lengths. A cell is one phase of one side; it is measured `--rounds`
times (the first, which compiles and fills caches, does not count) and written at once, and finished cells are skipped.
`gpu-dschat` has the form of DeepSpeed-Chat's published step 3 (1.3B policy, 350M reward model, 256 + 256 tokens, one
epoch): compare samples a second.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.ppo import Process, prepare
from tests.benchmarks.records import conditions
from tests.benchmarks.sides import Ours, Plain, cost
from tests.benchmarks.workloads import SKEW, WORKLOADS, Task, Workload

NAMES = ["gpu-dschat", "gpu-skew"]
PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200, by its maker
REWARD_MODEL = replace(SKEW, name="350M", vocab=50_272, layers=24, width=1024, heads=16, inner=2816)


class Here:
    """Our side in this process: one copy of CUDA, and memory as the allocator counts it."""

    def __init__(self, kind: type[Ours], task: Task, options: dict[str, Any]) -> None:
        self.side = kind(task, options)

    def __call__(self, command: str) -> dict[str, float]:
        return cost(getattr(self.side, command))

    def stop(self) -> None:
        """Free what it holds."""
        del self.side
        gc.collect()
        torch.cuda.empty_cache()


class RewardModel:
    """A reward model of random weights; `score` runs it over prompts and responses, longest first, 64 at a time."""

    def __init__(self, task: Task, shape: Workload) -> None:
        from transformers import LlamaConfig, LlamaForSequenceClassification

        sizes = replace(shape, vocab=task.workload.vocab).model_config()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1)).to(device, torch.bfloat16)
        pairs = zip(task.workload.prompts(), task.responses, strict=True)
        self.rows = sorted((torch.cat([prompt, response.cpu()]) for prompt, response in pairs), key=len, reverse=True)
        self.device = device

    @torch.no_grad()
    def score(self) -> None:
        """One score a response."""
        for start in range(0, len(self.rows), 64):
            rows = self.rows[start : start + 64]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            self.model(input_ids=ids, attention_mask=mask.to(self.device)).logits.float().cpu()

    def __call__(self, command: str) -> dict[str, float]:
        return cost(getattr(self, command))

    def stop(self) -> None:
        """Free what it holds."""
        del self.model
        gc.collect()
        torch.cuda.empty_cache()


def figures(phase: str, costs: list[dict[str, float]], workload: Workload) -> dict[str, Any]:
    """What a cell says: seconds and memory as measured, speed from the median."""
    seconds = sorted(row["wall"] for row in costs)[len(costs) // 2]
    responses = sum(workload.lengths())
    tokens = responses + workload.rows * workload.prompt
    found: dict[str, Any] = {"seconds": [row["wall"] for row in costs], "samples_per_s": workload.rows / seconds}
    found["peak_gib"] = max(row.get("peak_gib", row["peak_mib"] / 1024) for row in costs)
    if phase == "generate":
        found |= {"tokens_per_s": responses / seconds, "ms_per_decode_step": seconds / max(workload.lengths()) * 1e3}
    elif phase == "step":
        head = workload.vocab * workload.width
        trunk = workload.layers * (4 * workload.width**2 + 3 * workload.width * workload.inner)
        # Policy and reference score once (2 FLOP a weight and token), each epoch is a forward and a backward (6).
        flop = (2 * 2 + 6 * workload.epochs) * (trunk * tokens + head * responses)
        found |= {"tokens_per_s": tokens * workload.epochs / seconds, "useful_tflops": flop / seconds / 1e12}
        found["share_of_peak"] = found["useful_tflops"] / PEAK_TFLOPS
    return found


def fill(path: Path, workload: Workload, options: argparse.Namespace) -> None:
    """Measure every cell of a workload that `path` does not hold."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, dry run"
    entry = known.setdefault(workload.name, conditions(workload) | {"device": device, "cells": {}})
    with tempfile.TemporaryDirectory() as name:
        task = prepare(workload, Path(name))
        starts: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
            "ours": (("generate", "step"), lambda: Here(Ours, task, json.loads(options.ours))),
            "plain": (("generate", "step"), lambda: Here(Plain, task, {})),
            "reward model": (("score",), lambda: RewardModel(task, options.reward_model)),
        }
        if options.classic:
            starts["classic"] = (("generate", "step"), lambda: Process("classic", options.classic, task.folder, {}))
        for side, (phases, start) in starts.items():
            missing = [phase for phase in phases if f"{side}, {phase}" not in entry["cells"]]
            if not missing or side not in options.sides:
                continue
            process = start()
            for phase in missing:
                costs = [process(phase) for _ in range(options.rounds + 1)][1:]
                entry["cells"][f"{side}, {phase}"] = cell = figures(phase, costs, workload)
                print(workload.name, side, phase, json.dumps(cell), flush=True)
                path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            process.stop()


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for and the file does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads", nargs="+", choices=["gpu-dschat", "gpu-skew"], default=["gpu-dschat", "gpu-skew"]
    )
    parser.add_argument("--sides", nargs="+", default=["ours", "reward model", "plain", "classic"])
    parser.add_argument("--classic", help="Python of an environment with TRL 0.11.4 and CUDA")
    parser.add_argument("--ours", default="{}", help="further settings of our PPOConfig, JSON")
    parser.add_argument("--rows", type=int, help="responses of an iteration, instead of the workload's")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on whatever device there is")
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance-gpu.json"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        sys.exit(
            "These shapes need a GPU of 80 GiB or more, got none: use --dry-run, or tests.benchmarks.ppo on a CPU."
        )
    options.reward_model = WORKLOADS["tiny"] if options.dry_run else REWARD_MODEL
    for name in options.workloads:
        workload = WORKLOADS[name]
        if options.dry_run:
            small = {"vocab": 300, "layers": 1, "width": 16, "heads": 2, "inner": 32, "rows": 8, "minibatch": 4}
            workload = replace(workload, **small, prompt=8, cap=16, mean=6.0)
        fill(options.output, replace(workload, rows=options.rows or workload.rows), options)


if __name__ == "__main__":
    main()
