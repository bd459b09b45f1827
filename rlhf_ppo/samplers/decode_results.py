"""Where the decode loop puts down what it draws, and the random numbers that it draws with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_ppo.samplers.base import Samples, SamplingConfig, SamplingCounts


@dataclass(kw_only=True)
class DecodedTokens:
    """Where drawn tokens are put down, in the caller's order, and the uniforms that draw them."""

    tokens: Int[Tensor, "rows steps"]
    logprobs: Float[Tensor, "rows steps"]
    lengths: Int[Tensor, "rows"]
    finished: Bool[Tensor, "rows"]
    limits: Int[Tensor, "rows"]
    values: Float[Tensor, "rows steps"]
    uniforms: Float[Tensor, "rows draws"]
    has_values: bool = False
    work: SamplingCounts = field(default_factory=SamplingCounts)

    @classmethod
    def empty(
        cls,
        prompts: int,
        config: SamplingConfig,
        generator: torch.Generator | None,
        device: torch.device,
        limits: Sequence[int] | None,
    ) -> "DecodedTokens":
        """Uniforms are drawn here for every row and step, so that no cut into batches changes who gets which."""
        steps, rows = config.max_new_tokens, prompts * config.num_return_sequences
        at_most = torch.full((prompts,), steps) if limits is None else torch.tensor(limits).clamp(max=steps)
        if at_most.shape != (prompts,) or bool((at_most < 1).any()):
            raise ValueError(
                f"limits must be one number >= 1 for each of the {prompts} prompts, got {limits}: at least one token "
                "is drawn for every prompt."
            )
        source = "cpu" if generator is None else generator.device
        shape = (rows, steps) if config.do_sample else (rows, 0)
        return cls(
            tokens=torch.zeros(rows, steps, dtype=torch.long, device=device),
            logprobs=torch.zeros(rows, steps, dtype=torch.float32, device=device),
            values=torch.zeros(rows, steps, dtype=torch.float32, device=device),
            lengths=torch.zeros(rows, dtype=torch.long, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            limits=at_most.repeat_interleave(config.num_return_sequences).to(device),
            uniforms=torch.rand(shape, dtype=torch.float64, generator=generator, device=source).to(device),
        )

    def samples(self, prompts: Sequence[Tensor], config: SamplingConfig) -> Samples:
        lengths = self.lengths.tolist()
        drawn = torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]
        bad = ((~self.logprobs.isfinite()) & drawn).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"The model's logits must be numbers, got nan or inf while sampling responses {bad[:8]}: no token can "
                "be drawn from them. The weights have probably diverged: go back to the last checkpoint, lower the "
                "learning rate."
            )
        return Samples(
            prompts=[prompt for prompt in prompts for _ in range(config.num_return_sequences)],
            responses=[row[:n].clone() for row, n in zip(self.tokens, lengths, strict=True)],
            logprobs=[row[:n].clone() for row, n in zip(self.logprobs, lengths, strict=True)],
            values=[row[:n].clone() for row, n in zip(self.values, lengths, strict=True)] if self.has_values else None,
            finished=self.finished.tolist(),
            work=self.work + SamplingCounts(response_tokens=sum(lengths)),
        )
