"""Load reward models of other makers, and infer the contract that they come without.

A folder or hub name of `AutoModelForSequenceClassification` (trl's reward models, Skywork's, classifiers with a chosen
label) or of OpenRLHF, whose head is called `value_head` or `score` and is read at the last token.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from reward_model.models.backbone import (
    head_name,
    quiet_transformers,
    read_classifier,
    separate_padding,
    short_name,
)
from reward_model.models.contract import (
    CONTRACT_FILE,
    Contract,
    ContractError,
    Layout,
    Normalization,
    TextRule,
    tokenizer_sha256,
)
from reward_model.models.loading import ADAPTER_FILE, check_length, check_tokenizer, load_adapter, load_classifier
from rlhf_ppo.models.small_batch import is_low_precision
from rlhf_ppo.models.trunk import max_positions
from rlhf_ppo.utils.model_names import is_missing_folder

logger = logging.getLogger(__name__)

LONGEST_TEXT = 4096
"""Tokens of the longest text where the model takes more, or says nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """What a `RewardModel` is made of."""

    model: Any
    tokenizer: Any
    contract: Contract
    can_be_padded: bool = True
    """Whether scores are the same with padding on the right; if not, texts are scored one by one."""


def load_parts(
    path: str | Path, *, dtype: torch.dtype, label: str | int | None = None, trust_remote_code: bool = False
) -> ModelParts:
    """Load model, tokenizer and contract of a folder or hub name; a contract that is missing is inferred.

    Raises:
        ContractError: The files do not belong together, or no contract can be inferred.
    """
    folder, trust = Path(path), trust_remote_code
    if not (folder / CONTRACT_FILE).is_file():
        parts = adopt(path, dtype=dtype, label=label, trust_remote_code=trust)
        logger.warning("%s", describe(parts.contract, str(path)))
        return parts
    contract = Contract.read(folder)
    if contract.kind != "single":
        raise ContractError(f"{folder}: field kind is {contract.kind!r}: load it with `load_reward_model(path)`.")
    if label is not None:
        raise ContractError(
            f"label={label!r} chooses a logit for a model without contract, but {folder / CONTRACT_FILE} says logit "
            f"{contract.label}. Leave label out, or change the field `label` of the file."
        )
    if contract.layout == "own":
        model = load_classifier(folder, contract, dtype=dtype, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        check_tokenizer(tokenizer, model, contract, folder)
        padded = can_be_padded(model.eval(), tokenizer)
        return ModelParts(model=model, tokenizer=tokenizer, contract=contract, can_be_padded=padded)
    parts = adopt(folder, dtype=dtype, label=contract.label, trust_remote_code=trust)
    for name in ("head", "layout", "tokenizer_sha256"):
        if getattr(contract, name) != getattr(parts.contract, name):
            raise ContractError(
                f"{folder}: field {name} is {getattr(contract, name)!r}, but the files give "
                f"{getattr(parts.contract, name)!r}: they were changed. Restore them, or write the contract again."
            )
    check_length(parts.model, contract, folder)
    return replace(parts, contract=contract)


def adopt(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    label: str | int | None = None,
    trust_remote_code: bool = False,
) -> ModelParts:
    """Load another maker's reward model and infer its contract.

    Its scores are the model's own logits (OpenRLHF's: normalized by `mean` and `std` of the config where it says so).
    Conversations go through the tokenizer's chat template, if it has one; otherwise prompt and response are joined, and
    the end-of-text token is appended for reward models (one label), not for classifiers.

    Args:
        path: A folder or hub name.
        dtype: Dtype of the weights.
        label: Which label's logit is the score, by name or index; needed if there are several.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ContractError: It cannot be loaded, it has no head, `label` is missing or unknown, or it comes with code that
            is not trusted.
    """
    config = _read(AutoConfig.from_pretrained, _adapter_base(path) or path, trust_remote_code)
    layout = _layout(config)
    labels = config.num_labels if layout == "transformers" and _is_classifier(config) else 1
    index = _label_index(config, labels, label, path)
    model, layout = _load_model(path, config, layout, labels, dtype, trust_remote_code)
    tokenizer = _read(AutoTokenizer.from_pretrained, path, trust_remote_code)
    fingerprint = tokenizer_sha256(tokenizer)
    _agree_on_padding(model, tokenizer, layout)
    contract = Contract(
        base=short_name(str(path)),
        head=head_name(model, labels=labels),
        layout=layout,
        label=index,
        text=_text_rule(model, tokenizer, layout, labels),
        tokenizer_sha256=fingerprint,
        normalization=_normalization(config) if layout == "openrlhf" else Normalization(),
    )
    return ModelParts(
        model=model, tokenizer=tokenizer, contract=contract, can_be_padded=can_be_padded(model.eval(), tokenizer)
    )


def describe(contract: Contract, name: str) -> str:
    """One paragraph on an inferred contract: what was inferred, and how to keep or change it."""
    rule, scale = contract.text, contract.normalization
    maker = {"transformers": "a sequence classifier", "openrlhf": "a reward model of OpenRLHF"}[contract.layout]
    scores = f"(logit - {-scale.bias / scale.gain:g}) / {1 / scale.gain:g}" if scale.samples else "the logit itself"
    return (
        f"{name} has no {CONTRACT_FILE}; it is taken for {maker}: head {contract.head}, logit {contract.label}, score "
        f"{scores}; template {rule.template}, end-of-text token {'' if rule.append_eos else 'not '}appended, at most "
        f"{rule.max_length} tokens. Check this against the model's card; `python -m reward_model.adopt` changes it and "
        "writes the file."
    )


def _read(reader: Callable[..., Any], path: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    """What `reader` loads from a folder or hub name, its errors as a sentence."""
    name = str(path)
    if is_missing_folder(name):
        raise ContractError(f"There is no folder {name}. Check the path; hub names have the form owner/name.")
    try:
        with quiet_transformers():
            return reader(path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # of many libraries: a missing file, an unknown architecture, weights of other shapes
        reason = " ".join(str(error).split()) or type(error).__name__
        if not trust_remote_code and "trust_remote_code" in reason:
            raise ContractError(
                f"{name} comes with Python code of its own, which has not run: nothing was loaded. Read it, and set "
                "trust_remote_code=True (--trust_remote_code) if you trust its author with this machine."
            ) from None
        raise ContractError(
            f"{name} could not be loaded: {reason:.400} Expected a folder made by save_pretrained, "
            "or a hub name within reach, of a sequence classifier with its tokenizer."
        ) from error


def _adapter_base(path: str | Path) -> str | None:
    """The base model of a folder that holds a LoRA adapter."""
    if not (Path(path) / ADAPTER_FILE).is_file():
        return None
    base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    return None if base is None else str(base)


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _layout(config: PreTrainedConfig) -> Layout:
    own_fields = hasattr(config, "value_head_prefix") or hasattr(config, "normalize_reward")
    return "openrlhf" if own_fields or "RewardModel" in (config.architectures or []) else "transformers"


def _load_model(
    path: str | Path, config: PreTrainedConfig, layout: Layout, labels: int, dtype: torch.dtype, trust: bool
) -> tuple[Any, Layout]:
    """The classifier, and the layout that its checkpoint shows."""
    if (Path(path) / ADAPTER_FILE).is_file():
        return load_adapter(Path(path), head=None, dtype=dtype, trust_remote_code=trust), layout
    options: dict[str, Any] = {"labels": labels, "dtype": dtype}
    code = getattr(config, "auto_map", None) or {}
    if trust and "AutoModel" in code and "AutoModelForSequenceClassification" not in code:
        options["kind"] = AutoModel  # where some reward models register their class
    model, missing, unknown = _read(read_classifier, path, trust, **options)
    prefix = getattr(config, "value_head_prefix", "value_head")
    own_head = head_name(model, labels=labels).removesuffix(".weight")
    if f"{prefix}.weight" in unknown and prefix != own_head:
        layout = "openrlhf"
        options["key_mapping"] = {rf"^{prefix}\.": f"{own_head}."}
        model, missing, unknown = _read(read_classifier, path, trust, **options)
    if missing:
        raise ContractError(
            f"{path} has no reward head that can be read: its checkpoint lacks or misshapes {sorted(missing)[:4]}, "
            f"which would be random numbers (it has {sorted(unknown)[:4]}, unknown to "
            f"{type(model).__name__}). Give a reward model, or train one from it with `python -m reward_model.train`."
        )
    return model, layout


def _label_index(config: PreTrainedConfig, labels: int, label: str | int | None, path: str | Path) -> int:
    """The logit of `label`, which may be left out if there is one."""
    known: Mapping[Any, Any] = config.id2label or {}
    names = {index: str(known.get(index, index)) for index in range(labels)}
    listed = ", ".join(f"{index} ({name})" for index, name in names.items())
    if label is None:
        if labels == 1:
            return 0
        raise ContractError(
            f"{path} is a classifier of {labels} labels: {listed}. It is unknown which one is the reward. Choose with "
            "label=, by name or index (--label on the command line)."
        )
    for index, name in names.items():
        if label == index or str(label) == str(index) or str(label).lower() == name.lower():
            return index
    raise ContractError(f"{path} has no label {label!r}, only {listed}.")


def _agree_on_padding(model: Any, tokenizer: Any, layout: Layout) -> None:
    """Let tokenizer and model agree on the padding token, without moving the token that the score is read at.

    Classifiers of transformers read it at the last token that is not `config.pad_token_id`; without one, and in
    OpenRLHF, it is the last token.
    """
    config = model.config.get_text_config()
    given = config.pad_token_id
    if layout == "transformers" and given is not None and 0 <= given < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(given)
    elif layout == "transformers" and hasattr(model, "peft_config") and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id  # as trl sets it, which saves no config beside an adapter
    else:
        separate_padding(model, tokenizer)


def _text_rule(model: Any, tokenizer: Any, layout: Layout, labels: int) -> TextRule:
    limits = [max_positions(model) or LONGEST_TEXT, tokenizer.model_max_length, LONGEST_TEXT]
    chat = bool(tokenizer.chat_template)
    appends = layout == "openrlhf" or (labels == 1 and not chat)
    return TextRule(
        template="chat" if chat else "plain",
        append_eos=appends and tokenizer.eos_token_id is not None,
        max_length=int(min(limit for limit in limits if limit >= 2)),
        strip_newlines=layout == "openrlhf",
    )


def _normalization(config: PreTrainedConfig) -> Normalization:
    """OpenRLHF's (reward - mean) / std, which its config says."""
    mean, std = getattr(config, "mean", None), getattr(config, "std", None)
    if not getattr(config, "normalize_reward", False) or mean is None or not std:
        return Normalization()
    return Normalization(gain=1 / float(std), bias=-float(mean) / float(std), reference="config", samples=1)


@torch.inference_mode()
def can_be_padded(model: Any, tokenizer: Any) -> bool:
    """Whether padding on the right leaves the score of a short text alone, but for rounding."""
    rows = [tokenizer(text)["input_ids"] for text in ("A text", "A much longer text than the other one")]
    width = len(rows[1])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    try:
        together = model(input_ids=ids, attention_mask=mask).logits[0].float()
        alone = model(input_ids=ids[:1, : len(rows[0])], attention_mask=mask[:1, : len(rows[0])]).logits[0].float()
    except (ValueError, RuntimeError):
        return False
    tolerance = 5e-2 if is_low_precision(model) else 1e-3
    if torch.allclose(together, alone, atol=0.1 * tolerance, rtol=tolerance):
        return True
    logger.warning("%s: padding changes its scores, so texts are scored one by one.", type(model).__name__)
    return False
