"""Sampler over `model.generate`, for models that the decode loop does not support."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.samplers.base import (
    Samples,
    SamplingConfig,
    SamplingCounts,
    check_prompts,
    draw_seed,
    pad_prompts,
    unwrap_causal_lm,
)
from rlhf_ppo.samplers.decode_proof import GenerationPlan, generation_plan, position_settings
from rlhf_ppo.samplers.decode_support import check_ids, plain_generation_config
from rlhf_ppo.samplers.logits_processing import DecodingRules

logger = logging.getLogger(__name__)


class _StopRecorder(StoppingCriteria):
    """Stop rows at stop tokens and strings of the *response*, and record their lengths."""

    def __init__(self, rules: DecodingRules, start: int) -> None:
        self.rules, self.start = rules, start
        self.eos_token_id = rules.stop_tokens  # generate pads finished rows only if a criterion has this attribute
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Int[Tensor, "rows width"], scores: object, **_: object) -> Bool[Tensor, "rows"]:
        response = input_ids[:, self.start :]
        ended = self.rules.stopped(response)
        lengths = torch.zeros_like(response[:, 0]) if self.lengths is None else self.lengths
        self.lengths = torch.where(ended & (lengths == 0), response.shape[1], lengths)
        return self.lengths > 0


@dataclass(frozen=True, kw_only=True)
class TransformersGenerate:
    """Sampler over `model.generate`, for every model that has it, encoder-decoders included.

    `SamplingConfig` alone decides, as in the decode loop: of the model's generation config (forced tokens, beams,
    minimum lengths, filters) only the decoder's start token is read. Finished rows stay in the batch until the last one
    ends. Log-probabilities are not returned: the scores of `generate` would hold the whole vocabulary for every token.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    """Needed for `stop_strings` only."""
    max_rows: int = 512
    """Maximum number of rows generated at once."""
    static_cache: bool = False
    """Whether the KV cache has a fixed size: on CUDA, `generate` then compiles its decoding step and replays it as a
    CUDA graph. Not for encoder-decoders."""

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Sample responses; see `Sampler`. Restores the global random state if a generator is given."""
        check_prompts(prompts)
        causal_lm = unwrap_causal_lm(model)
        rules = DecodingRules.build(config, self.tokenizer, causal_lm.device)
        num_copies = config.num_return_sequences
        responses: list[Tensor] = [torch.empty(0)] * (len(prompts) * num_copies)
        finished = [False] * len(responses)
        check_ids(causal_lm, prompts)
        if (forced := getattr(causal_lm.generation_config, "forced_bos_token_id", None)) is not None:
            _warn_of_forced_start(type(causal_lm).__name__, str(forced))
        plan = generation_plan(causal_lm)
        batches = _batches([len(prompt) for prompt in prompts], max(1, self.max_rows // num_copies), pads=plan.pads)
        devices = [causal_lm.device] if causal_lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=generator is not None), EvalMode(causal_lm), torch.no_grad():
            if generator is not None:
                torch.manual_seed(draw_seed(generator))
            for batch in batches:
                rows = [prompts[i] for i in batch]
                with plain_generation_config(causal_lm):
                    outputs = _generate(causal_lm, rows, rules, plan, static_cache=self.static_cache)
                for offset, (response, ended) in enumerate(outputs):
                    row = batch[offset // num_copies] * num_copies + offset % num_copies
                    responses[row], finished[row] = response, ended
        return Samples(
            prompts=[prompt for prompt in prompts for _ in range(num_copies)],
            responses=responses,
            logprobs=None,
            finished=finished,
            counts=SamplingCounts(response_tokens=sum(len(response) for response in responses)),
        )


@cache
def _warn_of_forced_start(name: str, token: str) -> None:
    logger.warning(
        "The generation config of %s forces token %s at the start of a response; the sampler does not, because the "
        "policy is trained on what it samples itself.", name, token,
    )  # fmt: skip


def _batches(lengths: list[int], size: int, *, pads: bool) -> list[list[int]]:
    """Indices of the prompts of each call, longest first; of one length each unless padding is right for the model."""
    order = sorted(range(len(lengths)), key=lambda prompt: (-lengths[prompt], prompt))
    groups = [order] if pads else [list(group) for _, group in groupby(order, key=lambda prompt: lengths[prompt])]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _generate(
    model: Any, prompts: list[Tensor], rules: DecodingRules, plan: GenerationPlan, *, static_cache: bool
) -> list[tuple[Tensor, bool]]:
    """Sample responses to one batch; each comes with whether it ended before the maximum length."""
    config = rules.config
    encoder_decoder = model.config.is_encoder_decoder
    ids, mask = pad_prompts(prompts, model.device, side="right" if encoder_decoder else "left")
    start = 1 if encoder_decoder else ids.shape[1]
    recorder = _StopRecorder(rules, start)
    warpers = {"temperature": float(config.temperature), "top_k": config.top_k, "top_p": float(config.top_p)}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens if config.stops else 0,
        do_sample=config.do_sample,
        repetition_penalty=float(config.repetition_penalty),
        num_return_sequences=config.num_return_sequences,
        eos_token_id=list(config.stops) or None,
        pad_token_id=config.stops[0] if config.stops else 0,
        stopping_criteria=StoppingCriteriaList([recorder]),
        use_cache=plan.use_cache,
        cache_implementation="static" if static_cache and not encoder_decoder else None,
        **(warpers if config.do_sample else {}),
        **position_settings(plan, ids),
    )[:, start:]
    lengths = torch.zeros(len(output)) if recorder.lengths is None else recorder.lengths
    return [(row[: n or len(row)].clone(), n > 0) for row, n in zip(output, lengths.tolist(), strict=True)]
