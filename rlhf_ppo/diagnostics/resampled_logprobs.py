"""What a model says about tokens that were drawn, each row scored alone: a few distributions at a time, none kept."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.models.trunk import decoder_start_token
from rlhf_ppo.samplers.base import EvalMode

ENTRIES = 2**21
"""At most so many logits come from the model at once: 8 MiB in float32."""
PART = 2**18
"""Of them are looked at together: several tensors of this size are alive then."""
BETAS = torch.logspace(math.log10(0.2), math.log10(5.0), 33, dtype=torch.float64)
"""Reciprocal temperatures, relative to the trainer's, that tokens are tried on."""

Distributions: TypeAlias = Iterator[tuple[Tensor, Tensor]]
"""log π(. | s_t) at the trainer's temperature, [few, vocab], with the tokens drawn there, [few]."""


@dataclass(frozen=True)
class TokenDistributions:
    """What the model says about each token, scored alone."""

    logprobs: Float[Tensor, " actions"]
    expected: Float[Tensor, " actions"]
    """Mean of log π over the distribution: minus its entropy."""
    variance: Float[Tensor, " actions"]
    """Of log π over the distribution."""
    ranks: Int[Tensor, " actions"]
    """1 for the likeliest token."""
    above: Float[Tensor, " actions"]
    """Mass of the likelier tokens."""
    again: Callable[[], Distributions]
    """Every distribution once more."""

    @classmethod
    def of(cls, look: Callable[[], Distributions]) -> "TokenDistributions":
        """Walk over the distributions once."""
        columns = list(zip(*(_summary(rows, tokens) for rows, tokens in look()), strict=True))
        logprobs, expected, variance, ranks, above = (torch.cat(column) for column in columns)
        return cls(logprobs, expected, variance, ranks, above, look)

    def surprise(self) -> float:
        """How much likelier than expected the tokens are, in standard deviations: 0 ± 1 from an honest sampler."""
        return float((self.logprobs - self.expected).sum() / self.variance.sum().clamp(min=1e-12).sqrt())

    def temperature(self) -> float:
        """The temperature, relative to the trainer's, under which the tokens are likeliest; on a grid, 0.2 to 5."""
        fits = torch.zeros_like(BETAS)
        for rows, tokens in self.again():
            chosen = rows.gather(1, tokens[:, None]).squeeze(1)
            fits += torch.stack(
                [(beta * chosen - (beta * rows).logsumexp(dim=1)).sum() for beta in BETAS.tolist()]
            ).cpu()
        return float(1 / BETAS[int(fits.argmax())])

    def truncation(self) -> tuple[int, float, float, float]:
        """The largest rank and the largest mass of likelier tokens, each with log P(none larger) of the distributions.

        Returns:
            Rank, its log-probability; mass, its log-probability.
        """
        rank, mass = int(self.ranks.max()), float(self.above.max()) + 1e-6
        of_rank = of_mass = 0.0
        for rows, _ in self.again():
            of_rank += float(rows.topk(rank, dim=1).values.logsumexp(dim=1).clamp(max=0).sum())
            ordered = rows.exp().sort(dim=1, descending=True).values
            inside = ordered.masked_fill(ordered.cumsum(dim=1) - ordered > mass, 0.0).sum(dim=1)
            of_mass += float(inside.clamp(1e-12, 1.0).log().sum())
        return rank, of_rank, mass, of_mass


def score_rows_alone(learner: PPOLearner, policy: TokenPolicy, part: DiagnosedBatch) -> TokenDistributions:
    """Each row through the language model by itself, without padding, masks or packing, some positions at a time."""

    def look() -> Distributions:
        masks = part.masks or [torch.ones(len(response), dtype=torch.bool) for response in part.responses]
        for prompt, response, mask in zip(part.prompts, part.responses, masks, strict=True):
            prompt, response = (tokens.to(learner.current_device) for tokens in (prompt, response))
            for rows, call in _calls(policy, prompt, response, learner.limits.vocab_size or 1):
                with torch.no_grad(), EvalMode(policy), learner.accelerator.autocast():
                    logits = call()
                ours = mask[rows].to(logits.device)
                size = max(1, PART // logits.shape[-1])
                for few, tokens in zip(logits[ours].split(size), response[rows][ours].split(size), strict=True):
                    yield (few.float() / policy.temperature).log_softmax(dim=-1), tokens

    return TokenDistributions.of(look)


def _calls(
    policy: TokenPolicy, prompt: Int[Tensor, " prompt"], response: Int[Tensor, " response"], vocabulary: int
) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
    """Some response tokens at a time, with the call that makes the model's own logits there, [tokens, vocab]."""
    model: Any = policy.language_model
    if model.config.is_encoder_decoder:
        shown = torch.cat([response.new_tensor([decoder_start_token(model)]), response[:-1]])[None]
        yield slice(None), lambda: model(input_ids=prompt[None], decoder_input_ids=shown).logits[0]
        return
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    size = max(1, ENTRIES // vocabulary) if selects else len(response)
    for start in range(0, len(response), size):
        end = min(start + size, len(response))
        yield (
            slice(start, end),
            partial(_last_logits, model, torch.cat([prompt, response[: end - 1]]), end - start, selects),
        )


def _last_logits(model: Any, ids: Tensor, number: int, selects: bool) -> Tensor:
    keep = {"logits_to_keep": number} if selects else {}
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **keep).logits
    return logits[0, -number:]


def _summary(rows: Float[Tensor, "few vocab"], tokens: Int[Tensor, " few"]) -> tuple[Tensor, ...]:
    """The columns of `TokenDistributions` at some tokens."""
    chosen = rows.gather(1, tokens[:, None])
    p, finite = rows.exp(), rows.clamp(min=-1e4)  # 0 x -inf is nan
    expected = (p * finite).sum(dim=1)
    variance = (p * (finite - expected[:, None]).square()).sum(dim=1)
    likelier = rows > chosen
    above = p.masked_fill(~likelier, 0.0).sum(dim=1)
    return chosen.squeeze(1), expected, variance, likelier.sum(dim=1) + 1, above
