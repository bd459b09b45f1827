"""The contract of a reward model, `reward_model.json`: text rule, normalization and fingerprint of the tokenizer.

It is saved beside the weights. Loading refuses what does not match, because a reward model with another template,
tokenizer or end-of-text rule returns plausible numbers that mean nothing.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

CONTRACT_FILE = "reward_model.json"
FORMAT_VERSION = 1

Template = Literal["plain", "chat"]
Layout = Literal["own", "transformers", "openrlhf"]

_PROBES = (
    "Hello world! It's 2024, isn't it?",
    "  two  spaces\nand a\ttab\n\n",
    "naïve café 東京 🙂 <|endoftext|> </s> [SEP]",
)


class ContractError(ValueError):
    """A reward model that must not be used; the message names the field, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class TextRule:
    """How prompt and response become the token ids to score; the same rule in training and serving."""

    template: Template = "plain"
    """`plain`: prompt + response. `chat`: the tokenizer's chat template, with the response as assistant."""
    append_eos: bool = True
    """Whether the end-of-text token is appended to every text that does not end with it."""
    max_length: int = 1024
    """Maximum tokens of prompt + response. Training drops and counts longer texts, serving cuts their start."""
    strip_newlines: bool = False
    """Whether newlines at the end are cut before the end-of-text token is appended, as OpenRLHF does."""

    def __post_init__(self) -> None:
        if self.template not in ("plain", "chat"):
            raise ContractError(f"text.template must be 'plain' or 'chat', got {self.template!r}.")
        for name in ("append_eos", "strip_newlines"):
            if not isinstance(getattr(self, name), bool):
                raise ContractError(f"text.{name} must be true or false, got {getattr(self, name)!r:.40}.")
        if not isinstance(self.max_length, int) or self.max_length < 2:
            raise ContractError(f"text.max_length must be an integer >= 2, got {self.max_length!r}.")


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """Normalization score = gain · raw + bias, such that reference texts have mean 0 and standard deviation 1."""

    gain: float = 1.0
    bias: float = 0.0
    reference: str = "none"
    """Origin of the reference texts: `none`, `evaluation` (held-out completions), `config` (mean and std of another
    maker's model) or the name of a reference policy."""
    samples: int = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.gain) and _is_number(self.bias)):
            raise ContractError(
                f"normalization.gain and .bias must be finite numbers, got {self.gain!r:.40} and {self.bias!r:.40}: "
                "scores would mean nothing. Restore the file or train the model again."
            )
        if not self.gain > 0:
            raise ContractError(
                f"normalization.gain must be > 0, got {self.gain!r}: it would turn the order of all scores around."
            )

    def apply(self, raw: float) -> float:
        """Normalize a raw score."""
        return self.gain * raw + self.bias


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The content of `reward_model.json`."""

    kind: Literal["single", "ensemble"] = "single"
    format_version: int = FORMAT_VERSION
    base: str = ""
    """The model that training started from: a hub name or the last part of a folder's path."""
    head: str = ""
    """Parameter name of the head; a checkpoint without it is refused."""
    layout: Layout = "own"
    """Whose files they are: trained by this package, of `AutoModelForSequenceClassification`, or OpenRLHF's."""
    label: int = 0
    """Index of the logit that is the score; above 0 only for classifiers with several labels."""
    text: TextRule = field(default_factory=TextRule)
    tokenizer_sha256: str = ""
    normalization: Normalization = field(default_factory=Normalization)
    members: tuple[str, ...] = ()
    """Sub-folders of an ensemble's members."""
    data: dict[str, Any] = field(default_factory=dict)
    """Fingerprint and counts of the training data."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at the end of training."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions at training time."""

    def write(self, folder: Path) -> None:
        """Write the contract file into `folder`, atomically."""
        target = folder / CONTRACT_FILE
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def read(cls, folder: Path) -> "Contract":
        """Read and check the contract file of `folder`.

        Raises:
            ContractError: The file is missing, is no JSON, lacks or misspells a field, or is of another version.
        """
        path = folder / CONTRACT_FILE
        if not path.is_file():
            raise ContractError(
                f"{path} does not exist: {folder} is not a reward model made by this package, so its template, "
                "end-of-text rule and normalization are unknown. Train one with `python -m reward_model.train`, or "
                "write the contract of another maker's model with `python -m reward_model.adopt`."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ContractError(f"{path} is not valid JSON ({error}). Restore it or train the model again.") from error
        return cls.parse(values, path)

    @classmethod
    def parse(cls, values: Any, path: Path) -> "Contract":
        """Check decoded JSON and build the contract from it; `path` is for messages."""
        if not isinstance(values, dict):
            raise ContractError(f"{path} must hold a JSON object, got {type(values).__name__}.")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ContractError(
                f"{path}: field format_version is {version!r}, this version of the package reads {FORMAT_VERSION}. "
                "Use the version named in its field `versions`, or train the model again."
            )
        if "normalisation" in values:  # as versions before 0.2 spelled it
            values = {**values, "normalization": values["normalisation"]}
            del values["normalisation"]
        values = {"layout": "own", "label": 0} | values  # which earlier versions did not have
        known = {item.name for item in fields(cls)}
        differing = sorted(set(values) ^ known)
        if differing:
            raise ContractError(f"{path}: missing or unknown fields {differing}; expected exactly {sorted(known)}.")
        for name, kind in _KINDS.items():
            if not isinstance(values[name], kind):
                raise ContractError(
                    f"{path}: field {name} must be {kind.__name__}, got {type(values[name]).__name__}: the file was "
                    "changed. Restore it or train the model again."
                )
        try:
            parts = {"text": TextRule(**values["text"]), "normalization": Normalization(**values["normalization"])}
        except TypeError as error:
            raise ContractError(f"{path}: field text or normalization is malformed: {error}.") from error
        return cls(**(values | parts | {"members": tuple(values["members"])}))


_KINDS: dict[str, type] = {
    "base": str, "head": str, "layout": str, "label": int, "text": dict, "tokenizer_sha256": str, "normalization": dict,
    "members": list, "data": dict, "metrics": dict, "versions": dict,
}  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, special tokens, chat template and ids of probe texts."""
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        "chat_template": tokenizer.chat_template,
        "probes": [tokenizer(probe)["input_ids"] for probe in _PROBES],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
