"""Output buffers of the decode loop and the uniform random numbers it samples with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_ppo.samplers.base import Samples, SamplingConfig, SamplingCounts


@dataclass(kw_only=True)
class DecodedTokens:
    """Buffers for sampled tokens, log-probabilities and values, rows in the caller's order, and their uniforms."""

    tokens: Int[Tensor, "rows steps"]
    logprobs: Float[Tensor, "rows steps"]
    lengths: Int[Tensor, "rows"]
    finished: Bool[Tensor, "rows"]
    limits: Int[Tensor, "rows"]
    host_limits: list[int]
    """The same numbers, for the host."""
    values: Float[Tensor, "rows steps"]
    uniforms: Float[Tensor, "rows draws"]
    """`draws` is the number of steps, 0 for greedy decoding."""
    has_values: bool = False
    counts: SamplingCounts = field(default_factory=SamplingCounts)

    @classmethod
    def empty(
        cls,
        prompts: int,
        config: SamplingConfig,
        generator: torch.Generator | None,
        device: torch.device,
        limits: Sequence[int] | None,
    ) -> "DecodedTokens":
        """Allocate the buffers and draw all uniforms, so that the split into batches does not change them."""
        steps, rows = config.max_new_tokens, prompts * config.num_return_sequences
        max_lengths = torch.full((prompts,), steps) if limits is None else torch.tensor(limits).clamp(max=steps)
        if max_lengths.shape != (prompts,) or bool((max_lengths < 1).any()):
            raise ValueError(
                f"limits must be one number >= 1 for each of the {prompts} prompts, got {limits}: a response "
                "has at least one token."
            )
        row_limits = max_lengths.repeat_interleave(config.num_return_sequences)
        generator_device = "cpu" if generator is None else generator.device
        shape = (rows, steps) if config.do_sample else (rows, 0)
        return cls(
            tokens=torch.zeros(rows, steps, dtype=torch.long, device=device),
            logprobs=torch.zeros(rows, steps, dtype=torch.float32, device=device),
            values=torch.zeros(rows, steps, dtype=torch.float32, device=device),
            lengths=torch.zeros(rows, dtype=torch.long, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            limits=row_limits.to(device),
            host_limits=row_limits.tolist(),
            uniforms=torch.rand(shape, dtype=torch.float64, generator=generator, device=generator_device).to(device),
        )

    def samples(self, prompts: Sequence[Tensor], config: SamplingConfig) -> Samples:
        """Cut the buffers to `Samples`, one tensor per response."""
        lengths = self.lengths.tolist()
        is_sampled = torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]
        bad_rows = ((~self.logprobs.isfinite()) & is_sampled).any(dim=1).nonzero().flatten().tolist()
        if bad_rows:
            raise ValueError(
                f"The model's logits must be numbers, got nan or inf while sampling responses {bad_rows[:8]}: no token "
                "can be sampled from them. The weights have probably diverged: go back to the last checkpoint and "
                "lower the learning rate."
            )
        return Samples(
            prompts=[prompt for prompt in prompts for _ in range(config.num_return_sequences)],
            responses=[row[:n].clone() for row, n in zip(self.tokens, lengths, strict=True)],
            logprobs=[row[:n].clone() for row, n in zip(self.logprobs, lengths, strict=True)],
            values=[row[:n].clone() for row, n in zip(self.values, lengths, strict=True)] if self.has_values else None,
            finished=self.finished.tolist(),
            counts=self.counts + SamplingCounts(response_tokens=sum(lengths)),
        )
