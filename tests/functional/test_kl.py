import itertools
import math

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil

KINDS = ("k1", "abs", "k2", "k3")


def test_estimators_by_hand() -> None:
    """log π - log π_ref = log 2: the token is twice as likely as under the reference."""
    logprobs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    expected = {"k1": math.log(2), "abs": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}
    for kind in KINDS:
        assert_close(F.kl_estimate(logprobs, ref, kind).item(), expected[kind])
    assert_close(F.kl_estimate(ref, logprobs, "k1").item(), -math.log(2))
    assert_close(F.kl_estimate(ref, logprobs, "abs").item(), math.log(2))


def test_k1_and_k3_have_the_exact_divergence_as_their_mean() -> None:
    """Enumerate the vocabulary: Σ p · estimate, no sampling noise."""
    p_logits, q_logits = numbers(0, 6), numbers(1, 6)
    p = p_logits.softmax(0)
    for kind in ("k1", "k3"):
        estimate = F.kl_estimate(p_logits.log_softmax(0), q_logits.log_softmax(0), kind)
        assert_close((p * estimate).sum(), F.categorical_kl(p_logits, q_logits))


def test_k2_as_a_loss_has_the_exact_gradient_and_k1_has_none() -> None:
    """Under tokens drawn from π: E[∇k2] = ∇KL(π || ref), E[∇k1] = 0, E[∇k3] = ∇KL(ref || π)."""
    logits, ref_logits = numbers(0, 6).requires_grad_(), numbers(1, 6)
    ref = ref_logits.log_softmax(0)

    def expected_gradient(kind: str) -> torch.Tensor:
        logprobs = logits.log_softmax(0)
        weights = logprobs.exp().detach()
        return torch.autograd.grad((weights * F.kl_estimate(logprobs, ref, kind)).sum(), logits)[0]

    (exact,) = torch.autograd.grad(F.categorical_kl(logits, ref_logits), logits)
    (reverse,) = torch.autograd.grad(F.categorical_kl(ref_logits, logits), logits)
    assert_close(expected_gradient("k2"), exact)
    assert_close(expected_gradient("k1"), torch.zeros(6, dtype=torch.float64))
    assert_close(expected_gradient("k3"), reverse)


@given(seed=seeds)
def test_k2_k3_and_abs_are_never_negative(seed: int) -> None:
    logprobs, ref = -numbers(seed, 20).abs(), -numbers(seed + 1, 20).abs()
    for kind in ("abs", "k2", "k3"):
        assert (F.kl_estimate(logprobs, ref, kind) >= 0).all()


@given(seed=seeds, shape=shapes)
def test_with_a_mask_junk_reaches_neither_the_estimate_nor_its_gradient(seed: int, shape: tuple[int, int]) -> None:
    mask = random_mask(seed, *shape)
    logprobs, ref = numbers(seed, *shape), numbers(seed + 1, *shape)
    for kind in KINDS:
        junk = spoil(logprobs, mask).requires_grad_()
        got = F.kl_estimate(junk, spoil(ref, mask), kind, mask=mask)
        assert_close(got, F.kl_estimate(logprobs, ref, kind).masked_fill(~mask, 0))
        (grad,) = torch.autograd.grad(got.sum(), junk)
        assert torch.isfinite(grad).all()
        assert (grad[~mask] == 0).all()


@given(seed=seeds)
def test_categorical_kl_equals_a_loop_over_the_vocabulary(seed: int) -> None:
    p_logits, q_logits = numbers(seed, 5), numbers(seed + 1, 5)
    p_total, q_total = (sum(math.exp(x) for x in logits.tolist()) for logits in (p_logits, q_logits))
    expected = 0.0
    for x, y in zip(p_logits.tolist(), q_logits.tolist(), strict=True):
        p, q = math.exp(x) / p_total, math.exp(y) / q_total
        expected += p * math.log(p / q)
    assert F.categorical_kl(p_logits, q_logits).item() == pytest.approx(expected, abs=1e-12)


def test_categorical_kl_with_impossible_tokens() -> None:
    """p = (½, ½, 0), q = (¼, ¾, 0): the third token is nan only to those who multiply 0 by inf."""
    p_logits = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    q_logits = torch.tensor([0.0, math.log(3), -math.inf])
    kl = F.categorical_kl(p_logits, q_logits)
    assert_close(kl.item(), 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    (grad,) = torch.autograd.grad(kl, p_logits)
    assert torch.isfinite(grad).all()
    assert F.categorical_kl(torch.zeros(3), q_logits).item() == math.inf


def test_gradients_agree_with_finite_differences() -> None:
    p, q = numbers(0, 2, 4).requires_grad_(), numbers(1, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(F.categorical_kl, (p, q))
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda p, q, kind=kind: F.kl_estimate(p, q, kind), (p, q))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_estimator_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'k1', 'abs', 'k2', 'k3', got 'full'.*categorical_kl"):
        F.kl_estimate(torch.zeros(2), torch.zeros(2), "full")  # type: ignore[arg-type]


@given(seed=seeds, shape=shapes)
def test_each_action_pays_for_the_next_state_and_the_last_for_none(seed: int, shape: tuple[int, int]) -> None:
    kl, mask = numbers(seed, *shape).abs(), random_mask(seed, *shape)
    expected = torch.zeros_like(kl)
    for row in range(shape[0]):
        ours = [step for step in range(shape[1]) if mask[row, step]]
        for here, following in itertools.pairwise(ours):
            expected[row, here] = kl[row, following]
    assert_close(F.next_state_kl(spoil(kl, mask), mask), expected)


def test_the_split_kl_has_the_exact_gradient_of_the_sequence_kl_and_k3_as_a_reward_the_wrong_one() -> None:
    """A policy with a table for each prefix, 3 tokens, 2 steps: all 9 sequences are enumerated, nothing is sampled."""
    first, second = numbers(0, 1, 3).requires_grad_(), numbers(1, 3, 3).requires_grad_()
    ref = numbers(2, 1, 3).log_softmax(-1), numbers(3, 3, 3).log_softmax(-1)
    logs = first.log_softmax(-1), second.log_softmax(-1)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    logprobs = torch.stack([torch.stack([logs[0][0, a], logs[1][a, b]]) for a, b in pairs])
    ref_logprobs = torch.stack([torch.stack([ref[0][0, a], ref[1][a, b]]) for a, b in pairs])
    weights = logprobs.sum(1).exp()
    exact = torch.autograd.grad((weights * (logprobs - ref_logprobs).sum(1)).sum(), (first, second), retain_graph=True)
    states = torch.stack(
        [torch.stack([F.categorical_kl(first[0], ref[0][0]), F.categorical_kl(second[a], ref[1][a])]) for a, _ in pairs]
    )
    mask = torch.ones(9, 2, dtype=torch.bool)

    def as_reward(reward: torch.Tensor) -> torch.Tensor:
        """Its policy-gradient loss, with the return to go."""
        to_go = reward.detach().flip(1).cumsum(1).flip(1)
        return (weights.detach() * (logprobs * to_go).sum(1)).sum()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, (first, second), retain_graph=True)])

    truth = torch.cat([x.flatten() for x in exact])
    own = (weights.detach() * states.sum(1)).sum()
    assert_close(gradient(own + as_reward(F.next_state_kl(states, mask))), truth)
    assert_close(gradient(as_reward(F.kl_estimate(logprobs, ref_logprobs, "k1"))), truth)
    wrong = gradient(as_reward(F.kl_estimate(logprobs, ref_logprobs, "k3")))
    assert torch.nn.functional.cosine_similarity(wrong, truth, dim=0) < 0
