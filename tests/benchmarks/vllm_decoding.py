"""The decode loop against vLLM on one CPU thread: process CPU time, the sides in turns, lengths forced alike.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m tests.benchmarks.vllm_decoding

A random Llama in the shape of SmolLM2-135M answers prompts of 32 tokens at temperature 1 over all 49,152 tokens, with
the log-probabilities of what was sampled. Sides: the loop, the loop with plain weights, vLLM in this process (eager,
without its cache of prefixes). `skewed`: 32 responses of about 42 tokens, log-normal, 128 at most; the loop drops
finished rows, vLLM its finished requests.
"""

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from rlhf_ppo.kernels.allocator import keep_freed_memory
from rlhf_ppo.kernels.packed_weights import MIN_STEPS
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.benchmarks.records import add_rounds
from tests.benchmarks.workloads import Workload

SHAPE = Workload(name="", vocab=49_152, layers=30, width=576, heads=9, inner=1536, prompt=32, lengths_are="full")
WORKLOADS = {
    "32x32": replace(SHAPE, rows=32, cap=32),
    "16x128": replace(SHAPE, rows=16, cap=128),
    "skewed": replace(SHAPE, rows=32, cap=128, lengths_are="log-normal"),
    "tiny": replace(SHAPE, vocab=512, layers=2, width=64, heads=2, inner=128, rows=4, cap=8),
}
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def by_loop(model: Any, workload: Workload) -> int:
    """Tokens of the loop."""
    config = SamplingConfig(max_new_tokens=workload.cap)
    return sum(map(len, DecodeLoop()(model, workload.prompts(), config, limits=workload.lengths()).responses))


def by_plain_loop(model: Any, workload: Workload) -> int:
    """The same without packed weights."""
    with patch.dict(MIN_STEPS, dict.fromkeys(MIN_STEPS, 10**9)):
        return by_loop(model, workload)


def by_vllm(engine: Any, workload: Workload) -> int:
    """Tokens of vLLM."""
    sampling = importlib.import_module("vllm").SamplingParams
    prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in workload.prompts()]
    settings = [sampling(max_tokens=length, ignore_eos=True, logprobs=0) for length in workload.lengths()]
    outputs = engine.generate(prompts, settings, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def open_vllm(model: Any, dtype: str, length: int) -> Any:
    """vLLM over the same weights, on the threads that torch has."""
    os.environ.update(VLLM)
    make = importlib.import_module("vllm").LLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return make(
            model=folder, dtype=dtype, enforce_eager=True, max_model_len=length, skip_tokenizer_init=True,
            enable_prefix_caching=False, logprobs_mode="processed_logprobs", disable_log_stats=True,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["32x32", "16x128", "skewed"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance-vllm.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    chosen = [
        replace(WORKLOADS[name], name=f"{name}-{options.dtype}", dtype=options.dtype) for name in options.workloads
    ]
    model = chosen[0].model().to(getattr(torch, options.dtype))
    engine = open_vllm(model, options.dtype, 256)
    for workload in chosen:
        sides: dict[str, tuple[Callable[..., int], Any]] = {
            "loop": (by_loop, model), "plain_loop": (by_plain_loop, model), "vllm": (by_vllm, engine)
        }  # fmt: skip
        for side, subject in sides.values():  # whole: the first call compiles, measures and touches its memory first
            assert side(subject, workload)

        def one_round(number: int, workload: Workload = workload, sides: Any = sides) -> dict[str, float]:
            order = list(sides.items())[number % 3 :] + list(sides.items())[: number % 3]
            found = {}
            for name, (side, subject) in order:
                start = time.process_time()
                tokens = side(subject, workload)
                found[name] = tokens / (time.process_time() - start)
                assert tokens == sum(workload.lengths())
            print(workload.name, found, flush=True)
            return found

        add_rounds(options.output, workload, one_round, rounds=options.rounds, unit="tokens per CPU second")


if __name__ == "__main__":
    main()
