"""Language models by name: two embedded ones, a folder, or a name on the model hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ppo.models.loading import with_quantization_config

from .adaptation import adapted_model
from .assets import SMOLLM2, fetch
from .cache import build_once, cache_root
from .command_line import reason
from .reviews import Review, load_reviews, split_reviews
from .sft import SFTConfig, small_language_model

SMALL_GPT2 = "gpt2-small-reviews"
"""A GPT-2 of 4 million weights, trained from nothing on review openings; serves on any machine."""
SMOLLM2_135M = "smollm2-135m"
"""SmolLM2-135M-Instruct from a package, adapted to review openings: writes real sentences, at thirty times the cost."""
EMBEDDED_MODELS = (SMALL_GPT2, SMOLLM2_135M)


def model_location(name: str, *, reviews: Sequence[Review] | None = None, sft: SFTConfig | None = None) -> str:
    """Where `from_pretrained` finds the model: an embedded name becomes a folder, prepared now if it must be.

    Args:
        name: One of `EMBEDDED_MODELS`, a folder, or a name on the model hub.
        reviews: What an embedded model is trained on; the language-model part of the embedded reviews by default.
        sft: How the small GPT-2 is trained.

    Raises:
        ValueError: When a folder is named that does not exist.
        AssetError: When an embedded model needs a package that cannot be fetched.
    """
    if name in EMBEDDED_MODELS:
        texts = split_reviews(load_reviews()).language_model if reviews is None else reviews
        if name == SMALL_GPT2:
            return str(small_language_model(texts, sft))
        return str(adapted_model(smollm2_folder(), texts))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"The folder {name} holds no model: it has no config.json. {_choices()}")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"There is no model folder {name}. {_choices()}")
    return name


def load_language_model(
    name: str,
    *,
    reviews: Sequence[Review] | None = None,
    sft: SFTConfig | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: BitsAndBytesConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready to generate in batches: with a padding token, padded on the left.

    Args:
        name: See [`model_location`][sentiment.language_models.model_location], as for the other arguments.
        reviews: Training text of an embedded model.
        sft: How the small GPT-2 is trained.
        dtype: Of the weights.
        quantization: Fewer bits for the weights of linear layers, on this process's device.

    Raises:
        ValueError: When there is no such model, it is not a causal one, or the tokenizer does not fit it.
        AssetError: When an embedded model needs a package that cannot be fetched.
    """
    location = model_location(name, reviews=reviews, sft=sft)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left")
        few_bits = with_quantization_config({"quantization_config": quantization}) if quantization is not None else {}
        model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **few_bits)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"The model `{name}` could not be loaded as a causal language model: {reason(error)}. {_choices()}"
        ) from error
    return model, fit_tokenizer(name, model, tokenizer)


def fit_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer and the model one padding token, and make sure that they belong together.

    Without a padding token of its own, as with GPT-2, the end-of-text token pads: masks tell them apart.

    Raises:
        ValueError: When there is no tokenizer, no token to pad with, or it knows tokens that the model does not.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer of `{name}` has {len(tokenizer)} tokens but its model only {rows} embeddings: they do not "
            "belong together, and the surplus tokens would be out of range. Name a model saved with its own tokenizer."
        )
    if not tokenizer("The film").input_ids:
        raise ValueError(
            f"`{name}` has no tokenizer: its files are missing, so every text would be empty. Save the model's own "
            "tokenizer beside it: tokenizer.save_pretrained(folder)."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of `{name}` has neither a padding nor an end-of-text token, so texts of different "
                "length cannot share a batch. Set tokenizer.pad_token to an existing token and save it again."
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def smollm2_folder() -> Path:
    """SmolLM2-135M as an ordinary model folder in bfloat16, converted once from its 4-bit GGUF file."""
    return build_once(cache_root() / "models" / f"smollm2-135m-{SMOLLM2.wheel_sha256[:12]}", _convert_smollm2)


def _convert_smollm2(target: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("SmolLM2 comes as a GGUF file, which needs the package gguf: `pip install gguf`.") from error
    file = next(fetch(SMOLLM2).glob("*.gguf"))
    print("Converting SmolLM2-135M from GGUF, once: half a minute ...", flush=True)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(target)
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    config = loaded.config
    del config.quantization_config  # otherwise transformers refuses to save what it has dequantised
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(target)


def _choices() -> str:
    return (
        f"Choose {' or '.join(EMBEDDED_MODELS)}, an existing folder with config.json, or a model of the hub "
        "if it can be reached."
    )
