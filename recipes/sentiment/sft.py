"""A small GPT-2 learns to write the beginnings of movie reviews, from nothing, in minutes on a CPU.

Two choices make that possible. The rows are cut to the length that PPO will generate, each the opening of a review or a
stretch that begins with one of its sentences, so no step is spent on padding or on a context nobody uses. And the
matrices are trained by Muon (Jordan et al. 2024): in the thousand steps there is time for it gets much further than
AdamW, which keeps the embeddings, norms and biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_ppo.kernels.allocator import keep_freed_memory
from rlhf_ppo.loop.signals import EXIT_RESUMABLE, stop_on_signals
from rlhf_ppo.utils.progress import ProgressBar

from .assets import build_once, cache_root, fingerprint, kept_beside
from .command_line import leave
from .reviews import Review, train_tokenizer, training_rows


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """The small language model and how it is trained."""

    vocabulary_size: int = 4096
    """Tokens of its own byte-level BPE."""
    n_embd: int = 256
    """Width."""
    n_layer: int = 4
    """Blocks."""
    n_head: int = 4
    """Attention heads."""
    n_positions: int = 128
    """Longest text it can read; only the first `row_length` positions are trained."""
    row_length: int = 64
    """Tokens of a training row."""
    batch_size: int = 32
    """Rows of a step."""
    steps: int = 1300
    """Optimizer steps."""
    opening_fraction: float = 0.5
    """Last part of the steps that sees openings alone; before, any stretch that begins with a sentence."""
    matrix_learning_rate: float = 0.02
    """Peak learning rate of Muon, in the scale of AdamW's (`match_rms_adamw`)."""
    learning_rate: float = 0.008
    """Peak learning rate of AdamW, for everything that is not a matrix of a block."""
    weight_decay: float = 0.1
    """Decay of the matrices."""
    warmup_fraction: float = 0.05
    """Part of the steps in which the learning rates rise."""
    final_learning_rate: float = 0.05
    """Where they end, as a part of the peak; they fall along a straight line."""
    seed: int = 0
    """Of the initial weights and the order of the rows."""

    def __post_init__(self) -> None:
        if self.row_length > self.n_positions:
            raise ValueError(
                f"Rows of {self.row_length} tokens do not fit into n_positions={self.n_positions}. "
                "Raise n_positions or shorten the rows."
            )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} cannot be shared evenly by n_head={self.n_head} heads. Change one of them."
            )


def small_language_model(reviews: Sequence[Review], config: SFTConfig | None = None) -> Path:
    """The folder of the language model trained on these reviews, trained now unless the cache has it.

    Args:
        reviews: Its whole training text.

    Raises:
        ValueError: When the reviews are too few or too short for one batch of rows.
    """
    config = config or SFTConfig()
    key = fingerprint("gpt2-small-reviews 2", asdict(config), [review.text for review in reviews])
    folder = cache_root() / "models" / f"gpt2-small-reviews-{key}"
    return build_once(folder, lambda target: train_language_model(reviews, config, target))


