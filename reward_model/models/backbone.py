"""Load a pretrained model and its tokenizer as a classifier with one label."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rlhf_ppo.models.value_head import find_file
from rlhf_ppo.utils.model_names import check_model_name

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"


def load_backbone(
    name: str, *, seed: int, trust_remote_code: bool = False, attn_implementation: str | None = None
) -> tuple[Any, Any, set[str]]:
    """Load model and tokenizer with a scalar head, in float32, and tell which weights the files lack.

    A causal LM, an encoder without a head and a classifier with another number of labels get a fresh head
    (`initialize_head`); a one-label classifier keeps its own.

    Args:
        name: Hub name or folder.
        seed: Seed of the fresh head and of all weights that the files lack; the global random state stays.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: Attention of transformers; None: its choice.

    Raises:
        ValueError: The model cannot be loaded as a sequence classifier, or is an adapter; the message says what to try.
    """
    check_model_name(name)
    _check_no_adapter(name)
    try:
        # Transformers would report the missing head, which is read from the loading info below. It draws weights that
        # the files lack, such as a pooler's, from the global generator.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, missing, _ = read_classifier(
                name, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        remedy = (
            "Expected a hub name or a folder made by save_pretrained that holds config.json, weights and tokenizer "
            "files. Check the spelling, and that the hub can be reached."
        )
        if "Unrecognized configuration class" in str(error):
            remedy = (
                "transformers has no classifier of this architecture, so there is no scalar head to train. Of a model "
                "that reads images, save the language model alone, with its tokenizer, and train that; or choose one "
                "with a classifier, such as Gemma 3 or Qwen 3.5."
            )
        if attn_implementation is not None:
            remedy += f" attn_implementation={attn_implementation!r} must be installed here; leave it out otherwise."
        raise ValueError(
            f"The model {name!r} could not be loaded as a sequence classifier with its tokenizer: "
            f"{_first_line(error):.200} {remedy}"
        ) from error
    if head_name(model) in missing or head_name(model).removesuffix(".weight") + ".bias" in missing:
        initialize_head(model, seed=seed)
    separate_padding(model, tokenizer)
    return model, tokenizer, missing


def _check_no_adapter(name: str) -> None:
    if find_file(name, "adapter_config.json") is None:
        return
    config = PeftConfig.from_pretrained(name)
    remedy = f"Merge it, `rlhf-ppo merge {name} FOLDER`, and train from FOLDER."
    if str(config.task_type) == "SEQ_CLS":
        remedy = "Train that reward model with merge_adapter=True, and go on from its folder."
    raise ValueError(
        f"expected a whole model to begin with, got {name}, an adapter on {config.base_model_name_or_path}: "
        f"transformers loads it frozen, so that nothing would be learned. {remedy}"
    )


def read_classifier(
    path: str | Path, *, labels: int = 1, dtype: torch.dtype = torch.float32, kind: Any = None, **options: Any
) -> tuple[Any, set[str], set[str]]:
    """The classifier of a folder or hub name, and where its weights and those of the checkpoint differ.

    Args:
        kind: Auto class; None: `AutoModelForSequenceClassification`.

    Returns:
        The model; its weights that the checkpoint lacks or misshapes, which are random numbers; and the weights of the
        checkpoint that it does not know.
    """
    model, info = (kind or AutoModelForSequenceClassification).from_pretrained(
        path, num_labels=labels, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    missing = {str(key) for key in info["missing_keys"]} | {str(entry[0]) for entry in info["mismatched_keys"]}
    return model, missing, {str(key) for key in info["unexpected_keys"]}


def layers_of(model: Any) -> Any:
    """The transformer below the scalar head of a sequence classifier, with or without adapters."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


def head_name(model: nn.Module, *, labels: int = 1) -> str:
    """Parameter name of the head's weight in the checkpoint; a ValueError if no linear layer has `labels` outputs."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == labels
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with {labels} outputs, so there is no reward to read. "
            "Use a model class that AutoModelForSequenceClassification knows."
        )
    return f"{names[-1]}.weight"


def initialize_head(model: nn.Module, *, seed: int) -> None:
    """Initialize the head: weight from N(0, 1 / (d + 1)), that is standard deviation 1/sqrt(d + 1), and bias 0.

    The first rewards then have a variance near 1, whatever the width d (Ziegler et al. 2019, their code; the 2020
    paper prints the standard deviation without the root).
    """
    head = model.get_submodule(head_name(model).removesuffix(".weight"))
    weight = head.get_parameter("weight")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1))
        if head.bias is not None:
            head.get_parameter("bias").zero_()


def separate_padding(model: Any, tokenizer: Any) -> None:
    """Add a padding token to the tokenizer if it has none or pads with the end-of-text token.

    Decoder classifiers read the score at the last token that is not padding. With pad = eos they would skip
    the end-of-text token that the text rule appends, and a text could not be told from its unfinished beginning.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        logger.info("Padding token %s (id %d) added: it was %s.", PAD_TOKEN, tokenizer.pad_token_id, "eos or missing")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def short_name(name: str) -> str:
    """A hub name unchanged; of a folder only the last part, so that the contract holds no local path."""
    return Path(name).name if Path(name).exists() else name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context manager: while active, transformers logs errors alone."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
