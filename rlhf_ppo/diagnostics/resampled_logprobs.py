"""Score sampled tokens with each row alone, and compute statistics of their distributions, a few tokens at a time."""

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
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.models.trunk import decoder_start_token

MAX_LOGITS = 2**21
"""Maximum of logits per forward pass: 8 MiB in float32."""
CHUNK_LOGITS = 2**18
"""Logits per chunk of the statistics, which hold several tensors of this size."""
BETAS = torch.logspace(math.log10(0.2), math.log10(20.0), 45, dtype=torch.float64)
"""Grid of reciprocal temperatures, relative to the trainer's, for the fit in `temperature`."""

Distributions: TypeAlias = Iterator[tuple[Tensor, Tensor]]
"""Chunks of log π(. | s_t) at the trainer's temperature, [chunk, vocab], with the sampled tokens, [chunk]."""


@dataclass(frozen=True)
class TokenDistributions:
    """Statistics of the distribution at each sampled token, each row scored alone."""

    logprobs: Float[Tensor, " actions"]
    """log π of the sampled token."""
    expected: Float[Tensor, " actions"]
    """Mean of log π under the distribution: minus its entropy."""
    variance: Float[Tensor, " actions"]
    """Variance of log π under the distribution."""
    ranks: Int[Tensor, " actions"]
    """Rank of the sampled token; 1 for the likeliest."""
    mass_above: Float[Tensor, " actions"]
    """Total probability of the tokens that are likelier than the sampled one."""
    iterate: Callable[[], Distributions]
    """Computes all distributions again."""

    @classmethod
    def of(cls, iterate: Callable[[], Distributions]) -> "TokenDistributions":
        """Compute the statistics in one pass over the distributions."""
        columns = list(zip(*(_statistics(rows, tokens) for rows, tokens in iterate()), strict=True))
        logprobs, expected, variance, ranks, mass_above = (torch.cat(column) for column in columns)
        return cls(logprobs, expected, variance, ranks, mass_above, iterate)

    def surprise(self) -> float:
        """How much likelier than expected the tokens are, in standard deviations: 0 ± 1 if they are the policy's."""
        return float((self.logprobs - self.expected).sum() / self.variance.sum().clamp(min=1e-12).sqrt())

    def temperature(self) -> tuple[float, float]:
        """Maximum-likelihood temperature of the tokens, relative to the trainer's, on a grid from 0.05 to 5.

        Returns:
            Temperature, log-probability of the tokens there.
        """
        fits = torch.zeros_like(BETAS)
        for rows, tokens in self.iterate():
            chosen = rows.gather(1, tokens[:, None]).squeeze(1)
            fits += torch.stack(
                [(beta * chosen - (beta * rows).logsumexp(dim=1)).sum() for beta in BETAS.tolist()]
            ).cpu()
        return float(1 / BETAS[int(fits.argmax())]), float(fits.max())

    def truncation(self) -> tuple[int, float, float, float]:
        """Largest rank and largest mass of likelier tokens, each with the log-probability that none is larger.

        Returns:
            Rank, its log-probability; mass, its log-probability.
        """
        rank, mass = int(self.ranks.max()), float(self.mass_above.max()) + 1e-6
        log_rank = log_mass = 0.0
        for rows, _ in self.iterate():
            log_rank += float(rows.topk(rank, dim=1).values.logsumexp(dim=1).clamp(max=0).sum())
            ordered = rows.exp().sort(dim=1, descending=True).values
            inside = ordered.masked_fill(ordered.cumsum(dim=1) - ordered > mass, 0.0).sum(dim=1)
            log_mass += float(inside.clamp(1e-12, 1.0).log().sum())
        return rank, log_rank, mass, log_mass


def score_rows_alone(learner: PPOLearner, policy: TokenPolicy, batch: DiagnosedBatch) -> TokenDistributions:
    """Score each row alone with the language model: without padding, masks or packing, some positions at a time."""

    def iterate() -> Distributions:
        masks = batch.masks or [torch.ones(len(response), dtype=torch.bool) for response in batch.responses]
        for prompt, response, mask in zip(batch.prompts, batch.responses, masks, strict=True):
            prompt, response = (tokens.to(learner.current_device) for tokens in (prompt, response))
            for rows, call in _calls(policy, prompt, response, learner.limits.vocab_size or 1):
                with torch.no_grad(), EvalMode(policy), learner.accelerator.autocast():
                    logits = call()
                is_action = mask[rows].to(logits.device)
                size = max(1, CHUNK_LOGITS // logits.shape[-1])
                for chunk, tokens in zip(
                    logits[is_action].split(size), response[rows][is_action].split(size), strict=True
                ):
                    yield (chunk.float() / policy.temperature).log_softmax(dim=-1), tokens

    return TokenDistributions.of(iterate)


def _calls(
    policy: TokenPolicy, prompt: Int[Tensor, " prompt"], response: Int[Tensor, " response"], vocabulary: int
) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
    """Slices of the response, each with a function that computes the logits there, [tokens, vocab]."""
    model: Any = policy.language_model
    if model.config.is_encoder_decoder:
        decoder_ids = torch.cat([response.new_tensor([decoder_start_token(model)]), response[:-1]])[None]
        yield slice(None), lambda: model(input_ids=prompt[None], decoder_input_ids=decoder_ids).logits[0]
        return
    can_select = "logits_to_keep" in inspect.signature(model.forward).parameters
    size = max(1, MAX_LOGITS // vocabulary) if can_select else len(response)
    for start in range(0, len(response), size):
        end = min(start + size, len(response))
        yield (
            slice(start, end),
            partial(_last_logits, model, torch.cat([prompt, response[: end - 1]]), end - start, can_select),
        )


def _last_logits(model: Any, ids: Tensor, count: int, can_select: bool) -> Tensor:
    keep = {"logits_to_keep": count} if can_select else {}
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **keep).logits
    return logits[0, -count:]


def _statistics(rows: Float[Tensor, "chunk vocab"], tokens: Int[Tensor, " chunk"]) -> tuple[Tensor, ...]:
    """The fields of `TokenDistributions` for one chunk of tokens."""
    chosen = rows.gather(1, tokens[:, None])
    p, finite = rows.exp(), rows.clamp(min=-1e4)  # 0 x -inf is nan
    expected = (p * finite).sum(dim=1)
    variance = (p * (finite - expected[:, None]).square()).sum(dim=1)
    likelier = rows > chosen
    mass_above = p.masked_fill(~likelier, 0.0).sum(dim=1)
    return chosen.squeeze(1), expected, variance, likelier.sum(dim=1) + 1, mass_above
