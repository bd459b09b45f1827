"""Objectives through a whole language model in float64, against finite differences of their value."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import GRPO, GSPO, DivergenceMask, PPOClip
from rlhf_ppo.algorithms.objectives import (
    clipped_surrogate,
    kl_penalized_surrogate,
    mean_over_sequences,
    sequence_surrogate,
    total_objective,
    with_reference_kl,
)
from rlhf_ppo.batch import PolicyOutput, TokenInputs, TrainBatch, pad_rows
from rlhf_ppo.models.lm_head import OldPolicyStates
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.updates import Objective
from rlhf_ppo.updates.objective import LossTerms
from rlhf_ppo.updates.token_loss_gradients import token_loss_gradients
from tests.support.tiny_models import tiny_gpt2

VOCAB = 11


def policy(seed: int) -> TokenPolicy:
    model = tiny_gpt2(vocab_size=VOCAB, n_layer=1, n_embd=8, n_positions=16, seed=seed, dtype=torch.float64)
    return TokenPolicy(model, chunk_size=3)


def batch(old: TokenPolicy, reference: TokenPolicy) -> TrainBatch:
    """Ragged responses of a policy that has moved since, with a token of somebody else's in the middle."""
    generator = torch.Generator().manual_seed(5)
    responses = [torch.randint(0, VOCAB, (length,), generator=generator) for length in (1, 4, 3, 5)]
    inputs = TokenInputs(prompts=[torch.tensor([2, 3 + row]) for row in range(4)], responses=responses)
    mask = pad_rows([torch.ones(len(response)) for response in responses]).bool()
    mask[1, 1] = False
    with torch.no_grad():
        logprobs, ref_logprobs = old(inputs).logprobs, reference(inputs).logprobs
    advantages = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
    zeros = torch.zeros_like(logprobs)
    return TrainBatch(
        inputs=inputs, mask=mask, logprobs=logprobs, values=zeros, advantages=advantages, returns=zeros,
        ref_logprobs=ref_logprobs, reference_kl_coef=0.3, old_states=old.snapshot(inputs),
    )  # fmt: skip


CLIP = PPOClip(clip_low=0.1, clip_high=0.4, dual_clip=1.5)
TERMS: dict[str, Objective] = {
    "entropy": total_objective(clipped_surrogate(PPOClip(clip_low=0.9, clip_high=9.0)), critic=None, ent_coef=0.7),
    "asymmetric clip": total_objective(
        clipped_surrogate(PPOClip(clip_low=0.05, clip_high=0.5)), critic=None, ent_coef=0.0
    ),
    "dual clip": total_objective(clipped_surrogate(CLIP), critic=None, ent_coef=0.1),
    "divergence mask": total_objective(
        clipped_surrogate(GRPO(divergence=DivergenceMask(threshold=0.02))), critic=None, ent_coef=0.0
    ),
    "sequence ratio": mean_over_sequences(
        total_objective(sequence_surrogate(GSPO(clip_low=0.1, clip_high=0.1)), critic=None, ent_coef=0.0)
    ),
    "good examples": total_objective(clipped_surrogate(CLIP), critic=None, ent_coef=0.0),
    "sequence mean": mean_over_sequences(total_objective(clipped_surrogate(CLIP), critic=None, ent_coef=0.2)),
    "k2 in the loss": total_objective(with_reference_kl(clipped_surrogate(CLIP), "k2"), critic=None, ent_coef=0.0),
    "k3 in the loss": total_objective(with_reference_kl(clipped_surrogate(CLIP), "k3"), critic=None, ent_coef=0.0),
    "full KL in the loss": total_objective(
        with_reference_kl(clipped_surrogate(CLIP), "full"), critic=None, ent_coef=0.0
    ),
    "exact KL to the old policy": total_objective(kl_penalized_surrogate(2.0), critic=None, ent_coef=0.0),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_of_an_objective_is_its_slope(name: str) -> None:
    """Along a random direction in the space of all weights: (L(θ + hv) - L(θ - hv)) / 2h = ∇L · v."""
    new, old, reference = policy(0), policy(1), policy(2)
    with torch.no_grad():  # the old policy stands near the new one
        for mine, theirs in zip(new.parameters(), old.parameters(), strict=True):
            theirs.copy_(mine + 0.1 * theirs)
    data = batch(old, reference)
    arguments: dict[str, Any] = {"old": OldPolicyStates(old.copy_head(), data.old_states)} if "old" in name else {}
    arguments |= {"reference": reference} if "full" in name else {}
    count = data.mask.any(1).sum() if "sequence" in name else data.mask.sum()
    if name == "sequence ratio":  # its value reads one advantage per response
        data = replace(data, advantages=data.advantages.sum(1, keepdim=True) * data.mask)
    if name == "good examples":
        data = replace(data, nll_weights=data.advantages.abs())

    def loss() -> Tensor:
        return TERMS[name](new(data.inputs, with_entropy=True, **arguments), data, count).loss

    parameters = list(new.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True) if g is not None)
    values = []
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=sign * 1e-6)
            values.append(loss())
    assert abs(float(slope)) > 1e-3
    assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_only_objectives_that_use_the_entropy_are_told_it_beforehand() -> None:
    """Whether it has a gradient or not."""
    data = batch(policy(1), policy(2))

    def told(given: Objective) -> bool:
        return token_loss_gradients(given, data, data.mask.sum()).reads_entropy

    def beside(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> LossTerms:
        terms = TERMS["asymmetric clip"](output, batch, count)
        assert output.entropy is not None
        return replace(terms, loss=terms.loss * output.entropy.detach().mean())

    assert told(TERMS["entropy"]) and told(TERMS["dual clip"]) and told(beside)
    assert not told(TERMS["asymmetric clip"]) and not told(TERMS["k3 in the loss"])


def test_the_exact_divergences_are_those_of_the_plain_logits() -> None:
    new, old, reference = policy(0), policy(1), policy(2)
    data = batch(old, reference)
    with torch.no_grad():
        output = new(data.inputs, reference=reference, old=OldPolicyStates(old.copy_head(), data.old_states))
        for row, (prompt, response) in enumerate(zip(data.inputs.prompts, data.inputs.responses, strict=True)):  # type: ignore[attr-defined]
            tokens = torch.cat([prompt, response])[None]
            p, q, o = (m.model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (new, reference, old))
            length = len(response)
            assert_close(output.reference_kl[row, :length], (p.exp() * (p - q)).sum(-1))
            assert_close(output.old_kl[row, :length], (o.exp() * (o - p)).sum(-1))
            assert (output.reference_kl[row, length:] == 0).all()
