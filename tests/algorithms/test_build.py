"""Every algorithm and option through the trainer: what must hold at run time, and what must not move."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from rlhf_ppo import (
    CISPO,
    GAE,
    GRPO,
    GSPO,
    RLOO,
    TRPO,
    AdaptiveEntropy,
    AlgorithmConfig,
    ClipCovariance,
    Critic,
    DivergenceMask,
    LearnedValue,
    MovingMean,
    PositiveNLL,
    PPOClip,
    PPOConfig,
    PPOPenalty,
    Reinforce,
    ReinforcePlusPlus,
    TopEntropyTokens,
    TrainConfig,
)
from rlhf_ppo.algorithms.baselines import MovingBaseline
from rlhf_ppo.algorithms.build import build_algorithm
from rlhf_ppo.algorithms.update_factory import UpdateFactory
from rlhf_ppo.samplers.base import SamplingConfig
from tests.loop.test_training import config, parameters, share_of_e, trainer

EVERY: dict[str, AlgorithmConfig] = {
    "ppo-clip": PPOClip(dual_clip=3.0, gae=GAE(lam=0.9, value_lam=1.0, length_alpha=0.5), ent_coef=0.01),
    "dppo": PPOClip(divergence=DivergenceMask(kind="kl", threshold=0.05)),
    "ppo-penalty": PPOPenalty(),
    "ppo-penalty, exact": PPOPenalty(exact=True),
    "trpo": TRPO(),
    "reinforce": Reinforce(),
    "reinforce, none": Reinforce(baseline=None, normalize_std=False),
    "reinforce, moving": Reinforce(baseline=MovingMean(decay=0.5)),
    "reinforce, value": Reinforce(baseline=LearnedValue()),
    "reinforce++": ReinforcePlusPlus(),
    "reinforce++, groups": ReinforcePlusPlus(group_baseline=True),
    "rloo": RLOO(),
    "grpo": GRPO(sequence_mean=True),
    "gspo": GSPO(),
    "cispo": PPOClip(cispo=CISPO(max_weight=2.0), positive_nll=PositiveNLL()),
    "top entropy": GRPO(tokens=TopEntropyTokens(share=0.3), adaptive_entropy=AdaptiveEntropy(target=9.0)),
    "clip covariance": RLOO(tokens=ClipCovariance(share=0.3, low=-1.0)),
}
SIX = ("ppo-clip", "ppo-penalty", "trpo", "reinforce", "rloo", "grpo")


def run(algorithm: AlgorithmConfig, *, iterations: int = 2, **settings: Any) -> Any:
    own = trainer(algorithm=algorithm, **settings)
    groups = SamplingConfig(max_new_tokens=6, num_return_sequences=2)
    return own, own.train(share_of_e, TrainConfig(iterations=iterations, sampling=groups, progress=False))


@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_runs_in_the_same_loop_and_moves_the_weights(name: str) -> None:
    fresh = parameters(trainer())
    own, state = run(EVERY[name])
    assert torch.isfinite(parameters(own)).all()
    assert not torch.equal(fresh, parameters(own))
    assert state.history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert state.history[0]["objective/kl_k3"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", SIX)
def test_before_the_first_step_every_ratio_is_one_and_every_kl_zero(name: str) -> None:
    """One pass, one optimizer step: all statistics of the update are those of the policy that acted.

    TRPO's are of the policy behind its step, which is therefore made as short as can be.
    """
    algorithm = TRPO(max_kl=1e-14) if name == "trpo" else EVERY[name]
    _, state = run(algorithm, iterations=1, ppo_epochs=1, mini_batch_size=8)
    first = state.history[0]
    assert first["ppo/policy/clipfrac"] == 0.0
    assert first["ppo/policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    for kl in ("ppo/policy/approxkl", "ppo/policy/policykl", "objective/kl", "objective/kl_k3"):
        assert first[kl] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    "placement, penalty",
    [
        *(pytest.param("loss", kind, marks=pytest.mark.slow) for kind in ("mse", "k3", "full")),
        ("split", "full"),
    ],
)
def test_a_kl_in_the_loss_holds_the_policy_where_no_reward_pulls(placement: Any, penalty: Any) -> None:
    """With a weight of 1 a nat against a reward of at most 1 a response, it stays nearer to the reference."""
    settings = {"adap_kl_ctrl": False, "learning_rate": 0.01}
    kls = []
    for coefficient in (0.0, 1.0):
        torch.manual_seed(0)
        _, state = run(
            PPOClip(), iterations=4, init_kl_coef=coefficient, kl_placement=placement, kl_penalty=penalty, **settings
        )
        kls.append(state.history[-1]["objective/kl_k3"])
    assert 0.0 <= kls[1] < 0.9 * kls[0]


@pytest.mark.parametrize(
    "placement, penalty, reason",
    [("loss", "kl", "mean zero"), ("loss", "abs", "mean zero"), ("reward", "k3", "wrong way"), ("split", "kl", "full")],
)
def test_a_kl_whose_gradient_is_wrong_is_refused_with_the_reason(placement: Any, penalty: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PPOConfig(kl_placement=placement, kl_penalty=penalty)


def test_the_full_kl_in_the_loss_needs_a_reference_of_its_own_and_whole_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = trainer()
    parts: dict[str, Any] = {
        "policy": own.policy, "optimizer": own.optimizer, "accelerator": own.accelerator, "seed": 0,
        "minibatch_config": own.config.minibatch, "reference_kl": "full",
    }  # fmt: skip
    with pytest.raises(ValueError, match="separate `ref_model`"):
        UpdateFactory(**parts, reference=None)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"FSDP.*mse"):
        UpdateFactory(**parts, reference=own._reference)
    parts["reference_kl"] = None
    with pytest.raises(ValueError, match="warmup_iterations"):
        UpdateFactory(**parts).critic_fit(None)
    with pytest.raises(ValueError, match=r"exact=True.*does not run under .*FSDP"):
        build_algorithm(PPOPenalty(exact=True), **parts)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)  # without ZeRO-3: nothing is parted
    build_algorithm(PPOPenalty(exact=True), **parts)
    UpdateFactory(**parts | {"reference_kl": "full"}, reference=own._reference)


def test_while_the_critic_warms_up_the_policy_stays_bit_for_bit_and_the_critic_learns() -> None:
    own = trainer(algorithm=PPOClip(critic=Critic(warmup_iterations=3)), learning_rate=0.01)
    policy = [parameter.clone() for parameter in own.model.pretrained_model.parameters()]
    head = own.model.v_head.summary.weight.clone()
    history = own.train(share_of_e, config(iterations=3)).history
    assert own.kl_ctl.value == own.config.init_kl_coef  # it waits, because the KL of a frozen policy says nothing
    assert all(torch.equal(a, b) for a, b in zip(policy, own.model.pretrained_model.parameters(), strict=True))
    assert not torch.equal(head, own.model.v_head.summary.weight)
    assert history[-1]["ppo/val/error"] < history[0]["ppo/val/error"]
    own.learn(own_responses(own))
    assert own.kl_ctl.value != own.config.init_kl_coef
    assert not all(torch.equal(a, b) for a, b in zip(policy, own.model.pretrained_model.parameters(), strict=True))


@pytest.mark.parametrize("placement", ["loss", "split"])
def test_the_critic_warms_up_beside_the_full_kl_in_the_loss(placement: Any) -> None:
    """The metrics of the warm-up are those of the objective, which reads both distributions of a token."""
    algorithm = PPOClip(critic=Critic(warmup_iterations=1))
    own = trainer(algorithm=algorithm, kl_penalty="full", kl_placement=placement)
    history = own.train(share_of_e, config(iterations=2)).history
    assert [row.get("ppo/val/warmup_remaining") for row in history] == [0.0, None]


def own_responses(own: Any) -> Any:
    from rlhf_ppo.batch import TokenInputs
    from rlhf_ppo.rollout.experience import Responses

    rows = torch.arange(2, 10).view(8, 1)
    inputs = TokenInputs(prompts=[torch.tensor([3, 4])] * 8, responses=list(rows))
    return Responses(inputs=inputs, mask=torch.ones(8, 1, dtype=torch.bool), scores=torch.randn(8))


def test_a_batch_is_measured_against_earlier_ones() -> None:
    """First against itself; then against 0.5 · 4 + 0.5 · 4 = 4, then against 0.5 · 4 + 0.5 · 8 = 6."""
    moving = MovingBaseline(0.5)
    assert [moving.update(mean) for mean in (4.0, 8.0, 0.0)] == [4.0, 4.0, 6.0]
    assert moving.mean == 3.0
