"""One real iteration with random weights, to hold a plan against: peak memory and operations a second.

Run it in a process of its own, `python -m rlhf_ppo.plan.measure settings.json`: a peak is that of a process.
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
from rlhf_ppo.plan.compute import Rates, work
from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import build, model_config
from rlhf_ppo.plan.traces import trace
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop


def measure(plan: PlanConfig) -> dict[str, Any]:
    """Peak bytes above what the interpreter had before any model, seconds of each phase, and rates.

    Without the doctor's look at the first batch, which can be the peak of a whole run.

    On a CUDA device the peak is what PyTorch's allocator held.
    """
    # What the first iteration of a process takes once; Accelerate holds on to the precision of the first.
    first = PlanConfig(mini_batch_size=2, batch_size=2, prompt_tokens=4, new_tokens=4, ppo_epochs=1)
    _iterate(replace(first, precision=plan.precision), tiny=True)
    with _peak() as peak:
        metrics = _iterate(plan)
    done = work(plan, trace(plan))
    seconds = {
        "rollout": metrics["time/generate"],
        "scoring": metrics["time/ppo/forward_pass"],
        "update": metrics["time/ppo/optimize_step"],
    }
    rates = Rates(**{phase: getattr(done, phase) / value for phase, value in seconds.items()})
    return {"peak": peak[0], "seconds": seconds, "rates": rates.to_dict(), "config": asdict(plan)}


def _iterate(plan: PlanConfig, *, tiny: bool = False) -> dict[str, float]:
    """One iteration of the trainer; returns its metrics."""
    shape = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=64) if tiny else model_config(plan.model)
    tokenizer = _tokenizer()
    model = build(shape, plan)
    trainer = PPOTrainer(
        PPOConfig(
            batch_size=plan.batch_size, mini_batch_size=plan.mini_batch_size, ppo_epochs=plan.ppo_epochs,
            gradient_accumulation_steps=plan.gradient_accumulation_steps, logits_chunk_size=plan.logits_chunk_size,
            gradient_checkpointing=plan.gradient_checkpointing,
            diagnose=False,  # it comes once, and no plan has it
            accelerator_kwargs={"mixed_precision": "bf16"} if plan.precision == "bf16-mixed" else {},
        ),
        model, tokenizer=tokenizer,
        dataset=PromptDataset.from_texts([" ".join(["w"] * plan.prompt_tokens)] * plan.batch_size, tokenizer),
    )  # fmt: skip
    state = trainer.train(
        lambda *, responses, **_: [float(index % 2) for index in range(len(responses))],
        TrainConfig(iterations=1, sampling=SamplingConfig(max_new_tokens=plan.new_tokens), progress=False),
        sampler=DecodeLoop(max_rows=plan.decode_rows, kv_budget_bytes=int(plan.kv_budget_gib * 2**30)),
    )
    return state.metrics


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "w": 1}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Inside, the peak is watched; the list holds it afterwards, bytes above the start."""
    found: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield found
        found.append(torch.cuda.max_memory_allocated() - start)
        return
    start = _resident()
    yield found
    found.append(max(_resident_peak(), start) - start)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = measure(PlanConfig(**json.loads(Path(sys.argv[1]).read_text())))
    json.dump(found | {"wall_seconds": time.perf_counter() - began}, sys.stdout)
