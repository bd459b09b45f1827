"""`python -m rlhf_ppo.merge ADAPTER FOLDER`: a trained adapter and its base as one plain transformers model."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from rlhf_ppo.models import AutoModelForCausalLMWithValueHead
from rlhf_ppo.models.merging import save_merged

DTYPES = ("float32", "bfloat16", "float16")


def merge(adapter: str | Path, folder: str | Path, *, dtype: str = "float32") -> None:
    """Load the base of a saved adapter whole, add the adapter, and save model and tokenizer.

    It is also the way out of QLoRA: the adapter was trained on a base in 4 bits, and is added to the whole one.

    Args:
        adapter: Folder that `save_pretrained` or `train()` wrote, or a name on the hub.
        folder: Made when missing; must not hold a model yet.
        dtype: Of the saved weights.

    Raises:
        ValueError: There is no adapter, or the folder is taken.
    """
    target = Path(folder)
    if (target / "config.json").exists():
        raise ValueError(f"{target} holds a model already: choose another folder, so that none is overwritten")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(adapter), **options)
    if not model.is_peft_model:
        raise ValueError(f"{adapter} holds no adapter (no adapter_config.json): it is a plain model already")
    save_merged(model, target)
    if (Path(adapter) / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(adapter).save_pretrained(target)


def main(arguments: list[str] | None = None) -> int:
    """Merge; exit status 1 with one line when it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_ppo.merge", description=__doc__)
    parser.add_argument("adapter", help="folder of the adapter, e.g. runs/ppo_gpt2_sentiment/model")
    parser.add_argument("folder", help="where the plain model goes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the saved weights (default: float32)")
    chosen = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )  # peft
    try:
        merge(chosen.adapter, chosen.folder, dtype=chosen.dtype)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"merged into {chosen.folder}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
