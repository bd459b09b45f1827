"""The settings of the policy loss: each changes what is learned, does what it says, and goes on after a checkpoint."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from rlhf_ppo import (
    CISPO,
    GRPO,
    GSPO,
    RLOO,
    AdaptiveEntropy,
    AlgorithmConfig,
    ClipCovariance,
    PositiveNLL,
    PPOClip,
    PPOTrainer,
    TopEntropyTokens,
)
from rlhf_ppo.algorithms.adaptive_entropy import AdaptiveEntropyUpdate
from rlhf_ppo.algorithms.token_selection import TokenSelectionUpdate
from tests.classic.test_classic import policy, trainer_of, weights

QUERIES = [torch.tensor([5, 6])] * 4
RESPONSES = [torch.tensor(row) for row in ([10, 11, 12], [13, 14], [15, 16, 17, 18], [19, 20, 21])]
MASKS = [torch.tensor(row) for row in ([1, 0, 1], [1, 1], [1, 1, 1, 1], [1, 1, 1])]
SCORES = [torch.tensor(score) for score in (1.0, 0.0, 0.4, -1.0)]


def stepped(algorithm: AlgorithmConfig, *, steps: int = 1, **settings: Any) -> PPOTrainer:
    """A trainer after steps that move the policy far."""
    model = policy()
    model.pretrained_model.transformer.wte.weight.data.mul_(3)  # a fresh tiny model is uniform: no entropy differs
    defaults: dict[str, Any] = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 3, "learning_rate": 3e-4}
    defaults |= {"kl_penalty": "none", "init_kl_coef": 0.0}
    trainer = trainer_of(model, **defaults | settings, arguments={"algorithm": algorithm}, ratio_threshold=1e9)
    for _ in range(steps):
        trainer.step(QUERIES, RESPONSES, SCORES, MASKS, group_size=2)
    return trainer


DRAWN = ClipCovariance(share=0.5, low=0.0, high=9.0)
WEIGHT = AdaptiveEntropy(target=9.0)
GOOD = PositiveNLL()
WEIGHTS = CISPO(max_weight=9.0)


PAIRS: list[tuple[AlgorithmConfig, AlgorithmConfig]] = [
    (GSPO(), GSPO(clip_low=0.9)),
    (GSPO(), GSPO(clip_high=0.9)),
    (GSPO(), GSPO(normalize_std=False)),
    (GSPO(), GSPO(ent_coef=0.1)),
    (GRPO(clip_low=0.9, clip_high=9.0), GRPO(cispo=WEIGHTS)),
    (GRPO(cispo=WEIGHTS), GRPO(cispo=replace(WEIGHTS, max_weight=1.05))),
    (GRPO(cispo=WEIGHTS), GRPO(cispo=replace(WEIGHTS, min_weight=0.95))),
    (GRPO(cispo=CISPO(max_weight=1.05)), GRPO(cispo=CISPO(max_weight=1.05, drop=True))),
    (RLOO(), RLOO(positive_nll=GOOD)),
    (RLOO(positive_nll=GOOD), RLOO(positive_nll=replace(GOOD, coef=0.5))),
    (RLOO(positive_nll=GOOD), RLOO(positive_nll=replace(GOOD, threshold=0.5))),
    (PPOClip(), PPOClip(tokens=TopEntropyTokens())),
    (PPOClip(tokens=TopEntropyTokens()), PPOClip(tokens=TopEntropyTokens(share=0.5))),
    (PPOClip(), PPOClip(tokens=DRAWN)),
    (PPOClip(tokens=DRAWN), PPOClip(tokens=replace(DRAWN, share=0.2))),
    (PPOClip(tokens=DRAWN), PPOClip(tokens=replace(DRAWN, low=1.0))),
    (PPOClip(tokens=DRAWN), PPOClip(tokens=replace(DRAWN, high=0.1))),
    (PPOClip(), PPOClip(adaptive_entropy=WEIGHT)),
    (PPOClip(adaptive_entropy=WEIGHT), PPOClip(adaptive_entropy=replace(WEIGHT, target=0.1))),
    (PPOClip(adaptive_entropy=WEIGHT), PPOClip(adaptive_entropy=replace(WEIGHT, step=0.1))),
    (PPOClip(adaptive_entropy=WEIGHT), PPOClip(adaptive_entropy=replace(WEIGHT, start=0.1))),
    (PPOClip(adaptive_entropy=WEIGHT), PPOClip(adaptive_entropy=replace(WEIGHT, largest=0.001))),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_setting_changes_what_is_learned(one: AlgorithmConfig, other: AlgorithmConfig) -> None:
    """The weight of the entropy acts from the second update on."""
    steps = 2 if "AdaptiveEntropy" in str(other) else 1
    assert not torch.equal(weights(stepped(one, steps=steps)), weights(stepped(other, steps=steps)))


def differing(one: Any, other: Any) -> set[tuple[type, str]]:
    """The fields that differ, within the settings that both have."""
    found: set[tuple[type, str]] = set()
    for item in fields(one):
        mine, theirs = getattr(one, item.name), getattr(other, item.name)
        if mine != theirs:
            nested = is_dataclass(mine) and type(mine) is type(theirs)
            found |= differing(mine, theirs) if nested else {(type(one), item.name)}
    return found


@pytest.mark.parametrize("kind", [GSPO, CISPO, PositiveNLL, AdaptiveEntropy, TopEntropyTokens, ClipCovariance])
def test_no_setting_is_left_out_of_the_pairs(kind: type[Any]) -> None:
    tried = set().union(*(differing(one, other) for one, other in PAIRS))
    assert {name for cls, name in tried if cls is kind} == {item.name for item in fields(kind)}


def test_a_selection_of_all_tokens_changes_nothing() -> None:
    plain = weights(stepped(PPOClip()))
    assert torch.equal(plain, weights(stepped(PPOClip(tokens=TopEntropyTokens(share=1.0)))))
    nobody = ClipCovariance(share=1.0, low=1e6, high=1e7)
    assert torch.equal(plain, weights(stepped(PPOClip(tokens=nobody))))


def test_only_the_tokens_of_largest_entropy_keep_their_advantage() -> None:
    """3 of 11 own tokens are the ⌈0.2 · 11⌉ of largest entropy, which the policy itself tells."""
    trainer = stepped(PPOClip(tokens=TopEntropyTokens(share=0.2)), ppo_epochs=1, mini_batch_size=4)
    assert trainer.metrics["ppo/policy/selected_share"] == pytest.approx(3 / 11)
    update = trainer.algorithm.update
    assert isinstance(update, TokenSelectionUpdate) and trainer.last_batch is not None
    batch = trainer.last_batch[0]
    with torch.no_grad():
        entropy = trainer.accelerator.unwrap_model(trainer.policy)(batch.inputs, with_entropy=True).entropy
    assert torch.equal(update._entropy(batch)[batch.mask], entropy[batch.mask])


def test_the_drawn_tokens_are_within_the_bounds_and_as_many_as_asked() -> None:
    """⌊0.2 · 11⌋ = 2 of the tokens with a positive covariance lose their advantage."""
    trainer = stepped(PPOClip(tokens=ClipCovariance(share=0.2, low=0.0, high=99.0)))
    assert trainer.metrics["ppo/policy/selected_share"] == pytest.approx(9 / 11)


def test_the_weight_of_the_entropy_rises_below_the_target_and_falls_and_rests_above() -> None:
    trainer = stepped(PPOClip(adaptive_entropy=AdaptiveEntropy(target=9.0, step=0.01, start=0.02, largest=0.04)))
    update = trainer.algorithm.update
    assert isinstance(update, AdaptiveEntropyUpdate)
    assert trainer.metrics["ppo/policy/ent_coef"] == 0.02
    assert (update.coef, update.weight) == (pytest.approx(0.03), pytest.approx(0.03))
    found = []
    for entropy in (1.0, 1.0, 9.5, 9.5, 1.0):
        update._adapt(entropy)
        found.append((round(update.coef, 3), round(update.weight, 3)))
    assert found == [(0.04, 0.04), (0.04, 0.04), (0.03, 0.0), (0.02, 0.0), (0.03, 0.03)]


@pytest.mark.parametrize(
    "algorithm",
    [
        PPOClip(tokens=ClipCovariance(share=0.3, low=0.0, high=99.0)),
        PPOClip(adaptive_entropy=AdaptiveEntropy(target=9.0)),
    ],
    ids=["draws", "weight"],
)
def test_draws_and_weight_go_on_from_their_state(algorithm: AlgorithmConfig) -> None:
    update = stepped(algorithm, steps=2).algorithm.update
    fresh = stepped(algorithm, steps=0).algorithm.update
    assert fresh.state_dict() != update.state_dict()
    fresh.load_state_dict(update.state_dict())
    assert fresh.state_dict() == update.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CISPO(max_weight=0.9), "min_weight <= 1 <= max_weight"),
        (lambda: PositiveNLL(coef=-0.1), "good responses would be unlearned"),
        (lambda: AdaptiveEntropy(target=0.0), "would not move"),
        (lambda: TopEntropyTokens(share=0.0), "no token would be left"),
        (lambda: ClipCovariance(low=2.0, high=1.0), "no token could be drawn"),
        (lambda: PPOClip(ent_coef=0.1, adaptive_entropy=AdaptiveEntropy(target=1.0)), "it would be ignored"),
        (lambda: GSPO(clip_low=1.0), "which must contain 1"),
    ],
)
def test_settings_that_cannot_act_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_one_replacement_of_the_clip_at_a_time() -> None:
    from rlhf_ppo import DivergenceMask

    with pytest.raises(ValueError, match="one replacement of ratio clipping"):
        GRPO(divergence=DivergenceMask(threshold=0.1), cispo=CISPO(max_weight=2.0))
