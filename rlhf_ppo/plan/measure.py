"""Run one real iteration with random weights and measure peak memory and FLOP rates, to compare with a plan.

Run it as its own process, `python -m rlhf_ppo.plan.measure settings.json`: a peak is per process.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, PreTrainedTokenizerFast

from rlhf_ppo import PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.plan.compute import FlopRates, iteration_flops
from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import build_policy, model_config
from rlhf_ppo.plan.traces import trace_memory
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop


def measure(plan: PlanConfig) -> dict[str, Any]:
    """Measure one iteration: peak bytes beyond those before any model, seconds and FLOP rate of each phase.

    The doctor's checks of the first batch are off: they can be the peak of a whole run. On a CUDA device the peak is
    that of PyTorch's allocator.
    """
    # Warm-up: one-time allocations; Accelerate keeps the precision of the first iteration.
    warm_up = PlanConfig(mini_batch_size=2, batch_size=2, prompt_tokens=4, new_tokens=4, ppo_epochs=1)
    _run_iteration(replace(warm_up, precision=plan.precision), tiny=True)
    with _measure_peak() as peak:
        metrics = _run_iteration(plan)
    flops = iteration_flops(plan, trace_memory(plan))
    seconds = {
        "rollout": metrics["time/generate"],
        "scoring": metrics["time/ppo/forward_pass"],
        "update": metrics["time/ppo/optimize_step"],
    }
    rates = FlopRates(**{phase: getattr(flops, phase) / value for phase, value in seconds.items()})
    return {"peak": peak[0], "seconds": seconds, "rates": asdict(rates), "config": asdict(plan)}


def _run_iteration(plan: PlanConfig, *, tiny: bool = False) -> dict[str, float]:
    """Run one iteration of the trainer and return its metrics."""
    model_shape = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=64) if tiny else model_config(plan.model)
    tokenizer = _tokenizer()
    model = build_policy(model_shape, plan)
    trainer = PPOTrainer(
        PPOConfig(
            batch_size=plan.batch_size, mini_batch_size=plan.mini_batch_size, ppo_epochs=plan.ppo_epochs,
            gradient_accumulation_steps=plan.gradient_accumulation_steps, logits_chunk_size=plan.logits_chunk_size,
            gradient_checkpointing=plan.gradient_checkpointing, token_budget=plan.token_budget,
            diagnose=False,  # runs once, and no plan includes it
            precision="float32" if plan.precision == "float32" else "auto",
            accelerator_kwargs={"mixed_precision": "bf16"} if plan.precision == "bf16-mixed" else {},
        ),
        model, tokenizer=tokenizer,
        dataset=PromptDataset.from_texts([" ".join(["w"] * plan.prompt_tokens)] * plan.batch_size, tokenizer),
    )  # fmt: skip
    state = trainer.train(
        lambda *, responses, **_: [float(index % 2) for index in range(len(responses))],
        TrainConfig(iterations=1, sampling=SamplingConfig(max_new_tokens=plan.new_tokens), progress=False),
        sampler=DecodeLoop(
            max_rows=plan.decode_rows,
            kv_budget_bytes=None if plan.kv_budget_gib is None else int(plan.kv_budget_gib * 2**30),
        ),
    )
    return state.metrics


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "w": 1}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


@contextmanager
def _measure_peak() -> Iterator[list[int]]:
    """Context manager: measure the block's peak memory; afterwards the yielded list holds it, bytes above the start."""
    peak: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() - start)
        return
    start = _resident()
    yield peak
    peak.append(max(_resident_peak(), start) - start)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = measure(PlanConfig(**json.loads(Path(sys.argv[1]).read_text())))
    json.dump(result | {"wall_seconds": time.perf_counter() - start}, sys.stdout)
