"""Networks by hand, and what the updates ask of a policy."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo.algorithms import GAE, TRPO
from rlhf_ppo.algorithms.build import build_algorithm
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.control import Categorical, ControlInputs, ControlPolicy, Gaussian
from rlhf_ppo.control.policy import mlp
from rlhf_ppo.functional import flatten
from rlhf_ppo.updates import MinibatchConfig, TrustRegionUpdate


def policy(kind: str) -> ControlPolicy:
    torch.manual_seed(0)
    distribution, size = (Gaussian(2, log_std=-0.3), 2) if kind == "joints" else (Categorical(3), 3)
    return ControlPolicy(4, distribution, size, hidden=(5,)).double()


def batch(own: ControlPolicy, rows: int = 12) -> TrainBatch:
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(rows, 1, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        actions = own.act(observations, own.distribution.noise((rows, 1), generator).double())
        inputs = ControlInputs(observations=observations, actions=actions)
        output = own(inputs)
    advantages, returns = (torch.randn(rows, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(rows, 1, dtype=torch.bool)
    mask[4] = False
    return TrainBatch(
        inputs=inputs, mask=mask, logprobs=output.logprobs, values=output.values[:, :1], advantages=advantages,
        returns=returns,
    )  # fmt: skip


def natural(own: ControlPolicy, **settings: float) -> TrustRegionUpdate:
    built = build_algorithm(
        TRPO(gae=GAE(gamma=0.99), **settings), policy=own, optimizer=torch.optim.Adam(own.parameters()), seed=0,
        accelerator=Accelerator(cpu=True), minibatch_config=lambda: MinibatchConfig(epochs=2, minibatch_size=4),
    ).update  # fmt: skip
    assert isinstance(built, TrustRegionUpdate)
    return built


def test_layers_are_orthogonal_with_their_gains_and_without_biases() -> None:
    """W Wᵀ = gain² I: 2 in hidden layers, 0.01² in the last; 64 outputs cannot be orthogonal in 11 inputs, so WᵀW."""
    network = mlp([11, 64, 64, 3], last_gain=0.01)
    first, second, last = (layer for layer in network if isinstance(layer, torch.nn.Linear))
    assert [tuple(layer.weight.shape) for layer in (first, second, last)] == [(64, 11), (64, 64), (3, 64)]
    assert_close(first.weight.T @ first.weight, 2 * torch.eye(11), atol=1e-5, rtol=0)
    assert_close(second.weight @ second.weight.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
    assert_close(last.weight @ last.weight.T, 1e-4 * torch.eye(3), atol=1e-8, rtol=0)
    assert not any(bool(layer.bias.any()) for layer in (first, second, last))


def test_actor_and_critic_share_nothing() -> None:
    own = policy("joints")
    own(batch(own).inputs).values.sum().backward()
    assert all(parameter.grad is None for parameter in own.actor.parameters())
    assert [name for name, item in own.named_parameters() if item.grad is not None] == [
        "critic.0.weight", "critic.0.bias", "critic.2.weight", "critic.2.bias",
    ]  # fmt: skip


def test_choices_are_drawn_from_the_softmax_of_the_logits() -> None:
    """Of 40 000 draws each share is within five standard errors."""
    logits = torch.tensor([1.0, 0.0, -1.0])
    distribution = Categorical(3)
    noise = distribution.noise((40_000,), torch.Generator().manual_seed(0))
    shares = torch.bincount(distribution.sample(logits, noise)[:, 0], minlength=3) / 40_000
    expected = logits.softmax(0)
    assert bool(((shares - expected).abs() < 5 * (expected * (1 - expected) / 40_000).sqrt()).all())
    assert distribution.mode(logits).tolist() == [0]


def test_joints_are_drawn_with_the_mean_and_spread_of_the_policy() -> None:
    distribution = Gaussian(2, log_std=-1.0)
    mean = torch.tensor([0.5, -0.5])
    drawn = distribution.sample(mean, distribution.noise((40_000,), torch.Generator().manual_seed(0)))
    assert_close(drawn.mean(0), mean, atol=0.01, rtol=0)
    assert_close(drawn.std(0), torch.full((2,), -1.0).exp(), atol=0.01, rtol=0)


@pytest.mark.parametrize("kind", ["joints", "choices"])
def test_fisher_products_are_the_hessian_of_the_mean_divergence(kind: str) -> None:
    """Over the steps of the mask, by finite differences of KL(π_old || π_θ) at θ_old along a random direction."""
    own = policy(kind)
    update, data = natural(own, damping=0.0), batch(own)
    product = update.fisher_product(data, torch.arange(12))
    vector = torch.randn(len(flatten(update.parameters)), dtype=torch.float64)
    expected = float(vector @ product(vector))
    start, step = flatten(update.parameters).detach().clone(), 1e-4
    (distance,) = own.kl_from_current([data.inputs])

    def divergence(at: Tensor) -> float:
        with torch.no_grad():
            update._write(at)
            return float(distance()[data.mask].mean())

    quadratic = (divergence(start + step * vector) + divergence(start - step * vector)) / step**2
    assert expected == pytest.approx(quadratic, rel=1e-4)


@pytest.mark.parametrize("kind", ["joints", "choices"])
def test_a_trust_region_step_keeps_its_promise_and_fits_the_critic_alone_afterwards(kind: str) -> None:
    """The exact divergence is measured again from outputs, not by the update."""
    own = policy(kind)
    data = batch(own)
    with torch.no_grad():
        before = own.distribution.kl_from_current(own.actor(data.inputs.observations))  # type: ignore[attr-defined]
        error = (own.values(data.inputs.observations) - data.returns)[data.mask].square().mean()  # type: ignore[attr-defined]
    record = natural(own, max_kl=0.02, curvature_fraction=1.0)(data)
    with torch.no_grad():
        kl = float(before(own.actor(data.inputs.observations))[data.mask].mean())  # type: ignore[attr-defined]
        fitted = (own.values(data.inputs.observations) - data.returns)[data.mask].square().mean()  # type: ignore[attr-defined]
    assert record.extras["policy/accepted"] == 1.0
    assert record.extras["policy/reached_kl"] == pytest.approx(kl, rel=1e-6)
    assert 0.01 < kl <= 0.03
    assert fitted < error
