"""The LM head of any architecture: its linear layer, and the scale or soft cap between it and the logits."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

Head: TypeAlias = Callable[[Tensor], Tensor]

SCALE_WORDS = ("scal", "multiplier", "logit", "temperature")
"""Parts of the names of settings that may multiply or divide the logits."""


@dataclass(frozen=True)
class LogitTransform:
    """From the LM head's output to logits: softcap · tanh(scale · output / softcap); without a cap scale · output."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, output: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape vocab"]:
        if self.scale != 1.0:
            output = output * self.scale
        return output if self.softcap is None else torch.tanh(output / self.softcap) * self.softcap


@dataclass(frozen=True)
class OldPolicyStates:
    """LM head and hidden states of an old policy: enough for its token distributions at some responses."""

    head: Head
    states: Float[Tensor, "batch time hidden"]
    """Hidden states at each response token, padded with zeros."""


def lm_head(language_model: Any, transform: LogitTransform, *, copied: bool = False) -> Head:
    """Hidden states -> logits; the plain module where nothing stands between it and the logits.

    Args:
        transform: Applied to their output.
        copied: Use a frozen copy of the output embeddings.
    """
    head: nn.Module = language_model.get_output_embeddings()
    if copied:
        head = copy.deepcopy(head).requires_grad_(False)
    if transform == LogitTransform():
        return head
    return lambda hidden: transform(head(hidden))


def find_transform(
    config: Any, output: Float[Tensor, "rows vocab"], logits: Float[Tensor, "rows vocab"], *, tolerance: float
) -> LogitTransform | None:
    """The transform by settings of `config` that turns the head's `output` into the model's `logits`; None: no such.

    Args:
        config: Of the language model: `logits_scaling` of Granite, `logit_scale` of Cohere, `final_logit_softcapping`
            of Gemma and their like are tried, whatever their exact name.
        output: The output embeddings' output at some positions.
        logits: The model's own at the same positions.
        tolerance: How far they may differ, relative to the largest logit.
    """
    for transform in candidate_transforms(config):
        if relative_gap(transform(output), logits) <= tolerance:
            return transform
    return None


def candidate_transforms(config: Any) -> Iterator[LogitTransform]:
    """The transforms that settings of `config` could mean, likely ones first."""
    named = _numbers(config)
    caps = [value for name, value in named.items() if "cap" in name and "logit" in name and "attn" not in name]
    numbers = [value for name, value in named.items() if any(word in name for word in SCALE_WORDS) and value != 1]
    scales = [1.0, *(factor for value in numbers for factor in (value, 1 / value))]
    for cap in (*caps, None):  # a cap that is set is a cap that is used, though small logits do not show it
        for scale in scales:
            yield LogitTransform(scale=scale, softcap=cap)


def assumed_transform(config: Any) -> LogitTransform:
    """The transform of a model whose weights have no content, by the usual name of a soft cap."""
    return LogitTransform(softcap=getattr(config.get_text_config(), "final_logit_softcapping", None))


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry; infinite where shapes or infinite entries differ."""
    if found.shape != expected.shape:
        return math.inf
    if not found.numel():
        return 0.0
    found, expected = found.detach().float(), expected.detach().float()
    gap, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if math.isfinite(gap):  # then all entries are
        return gap / largest if largest > 0 else gap
    finite = expected.isfinite()
    if not bool((finite == found.isfinite()).all()):
        return math.inf
    return relative_gap(found[finite], expected[finite])


def _numbers(config: Any) -> dict[str, float]:
    """Positive numbers among the settings of the language model and its parts, by name."""
    found: dict[str, float] = {}
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in vars(part).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
                found[name] = float(value)
    return found