def train_language_model(reviews: Sequence[Review], config: SFTConfig, folder: Path) -> None:
    """Train tokenizer and model and save both in `folder`; an interrupted training goes on where it was."""
    texts = [review.text for review in reviews]
    tokenizer = train_tokenizer(texts, vocabulary_size=config.vocabulary_size)
    openings, stretches = training_rows(tokenizer, texts, length=config.row_length)
    if len(openings) < config.batch_size:
        raise ValueError(
            f"One step needs {config.batch_size} reviews of at least {config.row_length} tokens, got {len(openings)} "
            f"of {len(texts)}: nothing could be learned. Give more reviews, or lower batch_size or row_length."
        )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = new_model(config, tokenizer)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    optimize(model, openings, stretches, config, kept_beside(folder))
    model.cpu().eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_model(config: SFTConfig, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2 without dropout: no row is seen often enough to be learned by heart."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu",  # on a CPU, torch takes three to six times as long for GPT-2's tanh form
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimize(model: Any, openings: torch.Tensor, stretches: torch.Tensor, config: SFTConfig, kept: Path) -> None:
    """Next-token cross-entropy for `config.steps` steps, in bfloat16 where the processor computes with it."""
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, config)
    *muons, adamw = optimizers
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def step(number: int, rows: torch.Tensor) -> torch.Tensor:
        rate = learning_rate(number, config)
        for optimizer, groups in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = peak * rate
        rows = rows.to(device)
        with mixed_precision(device):
            logits = model(input_ids=rows).logits
        following = nnf.pad(rows[:, 1:], (0, 1), value=-100)  # a slice of the logits would copy them twice
        loss = nnf.cross_entropy(logits.flatten(0, 1).float(), following.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        list(workers.map(lambda muon: muon.step(), muons))
        adamw.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        return loss

    keep_freed_memory()
    model.train()
    model.set_attn_implementation("eager")  # torch's fused attention has a slow backward pass in bfloat16 on a CPU
    parts = {"model": model, "adamw": adamw, **{f"muon {index}": muon for index, muon in enumerate(muons)}}
    data = data_of_steps(openings, stretches, config)
    with single_threaded_workers() as workers:
        train_steps("Language model", step, data, steps=config.steps, parts=parts, kept=kept)


@contextmanager
def single_threaded_workers() -> Iterator[Executor]:
    """As many workers as torch has threads, each with one thread: for products too small to be shared by threads."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        yield workers


def data_of_steps(openings: torch.Tensor, stretches: torch.Tensor, config: SFTConfig) -> Iterator[torch.Tensor]:
    """The batch of each step: stretches first, then openings alone."""
    generator = torch.Generator().manual_seed(config.seed)
    of_openings = batches(openings, config.batch_size, generator)
    of_stretches = batches(stretches, config.batch_size, generator)
    first_opening = round((1 - config.opening_fraction) * config.steps)
    for step in range(config.steps):
        yield next(of_stretches if step < first_opening else of_openings)


def make_optimizers(model: torch.nn.Module, config: SFTConfig) -> list[torch.optim.Optimizer]:
    """A Muon for each matrix of the blocks, so that they can step at the same time; at the end AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
        (matrices if inner else others).append(parameter)
    muon = partial(
        torch.optim.Muon,
        lr=config.matrix_learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [
        *(muon([matrix]) for matrix in matrices),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, config: SFTConfig) -> float:
    """The learning rate as a part of its peak: a straight rise, then a straight fall to `final_learning_rate`."""
    done = (step + 1) / config.steps
    rise = min(1.0, done / config.warmup_fraction) if config.warmup_fraction else 1.0
    return rise * (1.0 - done * (1.0 - config.final_learning_rate))


SHARES = 25
"""Parts of a training after each of which it is saved: a killed one repeats at most 4 %."""


def batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of rows without end, each pass in a new order; what is left of a pass is dropped."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for begin in range(0, len(rows) - size + 1, size):
            yield rows[order[begin : begin + size]]


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 if the device computes with it; a CPU that only imitates it would be slower."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool(torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


def train_steps(
    name: str,
    step: Callable[[int, Tensor], Tensor],
    data: Iterator[Tensor],
    *,
    steps: int,
    parts: Mapping[str, Any],
    kept: Path,
) -> None:
    """Take the steps that are left of a training, and keep its state every few of them.

    A signal ends the process after the step that runs; one more does so at once. Killed or stopped, the training goes
    on from its last state and ends with the same weights.

    Args:
        name: Before the bar and in the line about a signal.
        step: Learns from a batch as step number so and so; returns the loss.
        data: The batches of all steps from the first on; those of finished steps are passed over.
        steps: How many there are in all.
        parts: Everything that a step changes, by name: each with `state_dict` and `load_state_dict`.
        kept: Folder of the state.
    """
    file = kept / "state.pt"
    first = _restore(file, parts)
    every = max(1, steps // SHARES)
    smoothed = math.nan
    bar = ProgressBar(total=steps, initial=first, desc=name, unit="step", mininterval=1.0)
    with bar, stop_on_signals() as request:
        for index, rows in zip(range(first, steps), islice(data, first, None)):  # noqa: B905  the data may have no end
            loss = step(index, rows)
            bar.update()
            if index % 10 == 0:
                value = loss.item()
                smoothed = value if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * value
                bar.set_postfix(perplexity=f"{math.exp(min(smoothed, 20.0)):.0f}", refresh=False)
            if request.is_set or (index + 1) % every == 0 or index + 1 == steps:
                _keep(file, index + 1, parts)
            if request.is_set:
                break
    if request.is_set:
        line = (
            f"Stopped by {request.signal_name} after step {index + 1} of {steps} of the {name.lower()}, which is kept"
        )
        leave(f"{line}; the same command goes on.", EXIT_RESUMABLE, None)


def _keep(file: Path, done: int, parts: Mapping[str, Any]) -> None:
    """Replace the state on disk: a reader sees the one before or this one."""
    file.parent.mkdir(exist_ok=True)
    aside = file.with_suffix(".aside")
    torch.save({"done": done, "parts": {name: part.state_dict() for name, part in parts.items()}}, aside)
    aside.replace(file)


def _restore(file: Path, parts: Mapping[str, Any]) -> int:
    """Put the kept state back; the number of finished steps."""
    if not file.is_file():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["parts"].keys() != parts.keys():  # another version of this recipe kept it
        return 0
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return int(state["done"])
