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
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cache import build_once, cache_root, fingerprint, kept_beside
from .reviews import Review
from .training import batches, mixed_precision, train_steps


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


def adapted_model(base: Path, reviews: Sequence[Review], config: AdaptationConfig | None = None) -> Path:
    """The folder of `base` adapted to review openings, trained now unless the cache has it.

    Args:
        base: A model folder of the cache; its name stands for its content.
        reviews: Its whole training text.
        config: Length and size.

    Raises:
        ValueError: When the reviews are too few or too short for one batch of rows.
    """
    config = config or AdaptationConfig()
    texts = [review.text for review in reviews]
    key = fingerprint("adapted 1", base.name, asdict(config), texts)
    folder = cache_root() / "models" / f"{base.name.rsplit('-', 1)[0]}-reviews-{key}"
    return build_once(folder, lambda target: adapt(base, texts, config, target))


def adapt(base: Path, texts: Sequence[str], config: AdaptationConfig, folder: Path) -> None:
    """Train the adapter in bfloat16, from where it was interrupted; merge it, save model and tokenizer in `folder`."""
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
    optimize_adapter(model.to(device), rows, config, device, kept_beside(folder))
    model.merge_and_unload().cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def optimize_adapter(
    model: Any, rows: torch.Tensor, config: AdaptationConfig, device: torch.device, kept: Path
) -> None:
    """Next-token cross-entropy on batches of rows [batch, row_length]."""
    trained = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / config.steps, 1 - step / config.steps)
    )

    def step(_: int, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(device)
        with mixed_precision(device):
            logits = model(input_ids=ids).logits
        loss = nnf.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss

    model.train()
    parts = {"adapter": trained, "optimizer": optimizer, "schedule": schedule}
    data = batches(rows, config.batch_size, torch.Generator().manual_seed(config.seed))
    train_steps("Adaptation", step, data, steps=config.steps, parts=parts, kept=kept)
    model.eval()
