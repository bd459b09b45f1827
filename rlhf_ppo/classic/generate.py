"""`PPOTrainer.generate` of the classic API: query tensors in, response tensors out, settings of transformers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.chat.encoding import decode_tokens
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.samplers.base import SamplingConfig, check_prompts, pad_prompts, unwrap_causal_lm
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.decode_proof import GenerationPlan, generation_plan, position_settings
from rlhf_ppo.samplers.decode_support import check_ids, check_positions

# Settings of `generate` that the decode loop supports, and those that do not change its samples.
SUPPORTED_SETTINGS = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)
IGNORED_SETTINGS = (
    "pad_token_id",
    "tokenizer",
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "transformers_version",
)
NEUTRAL_VALUES = {
    "num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "length_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "num_return_sequences": 1, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10,
}  # fmt: skip
DEFAULT_TOP_K = 50  # of transformers' `generate(do_sample=True)`


def generate_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    query_tensor: Tensor | Sequence[Tensor],
    /,
    *,
    length_sampler: Callable[[], int] | None = None,
    batch_size: int = 4,
    return_prompt: bool = True,
    remove_padding: bool = True,
    pad_to_multiple_of: int | None = None,
    device: torch.device | str | None = None,
    kv_budget_bytes: int | None = None,
    **generation_kwargs: Any,
) -> Tensor | list[Tensor]:
    """Generate a response to one query, or to each of a list.

    The settings are those of `model.generate`, its generation config included. The decode loop is used if it supports
    them (sampling or greedy, with the usual filters, one response per query), else `model.generate`.

    Args:
        tokenizer: Its end-of-sequence token ends a response, whatever the model stops at.
        query_tensor: Token ids of one query, or a list of them.
        length_sampler: Called once per `batch_size` queries; its value is their `max_new_tokens`.
        batch_size: Queries that share one value of `length_sampler`, and one call of `model.generate`. The decode loop
            batches rows by its own limits.
        return_prompt: Whether a response begins with its query (decoder-only models).
        remove_padding: Whether responses of a list are cut after the first token or string that stops generation, or
            the tokenizer's end-of-sequence token. Only the response is searched: a query may hold that token too, and
            begins with it where BOS and EOS are one.
        pad_to_multiple_of: Accepted for compatibility; padding never changes a response.
        device: Device of the results; None: that of the model.

    Returns:
        One query: a tensor [1, length] ([n, length] for `num_return_sequences=n`). A list: a list of one-dimensional
        tensors, in order.

    Raises:
        ValueError: A query has another shape.
    """
    single = isinstance(query_tensor, Tensor)
    if isinstance(query_tensor, Tensor) and query_tensor.dim() != 1:
        raise ValueError(
            "query_tensor must be a tensor of shape (`seq_len`) or a list of tensors of shape (`seq_len`), got shape "
            f"{tuple(query_tensor.shape)}: rows of one tensor would share their padding with the query. "
            "Pass `list(query_tensor)`, without padding."
        )
    queries = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
    check_prompts(queries)
    inner = unwrap_causal_lm(model)
    if device is None and queries:
        device = next(inner.parameters()).device
    call = _GenerateCall(inner, tokenizer, queries, length_sampler, 1 if single else batch_size, generation_kwargs)
    call.kv_budget_bytes = kv_budget_bytes
    rows = call.run()
    copies = len(rows) // max(len(queries), 1)
    encoder_decoder = bool(getattr(inner.config, "is_encoder_decoder", False))
    outputs = []
    for index, row in enumerate(rows):
        response = row
        if remove_padding and not single:
            response = call.until_stop(row, start=1 if encoder_decoder else 0)
        if return_prompt and not encoder_decoder:
            response = torch.cat([queries[index // copies].to(row.device), response])
        outputs.append(response.to(device))
    if not single:
        return outputs
    padding = generation_kwargs.get("pad_token_id") or tokenizer.pad_token_id or 0
    return nn.utils.rnn.pad_sequence(outputs, batch_first=True, padding_value=padding)


@dataclass
class _GenerateCall:
    """One call of `generate_responses`, in chunks of `batch_size` queries with a common length."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    queries: list[Tensor]
    length_sampler: Callable[[], int] | None
    batch_size: int
    kwargs: dict[str, Any]
    kv_budget_bytes: int | None = None

    def run(self) -> list[Tensor]:
        """Generate the responses, without their queries."""
        starts = range(0, len(self.queries), max(1, self.batch_size))
        lengths = None if self.length_sampler is None else [int(self.length_sampler()) for _ in starts]
        settings = self.kwargs if lengths is None else {**self.kwargs, "max_new_tokens": max(lengths, default=1)}
        config = as_sampling_config(self.model, settings)
        tokenizer = self.kwargs.get("tokenizer") or self.tokenizer
        loop = DecodeLoop(tokenizer, kv_budget_bytes=self.kv_budget_bytes)
        if config is not None and loop.unsupported_reason(self.model) is None:
            limits = None
            if lengths is not None:
                limits = [lengths[index // self.batch_size] for index in range(len(self.queries))]
            return loop(self.model, self.queries, config, limits=limits).responses
        rows: list[Tensor] = []
        with EvalMode(self.model), torch.no_grad():
            for chunk, start in enumerate(starts):
                length = {} if lengths is None else {"max_new_tokens": lengths[chunk]}
                rows += self._generate(self.queries[start : start + self.batch_size], {**self.kwargs, **length})
        return rows

    def until_stop(self, row: Tensor, *, start: int) -> Tensor:
        """The row up to the first token or string that stops generation, that one included."""
        settings = self.kwargs.get("generation_config") or self.model.generation_config
        stops = self.kwargs.get("eos_token_id", settings.eos_token_id)
        ids = [] if stops is None else torch.as_tensor(stops).flatten().tolist()
        ids += [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        positions = torch.isin(row[start:], row.new_tensor(ids)).nonzero()
        row = row if len(positions) == 0 else row[: start + int(positions[0]) + 1]
        strings = self.kwargs.get("stop_strings", settings.stop_strings)
        strings = [strings] if isinstance(strings, str) else list(strings or ())
        for end in range(start + 1, len(row) if strings else 0):
            text = decode_tokens(self.tokenizer, row[start:end].tolist())
            if any(string in text for string in strings):
                return row[:end]
        return row

    def _generate(self, queries: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        """One call of `model.generate`, or one for each length of query where padding would change the result."""
        plan = generation_plan(self.model)
        check_ids(self.model, queries)
        longest = max((len(query) for query in queries), default=0)
        new = settings.get("max_new_tokens")
        length = settings.get("max_length") if new is None else longest + new
        if length is not None and not self.model.config.is_encoder_decoder:
            check_positions(self.model, length)
        settings = settings if plan.use_cache else {**settings, "use_cache": False}
        if settings.get("stop_strings"):
            settings.setdefault("tokenizer", self.tokenizer)
        lengths = {len(query) for query in queries}
        if plan.pads or len(lengths) == 1:
            return self._generate_together(queries, settings, plan)
        rows: dict[int, list[Tensor]] = {}
        for length in sorted(lengths):
            indices = [index for index, query in enumerate(queries) if len(query) == length]
            found = self._generate_together([queries[index] for index in indices], settings, plan)
            copies = len(found) // len(indices)
            rows |= {index: found[place * copies : (place + 1) * copies] for place, index in enumerate(indices)}
        return [row for index in range(len(queries)) for row in rows[index]]

    def _generate_together(self, queries: list[Tensor], settings: dict[str, Any], plan: GenerationPlan) -> list[Tensor]:
        encoder_decoder = self.model.config.is_encoder_decoder
        ids, mask = pad_prompts(queries, self.model.device, side="right" if encoder_decoder else "left")
        settings.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        settings = {**settings, **position_settings(plan, ids)}
        output = self.model.generate(input_ids=ids, attention_mask=mask, **settings)
        sequences = output if isinstance(output, Tensor) else output.sequences
        return list(sequences if encoder_decoder else sequences[:, ids.shape[1] :])


def as_sampling_config(model: Any, generation_kwargs: Mapping[str, Any]) -> SamplingConfig | None:
    """Convert the settings of `model.generate(**generation_kwargs)`; None if the decode loop does not support them."""
    settings = {name: value for name, value in model.generation_config.to_dict().items() if value is not None}
    settings |= generation_kwargs
    if settings.get("max_new_tokens") is None:
        return None
    stops = settings.pop("eos_token_id", None)
    strings = settings.pop("stop_strings", None) or ()
    supported = {name: settings.pop(name) for name in SUPPORTED_SETTINGS if settings.get(name) is not None}
    if (settings.pop("min_length", None) or 0) > 0 or any(not _is_neutral(*item) for item in settings.items()):
        return None
    foreign = [name for name, value in settings.items() if value is not None and name not in IGNORED_SETTINGS]
    if not all(hasattr(model.generation_config, name) for name in foreign):
        return None  # no setting of the generation config, perhaps a misspelt one: `generate` knows, or refuses it
    supported["top_k"] = int(supported.get("top_k", DEFAULT_TOP_K))
    stops = [] if stops is None else torch.as_tensor(stops).flatten().tolist()
    return SamplingConfig(
        **{"do_sample": False, **supported},
        stop_token_ids=tuple(stop for stop in stops if stop >= 0),
        stop_strings=(strings,) if isinstance(strings, str) else tuple(strings),
    )


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a setting has no effect on the samples."""
    if name in IGNORED_SETTINGS or name == "max_length" or name.startswith("_") or value is None:
        return True
    if name in NEUTRAL_VALUES:
        return bool(value == NEUTRAL_VALUES[name])
    return isinstance(value, (bool, int, float)) and not value
