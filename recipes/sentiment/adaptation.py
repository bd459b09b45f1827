"""A pretrained model learns, through LoRA, that its texts are movie reviews; the adapter is then merged.

A general model drifts off after the first words of a review, to recipes or program code, and a reward for pleasant
words cannot lead it back. A hundred steps on openings suffice, and PPO's frozen reference then writes reviews.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as nnf
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cache import build_once, cache_root, fingerprint
from .reviews import Review
from .threads import choose_threads
from .training import batches, mixed_precision


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """Length and size of the adaptation."""

    row_length: int = 48
    """Tokens of a training row, from the beginning of a review."""
    batch_size: int = 8
    """Rows of a step."""
    steps: int = 120
    """Optimizer steps."""
    rank: int = 16
    """Rank of the LoRA matrices, on every linear layer of the blocks."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; rises over the first tenth and falls along a straight line."""
    seed: int = 0
    """Of the adapter's initial weights and the order of the rows."""


def adapted_model(
    base: Path, reviews: Sequence[Review], config: AdaptationConfig | None = None, *, threads: int | None = None
) -> Path:
    """The folder of `base` adapted to review openings, trained now unless the cache has it.

    Args:
        base: A model folder of the cache; its name stands for its content.
        reviews: Its whole training text.
        config: Length and size.
        threads: PyTorch threads to train with; measured if not given.

    Raises:
        ValueError: When the reviews are too few or too short for one batch of rows.
    """
    config = config or AdaptationConfig()
    key = fingerprint("adapted 1", base.name, asdict(config), [review.text for review in reviews])

    def build(target: Path) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(choose_threads(requested=threads))
        try:
            adapt(base, [review.text for review in reviews], config, target)
        finally:
            torch.set_num_threads(before)

    return build_once(cache_root() / "models" / f"{base.name.rsplit('-', 1)[0]}-reviews-{key}", build)


def adapt(base: Path, texts: Sequence[str], config: AdaptationConfig, folder: Path) -> None:
    """Train the adapter in bfloat16, merge it and save model and tokenizer in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    needed = 2 * config.steps * config.batch_size  # long openings are common: half of the texts would be enough
    encoded = tokenizer(list(texts[:needed]), truncation=True, max_length=config.row_length)["input_ids"]
    rows = torch.tensor([ids for ids in encoded if len(ids) == config.row_length])
    if len(rows) < config.batch_size:
        raise ValueError(
            f"One step needs {config.batch_size} reviews of at least {config.row_length} tokens, got {len(rows)} of "
            f"{len(texts)}: nothing could be learned. Give more reviews, or lower batch_size or row_length."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = get_peft_model(
            model,
            LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    optimize_adapter(model.to(device), rows, config, device)
    model.merge_and_unload().cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def optimize_adapter(model: Any, rows: torch.Tensor, config: AdaptationConfig, device: torch.device) -> None:
    """Next-token cross-entropy on batches of rows [batch, row_length]."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / config.steps, 1 - step / config.steps)
    )
    stream = batches(rows, config.batch_size, torch.Generator().manual_seed(config.seed))
    model.train()
    with tqdm(range(config.steps), desc="Adapting to reviews", unit="step", mininterval=1.0) as progress:
        for _ in progress:
            ids = next(stream).to(device)
            with mixed_precision(device):
                logits = model(input_ids=ids).logits
            loss = nnf.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.set_postfix(perplexity=f"{loss.exp().item():.0f}", refresh=False)
    model.eval()
