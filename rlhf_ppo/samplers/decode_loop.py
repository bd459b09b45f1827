"""Token-by-token sampling loop over a `transformers` causal LM and its KV cache."""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.kernels.linear_layers import fast_layers
from rlhf_ppo.kernels.packed_weights import packed_weights
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.samplers.base import (
    Sampler,
    Samples,
    SamplingConfig,
    check_prompts,
    unwrap_causal_lm,
)
from rlhf_ppo.samplers.batch_decoder import BatchDecoder
from rlhf_ppo.samplers.decode_proof import decode_mismatch, values_are_right
from rlhf_ppo.samplers.decode_results import DecodedTokens
from rlhf_ppo.samplers.decode_support import check_ids, check_positions, unsupported_reason
from rlhf_ppo.samplers.kv_cache import default_budget, row_batches
from rlhf_ppo.samplers.logits_processing import DecodingRules
from rlhf_ppo.samplers.static_step import static_unsupported_reason, weights_in_autocast_dtype
from rlhf_ppo.samplers.transformers_generate import TransformersGenerate

logger = logging.getLogger(__name__)


@dataclass
class DecodeLoop:
    """Sampler that decodes token by token and drops finished rows from the batch.

    Differences from `model.generate`: tokens are sampled by inverting the cumulative distribution, finished rows leave
    the batch, responses to one prompt share its prefill, prompts of similar length share a batch, and log-probabilities
    are returned. The same generator state gives the same uniforms for any split into batches. Unsupported models
    (encoder-decoder, recurrent state, prompt tuning) go to `fallback`, with one warning.

    Sharded parameters must be gathered first: processes run different numbers of steps.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    """Needed for `stop_strings` only."""
    _: KW_ONLY
    max_rows: int = 512
    """Maximum number of rows decoded at once; bounds logits (rows x vocabulary) and cache, not the result."""
    kv_budget_bytes: int | None = None
    """Maximum size of the KV cache in bytes; one row is decoded even if it needs more. None: half of a GPU's free
    memory, 4 GiB on a CPU."""
    stop_check_interval: int | None = None
    """Steps between two looks of the host at which rows have finished. None: 1 on a CPU; 16 on a GPU, where it has to
    wait for each look. Finished rows are decoded on until the next one; results are the same."""
    static_step: bool | None = None
    """Whether a step runs over tensors that stay where they are; a GPU then replays it as a CUDA graph. None: on a GPU,
    for models that it is right for."""
    compact: bool = True
    """Whether finished rows leave the batch; False only for comparison."""
    fast_products: bool = True
    """Whether matrix products on a CPU use oneDNN where that is faster; after some steps with packed weights, which
    take the memory of another copy of the linear layers' weights until the call ends."""
    fallback: Sampler | None = None
    """Sampler for models that the loop does not support; None: `TransformersGenerate`."""
    on_progress: Callable[[int, int], None] | None = None
    """Called with (finished responses, all responses) after each batch."""
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_rows", "kv_budget_bytes", "stop_check_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"DecodeLoop.{name} must be >= 1, got {value}: no row could be decoded. Set it to 1 or more."
                )

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
        limits: Sequence[int] | None = None,
    ) -> Samples:
        """Sample responses; see `Sampler`.

        Args:
            model: see `Sampler`.
            prompts: see `Sampler`.
            config: see `Sampler`.
            generator: see `Sampler`.
            limits: maximum number of new tokens for each prompt, at most `config.max_new_tokens`.

        Raises:
            ValueError: an invalid prompt, more positions than the model has, or logits that are not finite.
        """
        check_prompts(prompts)
        causal_lm = unwrap_causal_lm(model)
        reason = self.unsupported_reason(causal_lm)
        if reason is not None and limits is None:
            return self._fall_back(reason)(model, prompts, config, generator=generator)
        if reason is not None:
            raise ValueError(
                f"Limits per prompt need a model that DecodeLoop supports, but {reason}. Pass limits=None."
            )
        loop = replace(self, static_step=self._uses_static_step(causal_lm))
        right = values_are_right(causal_lm, static=bool(loop.static_step))
        value_head = None  # a separate critic has states of its own: the head's values are not its values
        if right and isinstance(model, PreTrainedModelWrapper) and model.critic is None:
            value_head = model.v_head
        check_positions(causal_lm, max(map(len, prompts), default=0) + config.max_new_tokens)
        check_ids(causal_lm, prompts)
        with EvalMode(model):
            return loop._decode(causal_lm, prompts, config, value_head, generator=generator, limits=limits)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Why the loop does not support `model`, as a sentence; None if it does, proved once on a small batch."""
        causal_lm = unwrap_causal_lm(model)
        plain = replace(self, on_progress=None, static_step=False)
        return unsupported_reason(causal_lm) or decode_mismatch(causal_lm, plain._decode)

    def _uses_static_step(self, model: Any) -> bool:
        """Whether a step over tensors that stay where they are is wanted, and right for this model: proved once."""
        if not (model.device.type == "cuda" if self.static_step is None else self.static_step):
            return False
        static = replace(self, on_progress=None, static_step=True)
        reason = static_unsupported_reason(model) or decode_mismatch(model, static._decode, static=True)
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("decoding without CUDA graphs: %s", reason)
        return reason is None

    @torch.no_grad()
    def _decode(
        self,
        model: Any,
        prompts: Sequence[Tensor],
        config: SamplingConfig,
        value_head: Callable[[Tensor], Tensor] | None,
        *,
        generator: torch.Generator | None = None,
        limits: Sequence[int] | None = None,
    ) -> Samples:
        lengths = [len(prompt) for prompt in prompts]
        rules = DecodingRules.build(config, self.tokenizer, model.device)
        results = DecodedTokens.empty(len(prompts), config, generator, model.device, limits)
        finished = 0
        fast = fast_layers(model) if self.fast_products else nullcontext()
        static = bool(self.static_step)
        weights = weights_in_autocast_dtype(model, model.device) if static else nullcontext()
        with fast, weights, packed_weights(model) as packed:
            budget = self.kv_budget_bytes or default_budget(model.device)
            for batch in row_batches(lengths, config, model, max_rows=self.max_rows, budget=budget):
                decode = BatchDecoder(
                    model, config, rules, results, compact=self.compact, value_head=value_head,
                    interval=self.stop_check_interval or (16 if model.device.type == "cuda" else 1),
                    packed=packed if self.fast_products else None, static=static,
                )  # fmt: skip
                decode.run([prompts[row // config.num_return_sequences] for row in batch], batch)
                finished += len(batch)
                if self.on_progress is not None:
                    self.on_progress(finished, len(results.lengths))
        return results.samples(prompts, config)

    def _fall_back(self, reason: str) -> Sampler:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"DecodeLoop does not fit this model: {reason}. Falling back to "
                f"{'TransformersGenerate' if self.fallback is None else self.fallback!r}: slower, and "
                "without log-probabilities of the sampled tokens.",
                stacklevel=3,
            )
        return TransformersGenerate(tokenizer=self.tokenizer) if self.fallback is None else self.fallback
