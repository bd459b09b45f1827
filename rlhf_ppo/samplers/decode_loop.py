"""Token-by-token sampling loop over a `transformers` causal LM and its KV cache."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList

from rlhf_ppo.kernels.linear_layers import fast_layers
from rlhf_ppo.kernels.mask_reads import masks_unread
from rlhf_ppo.kernels.packed_weights import PackedWeights, packed_weights
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.samplers.base import (
    EvalMode,
    Sampler,
    Samples,
    SamplingConfig,
    SamplingCounts,
    check_prompts,
    pad_prompts,
    unwrap_causal_lm,
)
from rlhf_ppo.samplers.decode_proof import differing_reason, values_are_right
from rlhf_ppo.samplers.decode_results import DecodedTokens
from rlhf_ppo.samplers.decode_support import (
    check_ids,
    check_positions,
    contiguous_head_inputs,
    supports_logits_to_keep,
    unsupported_reason,
)
from rlhf_ppo.samplers.kv_cache import (
    default_budget,
    drop_rows,
    new_cache,
    row_batches,
    select_rows,
)
from rlhf_ppo.samplers.logits_processing import DecodingRules
from rlhf_ppo.samplers.token_sampling import greedy_tokens, sample_tokens
from rlhf_ppo.samplers.transformers_generate import TransformersGenerate

PACK_AFTER = 8
"""Steps after which weights are packed, because all responses may be short."""


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
        value_head = model.v_head if isinstance(model, PreTrainedModelWrapper) and values_are_right(causal_lm) else None
        check_positions(causal_lm.config, max(map(len, prompts), default=0) + config.max_new_tokens)
        check_ids(causal_lm, prompts)
        with EvalMode(model):
            return self._decode(causal_lm, prompts, config, value_head, generator=generator, limits=limits)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Why the loop does not support `model`, as a sentence; None if it does, proved once on a small batch."""
        causal_lm = unwrap_causal_lm(model)
        return unsupported_reason(causal_lm) or differing_reason(causal_lm, replace(self, on_progress=None)._decode)

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
        with fast, packed_weights(model) as packed:
            budget = self.kv_budget_bytes or default_budget(model.device)
            for batch in row_batches(lengths, config, model, max_rows=self.max_rows, budget=budget):
                decode = _BatchDecoder(
                    model, config, rules, results, compact=self.compact, value_head=value_head,
                    interval=self.stop_check_interval or (16 if model.device.type == "cuda" else 1),
                    packed=packed if self.fast_products else None,
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


class _BatchDecoder:
    """Decoding state of one batch; all its tensors shrink along the row axis as rows finish."""

    def __init__(
        self,
        model: Any,
        config: SamplingConfig,
        rules: DecodingRules,
        results: DecodedTokens,
        *,
        compact: bool,
        value_head: Callable[[Tensor], Tensor] | None,
        interval: int,
        packed: PackedWeights | None,
    ) -> None:
        self.model, self.config, self.rules, self.results, self.compact = model, config, rules, results, compact
        self.interval, self.packed = interval, packed
        self.value_head = value_head
        results.has_values = value_head is not None
        self.last_logits_only = {"logits_to_keep": 1} if supports_logits_to_keep(model) else {}

    def run(self, prompts: list[Tensor], rows: list[int]) -> None:
        """Decode the rows `rows` of the results; `prompts` has one prompt per row, equal ones adjacent."""
        with contiguous_head_inputs(self.model) as self.head_inputs:
            self._run(prompts, rows)

    def _run(self, prompts: list[Tensor], rows: list[int]) -> None:
        logits = self._prefill(prompts, rows)
        processors = self.rules.processors(self.width)
        longest = max(self.results.host_limits[row] for row in rows)
        for step in range(longest):
            self._sample(processors, logits, step)
            self._mark_ended(step)
            if step + 1 == longest or ((step + 1) % self.interval == 0 and not self._any_unfinished()):
                return
            if self.packed is not None and step == PACK_AFTER:
                self.packed.pack(steps=longest - step)
            logits = self._advance(step)

    def _prefill(self, prompts: list[Tensor], rows: list[int]) -> Float[Tensor, "rows vocab"]:
        """Run the distinct prompts, left-padded, through the model once, then repeat cache and logits per response."""
        num_copies = self.config.num_return_sequences
        first = [i for i, row in enumerate(rows) if i == 0 or row // num_copies != rows[i - 1] // num_copies]
        distinct = [prompts[i] for i in first]
        ids, mask = pad_prompts(distinct, self.rules.device, side="left")
        self.width = ids.shape[1]
        self.is_padded = len({len(prompt) for prompt in distinct}) > 1
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        self.cache: DynamicCache = new_cache(self.model.config, self.width + self.config.max_new_tokens)
        logits = self._forward(ids, mask, positions)
        num_tokens = sum(len(prompt) for prompt in distinct)
        self._count(prompt_tokens=num_tokens, prefill_tokens=ids.numel(), lm_head_rows=len(distinct), forwards=1)

        self.rows = torch.tensor(rows, device=ids.device)
        if len(first) < len(rows):
            ends = [*first[1:], len(rows)]
            counts = torch.tensor([end - begin for begin, end in zip(first, ends, strict=True)], device=ids.device)
            source = torch.arange(len(first), device=ids.device).repeat_interleave(counts)
            select_rows(self.cache, source)
            ids, mask, positions, logits = ids[source], mask[source], positions[source], logits[source]
            self.head_inputs[:] = [states[source] for states in self.head_inputs]
        response_shape = (len(rows), self.config.max_new_tokens)
        self.ids = torch.cat([ids, ids.new_zeros(response_shape)], dim=1)
        self.mask = torch.cat([mask, mask.new_ones(response_shape)], dim=1)
        self.positions = positions[:, -1:]
        self.alive = torch.ones(len(rows), dtype=torch.bool, device=ids.device)
        return logits

    def _sample(self, processors: LogitsProcessorList, logits: Float[Tensor, "rows vocab"], step: int) -> None:
        """Sample this step's tokens and store them with log-probabilities and values."""
        scores = logits.float()
        if processors:
            scores = processors(cast("torch.LongTensor", self.ids[:, : self.width + step]), scores)
        if self.config.do_sample:
            tokens, logprobs = sample_tokens(scores, self.results.uniforms[self.rows, step])
        else:
            tokens, logprobs = greedy_tokens(scores)
        self.results.tokens[self.rows, step] = tokens
        self.results.logprobs[self.rows, step] = logprobs
        if self.value_head is not None:  # it reads what the LM head reads
            self.results.values[self.rows, step] = self.value_head(self.head_inputs[0][:, -1]).squeeze(-1).float()
        self.ids[:, self.width + step] = tokens

    def _mark_ended(self, step: int) -> None:
        """Mark the rows that end at this step."""
        stopped = self.rules.stopped(self.ids[:, self.width : self.width + step + 1]) & self.alive
        ended = stopped | ((self.results.limits[self.rows] == step + 1) & self.alive)
        self.results.finished[self.rows] |= stopped
        self.results.lengths[self.rows] += ended * (step + 1)
        self.alive = self.alive & ~ended

    def _any_unfinished(self) -> bool:
        """Whether any row goes on; those that do not leave the batch."""
        alive = self.alive.tolist()
        if self.compact and 0 < sum(alive) < len(alive):
            self._drop_finished_rows(alive)
        return any(alive)

    def _drop_finished_rows(self, alive: list[bool]) -> None:
        kept_rows = drop_rows(self.cache, alive, self.rows.device)
        for name in ("rows", "ids", "mask", "positions", "alive"):
            setattr(self, name, getattr(self, name)[kept_rows])

    def _advance(self, step: int) -> Float[Tensor, "rows vocab"]:
        """Run the last sampled token of each row through the model."""
        end = self.width + step + 1
        self.positions = self.positions + 1
        self._count(decode_row_steps=len(self.rows), lm_head_rows=len(self.rows), forwards=1)
        return self._forward(self.ids[:, end - 1 : end], self.mask[:, :end], self.positions)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "rows vocab"]:
        needed = self.is_padded or ids.device.type != "cuda"
        with masks_unread(ids.device):
            output = self.model(
                input_ids=ids, attention_mask=mask if needed else None, position_ids=positions,
                past_key_values=self.cache, use_cache=True, return_dict=True, **self.last_logits_only,
            )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits

    def _count(self, **counts: int) -> None:
        self.results.counts = self.results.counts + SamplingCounts(**counts)
