"""`python -m rlhf_ppo.merge ADAPTER FOLDER`: merge a trained adapter into its base model."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def merge(adapter: str | Path, folder: str | Path, *, dtype: str = "float32") -> None:
    """Load a saved adapter's base unquantized, merge the adapter, and save model and tokenizer.

    For QLoRA, too: the adapter was trained on a 4-bit base and is merged into the unquantized one.

    Args:
        adapter: Folder that `save_pretrained` or `train()` wrote, or a name on the hub.
        folder: Target folder, created if missing; must not contain a model.

    Raises:
        ValueError: There is no adapter, or `folder` contains a model.
    """
    import torch  # here, so that the help comes without it
    import transformers

    from rlhf_ppo.models import AutoModelForCausalLMWithValueHead
    from rlhf_ppo.models.merging import save_merged

    target = Path(folder)
    if (target / "config.json").exists():
        raise ValueError(f"{target} holds a model already: merging would overwrite it. Choose another folder")
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(adapter), **options)
    if not model.is_peft_model:
        raise ValueError(f"{adapter} holds no adapter (no adapter_config.json): it is a plain model already")
    save_merged(model, target)
    if (Path(adapter) / "tokenizer_config.json").is_file():
        transformers.AutoTokenizer.from_pretrained(adapter).save_pretrained(target)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit status 1 and one line on stderr if merging fails."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_ppo.merge", description=__doc__)
    parser.add_argument("adapter", help="folder of the adapter, e.g. runs/ppo_gpt2_sentiment/model")
    parser.add_argument("folder", help="folder of the merged model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the saved weights (default: float32)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )  # peft
    try:
        merge(options.adapter, options.folder, dtype=options.dtype)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"merged into {options.folder}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
