"""Sampler over the continuous batching of `transformers`: paged KV cache, new rows replace finished ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.samplers.base import (
    Samples,
    SamplingConfig,
    SamplingCounts,
    check_prompts,
    draw_seed,
    unwrap_causal_lm,
)
from rlhf_ppo.samplers.kv_cache import bytes_per_token, default_budget
from rlhf_ppo.utils.installed import accepts_argument, parameter_name

NO_STOP_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class ContinuousBatching:
    """Sampler over `model.generate_batch`; returns the log-probabilities of the sampled tokens.

    It samples from the live module, so no weights are copied. A background thread schedules rows, and which rows share
    a step depends on timing: the same generator state need not give the same responses.
    """

    max_rows: int = 512
    """Maximum number of rows decoded at once; before transformers 5.12 it bounds only the size of the cache."""
    page_size: int = 64
    """Tokens per page of the KV cache."""
    max_batch_tokens: int = 1024
    """Maximum number of tokens per forward pass; a longer prompt is prefilled in chunks."""
    kv_budget_bytes: int | None = None
    """Maximum size of the KV cache in bytes; one row is decoded even if it needs more. None: half of a GPU's free
    memory, 4 GiB on a CPU."""

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Sample responses; see `Sampler`.

        Raises:
            ValueError: An invalid prompt, an unsupported sampling setting, or a model without `generate_batch`.
            RuntimeError: A request failed; the log of `transformers` has the reason.
        """
        check_prompts(prompts)
        check_supported(config)
        # Repeated here: with `num_return_sequences`, transformers 5.10 loses responses.
        prompts = [prompt for prompt in prompts for _ in range(config.num_return_sequences)]
        causal_lm = unwrap_causal_lm(model)
        if not hasattr(causal_lm, "generate_batch") or causal_lm.config.is_encoder_decoder:
            raise ValueError(
                f"ContinuousBatching needs a causal model with `generate_batch`, got {type(causal_lm).__name__}: it "
                "has no paged KV cache. Use DecodeLoop() or TransformersGenerate()."
            )
        seed = draw_seed(generator) % 2**32  # outside of the block, which puts the global random state back
        devices = [causal_lm.device] if causal_lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices), EvalMode(causal_lm):
            outputs = causal_lm.generate_batch(
                [prompt.tolist() for prompt in prompts],
                generation_config=_generation_config(config),
                continuous_batching_config=self._cache_config(causal_lm, prompts, config, seed),
                progress_bar=False,
                warmup=causal_lm.device.type == "cuda",
            )
        return _samples(list(outputs.values()), prompts, config, causal_lm.device)

    def _cache_config(
        self, model: Any, prompts: Sequence[Tensor], config: SamplingConfig, seed: int
    ) -> ContinuousBatchingConfig:
        """Size the KV cache for this call: what its rows need, within the budget."""
        longest = max((len(prompt) for prompt in prompts), default=1)
        pages_per_row = math.ceil((longest + config.max_new_tokens) / self.page_size) + 1
        rows = min(self.max_rows, len(prompts))
        budget = self.kv_budget_bytes or default_budget(model.device)
        affordable_pages = budget // (self.page_size * bytes_per_token(model.config, model.dtype))
        page_size = parameter_name(ContinuousBatchingConfig, "page_size", "block_size")  # new name: transformers 5.18
        versioned: dict[str, Any] = {page_size: self.page_size}
        if accepts_argument(ContinuousBatchingConfig, "max_requests_per_batch"):
            versioned["max_requests_per_batch"] = rows
        return ContinuousBatchingConfig(
            num_blocks=max(pages_per_row, min(rows * pages_per_row, affordable_pages)),
            max_batch_tokens=self.max_batch_tokens,
            return_logprobs=True,
            seed=seed,
            **versioned,
        )


def check_supported(config: SamplingConfig) -> None:
    """Reject sampling settings that continuous batching would ignore with only a log message.

    Raises:
        ValueError: Names the setting.
    """
    unsupported = {
        "repetition_penalty": config.repetition_penalty != 1.0,
        "min_new_tokens": config.min_new_tokens > 0,
        "stop_strings": bool(config.stop_strings),
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ValueError(
                f"ContinuousBatching does not support SamplingConfig.{name}, got {getattr(config, name)!r}: responses "
                f"would be sampled without it. Leave {name} at its default, or use DecodeLoop()."
            )


def _generation_config(config: SamplingConfig) -> GenerationConfig:
    warpers = {"temperature": float(config.temperature), "top_k": config.top_k, "top_p": float(config.top_p)}
    stop_tokens = list(config.stops) or [NO_STOP_TOKEN]
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens, do_sample=config.do_sample, eos_token_id=stop_tokens,
        pad_token_id=max(stop_tokens[0], 0),
        **(warpers if config.do_sample else {}),
    )  # fmt: skip


def _samples(outputs: list[Any], prompts: Sequence[Tensor], config: SamplingConfig, device: torch.device) -> Samples:
    expected = len(prompts)
    errors = sorted({str(output.error) for output in outputs if output.error is not None})
    if len(outputs) != expected or errors:
        raise RuntimeError(
            f"continuous batching finished {len(outputs) - len(errors)} of {expected} requests"
            + (f" ({'; '.join(errors)})" if errors else "")
            + ": the others are lost. Its log says why; lower max_rows or raise kv_budget_bytes if memory ran out."
        )
    stop_tokens = set(config.stops)
    return Samples(
        prompts=list(prompts),
        responses=[torch.tensor(output.generated_tokens, device=device) for output in outputs],
        logprobs=[torch.tensor(output.logprobs, dtype=torch.float32, device=device) for output in outputs],
        finished=[output.generated_tokens[-1] in stop_tokens for output in outputs],
        counts=SamplingCounts(
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            response_tokens=sum(len(output.generated_tokens) for output in outputs),
        ),
    )
