"""Language models by name: two embedded ones, a folder, or a name on the model hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch.nn import functional as nnf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.models.loading import with_quantization_config
from rlhf_ppo.models.saving import save_language_model
from rlhf_ppo.utils.model_names import is_missing_folder

from .assets import SMOLLM2, build_once, cache_root, fetch, fingerprint, kept_beside
from .command_line import reason
from .reviews import Review, load_reviews, split_reviews
from .sft import SFTConfig, batches, mixed_precision, small_language_model, train_steps

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
    if is_missing_folder(name):
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


def load_policy(
    name: str, lora_rank: int = 0, bfloat16: bool = False, quantization: BitsAndBytesConfig | None = None
) -> tuple[AutoModelForCausalLMWithValueHead, PreTrainedTokenizerBase]:
    """The policy with its value head at zero, under LoRA adapters if asked for, and its tokenizer."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    model, tokenizer = load_language_model(name, dtype=dtype, quantization=quantization)
    adapters = None
    if lora_rank:
        adapters = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=adapters)
    torch.nn.init.zeros_(policy.v_head.summary.weight)  # V = 0 until something is known (Ziegler et al. 2019)
    torch.nn.init.zeros_(policy.v_head.summary.bias)
    return policy, tokenizer


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
    # Torch's fused attention has a slow backward pass in bfloat16 on a CPU.
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = get_peft_model(
            model,
            LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    optimize_adapter(model.to(device), rows, config, device, kept_beside(folder))
    save_language_model(model.merge_and_unload().cpu(), folder)
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
