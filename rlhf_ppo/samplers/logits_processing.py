"""Logits processors and stopping criteria for a `SamplingConfig`."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StopStringCriteria

from rlhf_ppo.samplers.base import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class DecodingRules:
    """Logits processors and stopping criteria of one sampler call, shared by its batches."""

    config: SamplingConfig
    stop_tokens: Int[Tensor, "stops"]
    stop_strings: StopStringCriteria | None
    device: torch.device

    @classmethod
    def build(
        cls, config: SamplingConfig, tokenizer: PreTrainedTokenizerBase | None, device: torch.device
    ) -> "DecodingRules":
        return cls(
            config=config,
            stop_tokens=torch.tensor(config.stops, dtype=torch.long, device=device),
            stop_strings=stop_string_criteria(config, tokenizer),
            device=device,
        )

    def processors(self, prompt_width: int) -> LogitsProcessorList:
        """Build the logits processors of `transformers`, in its order."""
        config = self.config
        processors = LogitsProcessorList()
        if config.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if config.min_new_tokens > 0 and config.stops:
            stop_tokens, device = list(config.stops), str(self.device)
            processors.append(
                MinNewTokensLengthLogitsProcessor(prompt_width, config.min_new_tokens, stop_tokens, device=device)
            )
        if config.do_sample:
            if config.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(float(config.temperature)))
            if config.top_k > 0:
                processors.append(TopKLogitsWarper(config.top_k))
            if config.top_p < 1.0:
                processors.append(TopPLogitsWarper(config.top_p))
        return processors

    def stopped(self, response: Int[Tensor, "rows step"]) -> Bool[Tensor, "rows"]:
        """Whether the last token of each row ends its response."""
        ended = (response[:, -1:] == self.stop_tokens).any(dim=1)
        if self.stop_strings is not None and response.shape[1] >= self.config.min_new_tokens:
            ended |= self.stop_strings(response, None)
        return ended


def stop_string_criteria(
    config: SamplingConfig, tokenizer: PreTrainedTokenizerBase | None
) -> StopStringCriteria | None:
    """Build the `StopStringCriteria` for `config.stop_strings`; None if there are none."""
    if not config.stop_strings:
        return None
    if tokenizer is None:
        raise ValueError(
            f"SamplingConfig.stop_strings = {config.stop_strings} needs a tokenizer, got none: only it tells which "
            "tokens complete a string. Give the sampler one: DecodeLoop(tokenizer=tokenizer)."
        )
    return StopStringCriteria(tokenizer, list(config.stop_strings))
