"""Sampler protocol, its configuration and results, and helpers that samplers share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling settings, applied in the order of `transformers`: penalty, minimum length, temperature, top-k, top-p."""

    max_new_tokens: int
    """Maximum response length in tokens, the stop token included."""
    min_new_tokens: int = 0
    """Minimum response length in tokens. Until then, stop tokens have probability 0 and stop strings are ignored."""
    temperature: float = 1.0
    """Divisor of the logits; below 1 the distribution becomes sharper."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this total probability; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already in the prompt or response become less likely (Keskar et al. 2019, §4.1)."""
    stop_token_ids: tuple[int, ...] | None = None
    """A response ends with the first of these tokens. (): none. None in `train()` and `evaluate()`: the end-of-sequence
    tokens of the model's generation config and of the tokenizer. None in a sampler that you call yourself: none."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of these strings; the sampler needs a tokenizer for it."""
    num_return_sequences: int = 1
    """Number of responses per prompt; they are in adjacent rows."""
    do_sample: bool = True
    """False decodes greedily; temperature, top-k and top-p then have no effect."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require(self.max_new_tokens >= 1, "max_new_tokens", ">= 1", self.max_new_tokens)
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens", f"between 0 and max_new_tokens ({self.max_new_tokens})", self.min_new_tokens,
        )  # fmt: skip
        _require(
            self.temperature > 0, "temperature", "> 0 (for the likeliest token set do_sample=False)", self.temperature
        )
        _require(self.top_k >= 0, "top_k", ">= 0 (0 keeps all tokens)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1] (1 keeps all tokens)", self.top_p)
        _require(self.repetition_penalty > 0, "repetition_penalty", "> 0 (1 does nothing)", self.repetition_penalty)
        _require(self.num_return_sequences >= 1, "num_return_sequences", ">= 1", self.num_return_sequences)
        _require(all(t >= 0 for t in self.stops), "stop_token_ids", "token ids >= 0", self.stop_token_ids)
        _require(all(self.stop_strings), "stop_strings", "non-empty strings", self.stop_strings)

    @property
    def stops(self) -> tuple[int, ...]:
        """`stop_token_ids`, none where they were left open."""
        return self.stop_token_ids or ()

    @property
    def warps_distribution(self) -> bool:
        """Whether tokens are sampled from any distribution but softmax(logits)."""
        warps = (self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.min_new_tokens)
        return not self.do_sample or warps != (1.0, 0, 1.0, 1.0, 0)

    @property
    def samples_from_policy(self) -> bool:
        """Whether tokens are sampled from softmax(logits / temperature), without filters, penalty or minimum length."""
        return not replace(self, temperature=1.0).warps_distribution


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(
            f"SamplingConfig.{name} must be {expected}, got {got!r}: no response could be sampled with it. Set it "
            "within these bounds."
        )


@dataclass(frozen=True, kw_only=True)
class SamplingCounts:
    """Deterministic counts of the sampler's work, independent of the machine; 0 where the sampler cannot know."""

    prompt_tokens: int = 0
    """Prompt tokens, each prompt counted once."""
    prefill_tokens: int = 0
    """Prompt positions run through the model, padding included."""
    decode_row_steps: int = 0
    """Rows per decoding step, summed over steps."""
    lm_head_rows: int = 0
    """Positions for which logits over the whole vocabulary were computed."""
    response_tokens: int = 0
    """Tokens sampled and returned."""
    forwards: int = 0
    """Forward passes of the model."""

    def __add__(self, other: "SamplingCounts") -> "SamplingCounts":
        """Add the counts of two calls."""
        return SamplingCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Sampled responses, one per row, in prompt order; n responses to one prompt are adjacent."""

    prompts: list[Int[Tensor, "_"]]
    """Prompt of each response, 1-D token ids."""
    responses: list[Int[Tensor, "_"]]
    """Sampled tokens, 1-D, the stop token included, without padding."""
    logprobs: list[Float[Tensor, "_"]] | None
    """Log-probability of each token under the distribution from which it was sampled, nats, float32. For greedy tokens,
    this is the distribution of the processed logits. None if the sampler does not return log-probabilities."""
    values: list[Float[Tensor, "_"]] | None = None
    """V(s_0) ... V(s_{T-1}) of each response by the model's value head, float32; None if not computed."""
    finished: list[bool]
    """Whether each response ended with a stop token or string. False: it was cut off at `max_new_tokens`."""
    counts: SamplingCounts = field(default_factory=SamplingCounts)


@runtime_checkable
class Sampler(Protocol):
    """Callable that samples responses to prompts from a model."""

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Sample `config.num_return_sequences` responses to each prompt.

        Args:
            model: a causal language model of `transformers`, bare or wrapped (value head, PEFT, DDP).
            prompts: token ids, one-dimensional and not empty.
            config: sampling settings.
            generator: random generator; the same state gives the same responses. None: torch's global one.
        """
        ...


@runtime_checkable
class WeightSyncedSampler(Protocol):
    """Sampler with its own copy of the policy's weights, such as an inference engine."""

    def sync_weights(self, model: nn.Module, accelerator: Any) -> None:
        """Copy the current weights of `model` into the sampler. Collective.

        Args:
            model: the policy, bare or wrapped; its parameters may be sharded.
            accelerator: the trainer's `accelerate.Accelerator`.
        """
        ...


class PromptError(ValueError):
    """A prompt is empty or is not a vector of token ids."""


def check_prompts(prompts: Sequence[Tensor]) -> None:
    """Raise `PromptError` naming the first prompt that is not a non-empty vector of token ids."""
    for index, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.numel() == 0 or prompt.is_floating_point():
            raise PromptError(
                f"prompts[{index}] must be a non-empty one-dimensional tensor of token ids, got shape "
                f"{tuple(prompt.shape)} and {prompt.dtype}: the model needs at least one token to continue from. "
                "Begin an empty prompt with the tokenizer's bos token."
            )


def pad_prompts(
    prompts: Sequence[Tensor], device: torch.device, *, side: str
) -> tuple[Int[Tensor, "prompts width"], Int[Tensor, "prompts width"]]:
    """Pad prompts to token ids and attention mask. Padding repeats a token of its row, for the repetition penalty."""
    on_device = [prompt.to(device) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(on_device, batch_first=True, padding_value=-1, padding_side=side).long()
    mask = ids >= 0
    return torch.where(mask, ids, ids.amax(dim=1, keepdim=True)), mask.long()


def unwrap_causal_lm(model: nn.Module) -> Any:
    """Remove DDP and value-head wrappers from a causal LM; a PEFT model keeps its adapters."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
            continue
        inner = getattr(model, "pretrained_model", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a seed from `generator` (None: torch's global one), for libraries that take only a seed."""
    return int(torch.randint(2**62, (), generator=generator, device="cpu" if generator is None else generator.device))
