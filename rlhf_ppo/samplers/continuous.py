"""Sampler over the continuous batching of `transformers`: a paged cache, and new rows in the place of finished ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from rlhf_ppo.samplers.base import (
    EvalMode,
    Samples,
    SamplingConfig,
    SamplingCounts,
    check_prompts,
    draw_seed,
    unwrap_causal_lm,
)
from rlhf_ppo.samplers.kv_cache import bytes_per_token

NO_STOP_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class ContinuousBatching:
    """Sampler over `model.generate_batch`, with the log-probabilities of the drawn tokens.

    It draws from the live module, so there are no weights to send. Rows are scheduled by a thread of its own: which
    rows share a draw depends on timing, and the same generator state need not give the same responses.
    """

    max_rows: int = 512
    """Rows in flight at once, at most."""
    page_size: int = 64
    """Tokens of one page of the cache."""
    max_batch_tokens: int = 1024
    """Tokens of one forward pass, at most; a longer prompt is read in pieces."""
    kv_budget_bytes: int = 4 * 2**30
    """Bytes of the paged cache, at most; one row is decoded even when it takes more."""

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw responses; see `Sampler`.

        Raises:
            ValueError: An unusable prompt, a rule that continuous batching drops silently, or a model without it.
            RuntimeError: A response that was not finished; `transformers` has logged why.
        """
        check_prompts(prompts)
        check_rules(config)
        inner = unwrap_causal_lm(model)
        if not hasattr(inner, "generate_batch") or inner.config.is_encoder_decoder:
            raise ValueError(
                f"ContinuousBatching needs a causal model with `generate_batch`, got {type(inner).__name__}: there is "
                "no paged cache for it. Use DecodeLoop() or TransformersGenerate()."
            )
        devices = [inner.device] if inner.device.type == "cuda" else []
        with torch.random.fork_rng(devices), EvalMode(inner):
            outputs = inner.generate_batch(
                [prompt.tolist() for prompt in prompts],
                generation_config=_rules(config),
                continuous_batching_config=self._sizes(inner, prompts, config, draw_seed(generator) % 2**32),
                progress_bar=False,
                warmup=inner.device.type == "cuda",
            )
        return _samples(list(outputs.values()), prompts, config, inner.device)

    def _sizes(
        self, model: Any, prompts: Sequence[Tensor], config: SamplingConfig, seed: int
    ) -> ContinuousBatchingConfig:
        """A cache for this call alone: what the rows need, within the budget."""
        longest = max((len(prompt) for prompt in prompts), default=1)
        pages_a_row = math.ceil((longest + config.max_new_tokens) / self.page_size) + 1
        rows = min(self.max_rows, len(prompts) * config.num_return_sequences)
        affordable = self.kv_budget_bytes // (self.page_size * bytes_per_token(model.config, model.dtype))
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=max(pages_a_row, min(rows * pages_a_row, affordable)),
            max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=rows,
            return_logprobs=True,
            seed=seed,
        )


def check_rules(config: SamplingConfig) -> None:
    """Refuse what continuous batching would leave out with no more than a line in a log.

    Raises:
        ValueError: Naming the rule.
    """
    rules = {
        "repetition_penalty": config.repetition_penalty != 1.0,
        "min_new_tokens": config.min_new_tokens > 0,
        "stop_strings": bool(config.stop_strings),
    }
    for name, is_set in rules.items():
        if is_set:
            raise ValueError(
                f"ContinuousBatching does not know SamplingConfig.{name}, got {getattr(config, name)!r}: responses "
                f"would be drawn without it. Leave {name} at its default, or use DecodeLoop()."
            )


def _rules(config: SamplingConfig) -> GenerationConfig:
    warpers = {"temperature": float(config.temperature), "top_k": config.top_k, "top_p": float(config.top_p)}
    stops = list(config.stop_token_ids) or [NO_STOP_TOKEN]
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens, do_sample=config.do_sample, eos_token_id=stops,
        pad_token_id=max(stops[0], 0), num_return_sequences=config.num_return_sequences,
        **(warpers if config.do_sample else {}),
    )  # fmt: skip


def _samples(outputs: list[Any], prompts: Sequence[Tensor], config: SamplingConfig, device: torch.device) -> Samples:
    expected = len(prompts) * config.num_return_sequences
    errors = sorted({str(output.error) for output in outputs if output.error is not None})
    if len(outputs) != expected or errors:
        raise RuntimeError(
            f"continuous batching answered {len(outputs) - len(errors)} of {expected} requests"
            + (f" ({'; '.join(errors)})" if errors else "")
            + ": the others are lost. Its log says why; lower max_rows or raise kv_budget_bytes if memory ran out."
        )
    stops = set(config.stop_token_ids)
    return Samples(
        prompts=[prompt for prompt in prompts for _ in range(config.num_return_sequences)],
        responses=[torch.tensor(output.generated_tokens, device=device) for output in outputs],
        logprobs=[torch.tensor(output.logprobs, dtype=torch.float32, device=device) for output in outputs],
        finished=[output.generated_tokens[-1] in stops for output in outputs],
        work=SamplingCounts(
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            response_tokens=sum(len(output.generated_tokens) for output in outputs),
        ),
    )
