"""The decode loop against `model.generate`: process CPU time, the two interleaved, lengths forced alike.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.generation --size small gpt2 --lengths even full

A random GPT-2 answers 64 prompts of 16 tokens at temperature 1 over the whole vocabulary (50 257): 48 tokens each
(`full`), or 8 to 48, evenly spread (`even`). The lengths are imposed on both sides by their own way of ending a row,
a limit per prompt here and a stopping criterion there; neither does work for it worth measuring. Before anything is
timed, both decode greedily and must give the same tokens. Rounds are appended to `--output`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.samplers.base import Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.benchmarks.records import add_rounds
from tests.benchmarks.sides import generation_settings
from tests.benchmarks.workloads import Workload

SIZES = {"small": (6, 8, 256), "gpt2": (12, 12, 768)}  # layers, heads, width


def workload_of(size: str, lengths: str, dtype: str) -> Workload:
    """What is decoded."""
    layers, heads, width = SIZES[size]
    return Workload(
        name=f"{size}-{lengths}-{dtype}", model_type="gpt2", vocab=50257, layers=layers, heads=heads, width=width,
        rows=64, prompt=16, cap=48, lengths_are=lengths, dtype=dtype,
    )  # fmt: skip


def by_loop(model: Any, workload: Workload, *, sample: bool = True) -> Samples:
    """Our side."""
    config = SamplingConfig(max_new_tokens=workload.cap, do_sample=sample)
    return DecodeLoop()(model, workload.prompts(), config, limits=workload.lengths())


def by_generate(model: Any, workload: Workload, *, sample: bool = True) -> list[Tensor]:
    """The other side, as a script calls it: one batch, no filters."""
    ids = torch.stack(workload.prompts())
    settings = generation_settings(workload, do_sample=sample)
    rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return [row[workload.prompt :][:length] for row, length in zip(rows, workload.lengths(), strict=True)]


def cpu_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Process CPU time of one call: other jobs on the machine count little."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def check_equal(model: Any, workload: Workload) -> None:
    """Greedy tokens must agree in float32; in bfloat16 ties are many and the order of sums decides them."""
    ours = by_loop(model, workload, sample=False).responses
    theirs = by_generate(model, workload, sample=False)
    if workload.dtype == "float32" and any(a.tolist() != b.tolist() for a, b in zip(ours, theirs, strict=True)):
        raise RuntimeError("The decode loop and generate must give equal greedy tokens, got different ones.")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--lengths", nargs="+", choices=["even", "full"], default=["even", "full"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance-generation.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in options.size:
        for lengths in options.lengths:
            workload = replace(workload_of(size, lengths, options.dtype), rows=options.rows)
            model = workload.model().to(getattr(torch, options.dtype))
            check_equal(model, workload)

            def one_round(number: int, model: Any = model, workload: Workload = workload) -> dict[str, float]:
                sides = (by_loop, by_generate) if number % 2 == 0 else (by_generate, by_loop)
                return {side.__name__: cpu_seconds(side, model, workload) for side in sides}

            add_rounds(options.output, workload, one_round, rounds=options.rounds)


if __name__ == "__main__":
    main()
