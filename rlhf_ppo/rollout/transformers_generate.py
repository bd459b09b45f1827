"""Sampler over `model.generate`, for models that the decode loop does not fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from rlhf_ppo.rollout.sampling import (
    EvalMode,
    Samples,
    SamplingConfig,
    SamplingWork,
    check_prompts,
    seed_from,
    unwrap_causal_lm,
)


class _StopRecorder(StoppingCriteria):  # type: ignore[misc]  # untyped in transformers
    """Ends rows at stop tokens and strings of the *response*, and remembers at which step."""

    def __init__(self, config: SamplingConfig, tokenizer: PreTrainedTokenizerBase | None, start: int) -> None:
        self.eos_token_id = list(config.stop_token_ids) or [-1]  # its presence makes generate pad finished rows
        self.config, self.start = config, start
        self.strings = StopStringCriteria(tokenizer, list(config.stop_strings)) if config.stop_strings else None
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Int[Tensor, "rows width"], scores: object, **_: object) -> Bool[Tensor, "rows"]:
        response = input_ids[:, self.start :]
        steps = response.shape[1]
        if self.lengths is None:
            self.lengths = torch.zeros(len(response), dtype=torch.long, device=response.device)
        ends = torch.isin(response[:, -1], torch.tensor(self.eos_token_id, device=response.device))
        if self.strings is not None and steps >= self.config.min_new_tokens:
            ends |= self.strings(response, None)
        self.lengths = torch.where(ends & (self.lengths == 0), steps, self.lengths)
        return self.lengths > 0


@dataclass(frozen=True, kw_only=True)
class TransformersGenerate:
    """Sampler over `model.generate`: works for every model it works for, encoder-decoders included.

    Finished rows stay in the batch until the last has ended, and log-probabilities are not returned: the scores that
    `generate` could return hold the whole vocabulary for every token.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    """Needed for `stop_strings` only."""
    max_rows: int = 512
    """Rows generated at once, at most."""

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw responses; see `Sampler`. The global random state is put back afterwards when a generator is given."""
        check_prompts(prompts)
        if config.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"SamplingConfig.stop_strings = {config.stop_strings} needs a tokenizer, got none: only it knows which "
                "tokens complete a string. Build the sampler as TransformersGenerate(tokenizer=tokenizer)."
            )
        inner = unwrap_causal_lm(model)
        copies = config.num_return_sequences
        responses: list[Tensor] = [torch.empty(0)] * (len(prompts) * copies)
        finished = [False] * len(responses)
        order = sorted(range(len(prompts)), key=lambda prompt: (-len(prompts[prompt]), prompt))
        size = max(1, self.max_rows // copies)
        devices = [inner.device] if inner.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=generator is not None), EvalMode(inner), torch.no_grad():
            if generator is not None:
                torch.manual_seed(seed_from(generator))
            for begin in range(0, len(order), size):
                batch = order[begin : begin + size]
                drawn = self._generate(inner, [prompts[i] for i in batch], config)
                for place, (response, ended) in enumerate(drawn):
                    row = batch[place // copies] * copies + place % copies
                    responses[row], finished[row] = response, ended
        return Samples(
            prompts=[prompt for prompt in prompts for _ in range(copies)],
            responses=responses,
            logprobs=None,
            finished=finished,
            work=SamplingWork(response_tokens=sum(len(response) for response in responses)),
        )

    def _generate(self, model: "nn.Module", prompts: list[Tensor], config: SamplingConfig) -> list[tuple[Tensor, bool]]:
        side = "right" if model.config.is_encoder_decoder else "left"
        ids = nn.utils.rnn.pad_sequence(
            [p.to(model.device) for p in prompts], batch_first=True, padding_value=-1, padding_side=side
        ).long()
        mask = ids >= 0
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        recorder = _StopRecorder(config, self.tokenizer, start)
        sampling = {"temperature": float(config.temperature), "top_k": config.top_k, "top_p": float(config.top_p)}
        output = model.generate(
            input_ids=ids.clamp(min=0),
            attention_mask=mask.long(),
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens if config.stop_token_ids else 0,
            do_sample=config.do_sample,
            repetition_penalty=float(config.repetition_penalty),
            num_return_sequences=config.num_return_sequences,
            eos_token_id=recorder.eos_token_id,
            pad_token_id=recorder.eos_token_id[0] if config.stop_token_ids else 0,
            stopping_criteria=StoppingCriteriaList([recorder]),
            **(sampling if config.do_sample else {}),
        )[:, start:]
        assert recorder.lengths is not None  # generate drew at least one token
        lengths = recorder.lengths.tolist()
        return [(row[: n or len(row)].clone(), n > 0) for row, n in zip(output, lengths, strict=True)]
