"""The decode loop against `model.generate`: process CPU time, the two interleaved, lengths forced alike.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.generation --size small --lengths skewed full --repeats 5

A random GPT-2 answers 64 prompts of 16 tokens at temperature 1 over the whole vocabulary (50 257): 48 tokens each
(`full`), or 8 to 48, evenly spread (`skewed`). The lengths are imposed on both sides by their own way of ending a row,
a limit per prompt here and a stopping criterion there; neither does work for it worth measuring. Before anything is
timed, both decode greedily and must give the same tokens.

Prints the CPU seconds of every repeat, the ratio generate / loop (minimum, median, maximum) and what the loop computed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from rlhf_ppo.rollout.decoding import DecodeLoop
from rlhf_ppo.rollout.sampling import Samples, SamplingConfig

SIZES = {"small": (6, 8, 256), "gpt2": (12, 12, 768)}  # layers, heads, width
VOCAB, ROWS, PROMPT, STEPS, SHORTEST = 50257, 64, 16, 48, 8


class EndAt(StoppingCriteria):
    """Ends row i after `lengths[i]` new tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.eos_token_id: list[int] = []  # generate pads finished rows only where a criterion has this name
        self.widths = torch.tensor(lengths) + PROMPT

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return self.widths <= input_ids.shape[1]


def build_model(size: str, dtype: torch.dtype) -> Any:
    """A random GPT-2 of the given size."""
    layers, heads, width = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width, vocab_size=VOCAB)
    model: Any = GPT2LMHeadModel(config)
    return model.to(dtype).eval()


def by_loop(model: Any, prompts: list[Tensor], lengths: Sequence[int], *, sample: bool = True) -> Samples:
    """Our side."""
    config = SamplingConfig(max_new_tokens=STEPS, do_sample=sample)
    return DecodeLoop()(model, prompts, config, limits=lengths)


def by_generate(model: Any, prompts: list[Tensor], lengths: Sequence[int], *, sample: bool = True) -> list[Tensor]:
    """The other side, as a script calls it: one batch, no filters."""
    ids = torch.stack(prompts)
    settings = {"top_k": 0} if sample else {}
    rows = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=sample, eos_token_id=None,
        pad_token_id=0, stopping_criteria=StoppingCriteriaList([EndAt(lengths)]), **settings,
    )  # fmt: skip
    return [row[PROMPT : PROMPT + length] for row, length in zip(rows, lengths, strict=True)]


def cpu_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Process CPU time of one call: other jobs on the machine count little."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def compare(size: str, lengths_name: str, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Time both sides in turn and return the ratios."""
    model = build_model(size, dtype)
    prompts = list(torch.randint(1, VOCAB, (ROWS, PROMPT)))
    lengths = [STEPS] * ROWS
    if lengths_name == "skewed":
        spread = torch.linspace(SHORTEST, STEPS, ROWS).round().long()
        lengths = spread[torch.randperm(ROWS)].tolist()
    check_equal(model, prompts, lengths, dtype)
    pairs = []
    for repeat in range(repeats):
        sides = (by_loop, by_generate) if repeat % 2 == 0 else (by_generate, by_loop)
        seconds = {side: cpu_seconds(side, model, prompts, lengths) for side in sides}
        pairs.append((seconds[by_loop], seconds[by_generate]))
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    return {
        "size": size, "lengths": lengths_name, "dtype": str(dtype).removeprefix("torch."),
        "loop_cpu_s": [round(ours, 2) for ours, _ in pairs],
        "generate_cpu_s": [round(theirs, 2) for _, theirs in pairs],
        "ratio_min": round(ratios[0], 2), "ratio_median": round(statistics.median(ratios), 2),
        "ratio_max": round(ratios[-1], 2), "work": by_loop(model, prompts, lengths).work,
    }  # fmt: skip


def check_equal(model: Any, prompts: list[Tensor], lengths: Sequence[int], dtype: torch.dtype) -> None:
    """Greedy tokens must agree in float32; in bfloat16 ties are many and the order of sums decides them."""
    ours = by_loop(model, prompts, lengths, sample=False).responses
    theirs = by_generate(model, prompts, lengths, sample=False)
    if dtype == torch.float32 and any(a.tolist() != b.tolist() for a, b in zip(ours, theirs, strict=True)):
        raise RuntimeError("The decode loop and generate must give equal greedy tokens, got different ones.")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--lengths", nargs="+", choices=["skewed", "full"], default=["skewed", "full"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in options.size:
        for lengths in options.lengths:
            for name, value in compare(size, lengths, options.repeats, getattr(torch, options.dtype)).items():
                print(f"{name:>16}: {value}")
            print(flush=True)


if __name__ == "__main__":
    main()
