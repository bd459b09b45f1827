"""What a sampler is: prompts in, responses and their log-probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn. Rules act in the order of `transformers`: penalty, minimum, temperature, k, p."""

    max_new_tokens: int
    """Longest response, in tokens, the stop token included."""
    min_new_tokens: int = 0
    """Before this many tokens no stop token can be drawn, and no stop string ends a response."""
    temperature: float = 1.0
    """Logits are divided by it; below 1 the likely tokens become likelier."""
    top_k: int = 0
    """Only the k likeliest tokens can be drawn; 0 keeps all."""
    top_p: float = 1.0
    """Only the smallest set of tokens with at least this much probability can be drawn; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that stand in the prompt or the response so far become less likely (Keskar et al. 2019, §4.1)."""
    stop_token_ids: tuple[int, ...] = ()
    """A response ends with the first of these; none given, every response runs to `max_new_tokens`."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of these strings; the sampler needs a tokenizer for it."""
    num_return_sequences: int = 1
    """Responses per prompt; they come side by side."""
    do_sample: bool = True
    """False takes the likeliest token; temperature, top-k and top-p are then without effect."""

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
        _require(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", "token ids >= 0", self.stop_token_ids)
        _require(all(self.stop_strings), "stop_strings", "non-empty strings", self.stop_strings)

    @property
    def warps_distribution(self) -> bool:
        """Whether tokens are drawn from anything but the model's own distribution."""
        warps = (self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.min_new_tokens)
        return not self.do_sample or warps != (1.0, 0, 1.0, 1.0, 0)

    @property
    def draws_from_policy(self) -> bool:
        """Whether every token is drawn from softmax(logits / temperature), with nothing forbidden or made likelier."""
        return not replace(self, temperature=1.0).warps_distribution


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(
            f"SamplingConfig.{name} must be {expected}, got {got!r}: no response could be drawn as asked. Set it "
            "within these bounds."
        )


@dataclass(frozen=True, kw_only=True)
class SamplingCounts:
    """What the sampler computed, in counts that do not depend on the machine. Zero where the sampler cannot know."""

    prompt_tokens: int = 0
    """Prompt tokens, each prompt once."""
    prefill_tokens: int = 0
    """Prompt positions run through the model, padding included."""
    decode_row_steps: int = 0
    """Rows run through the model one token at a time, summed over steps."""
    lm_head_rows: int = 0
    """Positions for which logits over the whole vocabulary were computed."""
    response_tokens: int = 0
    """Tokens drawn and returned."""
    forwards: int = 0
    """Calls of the model."""

    def __add__(self, other: "SamplingCounts") -> "SamplingCounts":
        """Work of both."""
        return SamplingCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Responses in the order of the prompts; with n responses per prompt, the n stand side by side."""

    prompts: list[Int[Tensor, "_"]]
    """One per response."""
    responses: list[Int[Tensor, "_"]]
    """Drawn tokens, the stop token included, no padding."""
    logprobs: list[Float[Tensor, "_"]] | None
    """Log-probability, in nats and float32, of each drawn token under the distribution it was drawn from (greedy: under
    the processed logits). None where the sampler does not know it."""
    values: list[Float[Tensor, "_"]] | None = None
    """V(s_0) ... V(s_{T-1}) of each response by the model's value head, float32, where the sampler read it too."""
    finished: list[bool]
    """True: stopped by a stop token or string. False: cut at `max_new_tokens`."""
    work: SamplingCounts = field(default_factory=SamplingCounts)
    """Deterministic counts of what was computed."""


@runtime_checkable
class Sampler(Protocol):
    """Draws responses to prompts from a model."""

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw `config.num_return_sequences` responses to each prompt.

        Args:
            model: a causal language model of `transformers`, bare or wrapped (value head, PEFT, DDP).
            prompts: token ids, one-dimensional and not empty.
            config: how to draw.
            generator: source of randomness; the same state gives the same responses. None: torch's global one.
        """
        ...


@runtime_checkable
class WeightSyncedSampler(Protocol):
    """A sampler that draws from a copy of the policy's weights: an engine of its own."""

    def follow(self, model: nn.Module, accelerator: Any) -> None:
        """Make the copy equal to `model` as it is now. All processes call it together.

        Args:
            model: the policy, bare or wrapped; its parameters may be sharded.
            accelerator: the trainer's `accelerate.Accelerator`.
        """
        ...


class PromptError(ValueError):
    """A prompt that no response can be drawn to."""


def check_prompts(prompts: Sequence[Tensor]) -> None:
    """Raise `PromptError` naming the first prompt that is not a non-empty vector of token ids."""
    for index, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.numel() == 0 or prompt.is_floating_point():
            raise PromptError(
                f"prompts[{index}] must be a non-empty one-dimensional tensor of token ids, got shape "
                f"{tuple(prompt.shape)} and {prompt.dtype}: a response is drawn given at least one token. "
                "Begin an empty prompt with the tokenizer's bos token."
            )


def pad_prompts(
    prompts: Sequence[Tensor], device: torch.device, *, side: str
) -> tuple[Int[Tensor, "prompts width"], Int[Tensor, "prompts width"]]:
    """Token ids and attention mask. Padding repeats the row's own tokens: no repetition penalty sees a new one."""
    on_device = [prompt.to(device) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(on_device, batch_first=True, padding_value=-1, padding_side=side).long()
    mask = ids >= 0
    return torch.where(mask, ids, ids.amax(dim=1, keepdim=True)), mask.long()


def unwrap_causal_lm(model: nn.Module) -> Any:
    """The causal LM inside DDP and value-head wrappers; a PEFT model stays as it is, its adapters act."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
            continue
        inner = getattr(model, "pretrained_model", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed drawn from `generator` (None: from torch's global one), for libraries that know only global seeds."""
    return int(torch.randint(2**62, (), generator=generator, device="cpu" if generator is None else generator.device))


class EvalMode:
    """Every module in eval mode for a while (dropout would draw from another policy); modes restored exactly."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training: list[nn.Module] = []

    def __enter__(self) -> None:
        self._training = [module for module in self._model.modules() if module.training]
        for module in self._training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True
