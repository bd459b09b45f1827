"""Decode one batch of rows: prefill, sample, mark what ended, drop it, run the next tokens."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList

from rlhf_ppo.kernels.mask_reads import skip_mask_reads
from rlhf_ppo.kernels.packed_weights import PackedWeights
from rlhf_ppo.models.loading import cache_argument
from rlhf_ppo.samplers.base import SamplingConfig, SamplingCounts, pad_prompts
from rlhf_ppo.samplers.decode_results import DecodedTokens
from rlhf_ppo.samplers.decode_support import contiguous_head_inputs, supports_logits_to_keep
from rlhf_ppo.samplers.kv_cache import drop_rows, merge_rows, new_cache
from rlhf_ppo.samplers.logits_processing import DecodingRules
from rlhf_ppo.samplers.static_step import StaticStep
from rlhf_ppo.samplers.token_sampling import greedy_tokens, sample_tokens
from rlhf_ppo.utils.transfer import upload

PREFILL_POSITIONS = 2**14
"""Positions of prompts, padding included, that run through the model at once: enough to keep a GPU busy."""


class BatchDecoder:
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
        static: bool,
    ) -> None:
        self.model, self.config, self.rules, self.results, self.compact = model, config, rules, results, compact
        self.interval, self.packed, self.static = interval, packed, static
        self.value_head = value_head
        results.has_values = value_head is not None
        self.cache_name = cache_argument(model)
        self.last_logits_only = {"logits_to_keep": 1} if supports_logits_to_keep(model) else {}

    def run(self, prompts: list[Tensor], rows: list[int]) -> None:
        """Decode the rows `rows` of the results; `prompts` has one prompt per row, equal ones adjacent."""
        with contiguous_head_inputs(self.model) as self.head_inputs:
            self._run(prompts, rows)

    def _run(self, prompts: list[Tensor], rows: list[int]) -> None:
        logits = self._prefill(prompts, rows)
        self.step = StaticStep(
            self.model, self.cache, self.mask, self.positions, width=self.width, head_inputs=self.head_inputs,
            settings=self.last_logits_only,
        ) if self.static else None  # fmt: skip
        processors = self.rules.processors(self.width)
        longest = max(self.results.host_limits[row] for row in rows)
        for step in range(longest):
            self._sample(processors, logits, step)
            self._mark_ended(step)
            if step + 1 == longest or ((step + 1) % self.interval == 0 and not self._any_unfinished()):
                return
            if self.packed is not None and step == 0:  # not before: all responses may end here
                self.packed.pack(steps=longest)
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
        self._count(prompt_tokens=sum(map(len, distinct)), prefill_tokens=ids.numel(), lm_head_rows=len(distinct))

        self.rows = torch.tensor(rows, device=ids.device)
        counts = [end - begin for begin, end in pairwise([*first, len(rows)])]
        logits = self._prefill_in_parts(ids, mask, positions, counts)
        if len(first) < len(rows):
            source = _repeated(counts, ids.device)
            ids, mask, positions, logits = ids[source], mask[source], positions[source], logits[source]
            self.head_inputs[:] = [states[source] for states in self.head_inputs]
        response_shape = (len(rows), self.config.max_new_tokens)
        self.ids = torch.cat([ids, ids.new_zeros(response_shape)], dim=1)
        self.mask = torch.cat([mask, mask.new_ones(response_shape)], dim=1)
        self.positions = positions[:, -1:]
        self.alive = torch.ones(len(rows), dtype=torch.bool, device=ids.device)
        return logits

    def _prefill_in_parts(self, ids: Tensor, mask: Tensor, positions: Tensor, counts: list[int]) -> Tensor:
        """Logits after each prompt, a few prompts at a time; the cache then has row i `counts[i]` times."""
        capacity, size = self.width + self.config.max_new_tokens, max(1, PREFILL_POSITIONS // self.width)
        is_whole = size >= len(ids) == sum(counts)
        logits, states, caches = [], [], []
        for part in zip(ids.split(size), mask.split(size), positions.split(size), strict=True):
            self.cache: DynamicCache = new_cache(self.model.config, capacity if is_whole else self.width)
            logits.append(self._forward(*part))
            states.extend(self.head_inputs)
            caches.append(self.cache)
            self._count(forwards=1)
        if not is_whole:
            self.cache = merge_rows(caches, _repeated(counts, ids.device), capacity)
            self.head_inputs[:] = [torch.cat(states)] if states else []
        return torch.cat(logits)

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
        kept_rows = drop_rows(self.cache, alive, self.rows.device) if self.step is None else self.step.drop(alive)
        if kept_rows is None:
            return
        for name in ("rows", "ids", "mask", "positions", "alive"):
            setattr(self, name, getattr(self, name)[kept_rows])

    def _advance(self, step: int) -> Float[Tensor, "rows vocab"]:
        """Run the last sampled token of each row through the model."""
        end = self.width + step + 1
        self._count(decode_row_steps=len(self.rows), lm_head_rows=len(self.rows), forwards=1)
        if self.step is not None:
            return self.step(self.ids[:, end - 1 : end])
        self.positions = self.positions + 1
        return self._forward(self.ids[:, end - 1 : end], self.mask[:, :end], self.positions)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "rows vocab"]:
        needed = self.is_padded or ids.device.type != "cuda"
        with skip_mask_reads(ids.device):
            output = self.model(
                input_ids=ids, attention_mask=mask if needed else None, position_ids=positions,
                use_cache=True, return_dict=True, **{self.cache_name: self.cache}, **self.last_logits_only,
            )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits

    def _count(self, **counts: int) -> None:
        self.results.counts = self.results.counts + SamplingCounts(**counts)


def _repeated(counts: list[int], device: torch.device) -> Int[Tensor, "rows"]:
    """Row i, `counts[i]` times."""
    return upload(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), device)
