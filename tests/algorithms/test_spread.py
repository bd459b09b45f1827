"""Units of the advantages: equal returns have no standard deviation to divide by, and the KL follows the rewards."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_ppo import GRPO, MovingMean, Reinforce, ReinforcePlusPlus
from rlhf_ppo.functional import whitening_statistics
from tests.support.tiny_run import SAMPLING, config, trainer

IN_LOSS: dict[str, Any] = {"kl_placement": "loss", "kl_penalty": "mse", "adap_kl_ctrl": False, "init_kl_coef": 0.25}
PAIRS = replace(SAMPLING, num_return_sequences=2)


def solved(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
    """Every response is right; the mean of such numbers in float32 is another number."""
    return [0.7] * len(responses)


def length(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize("group_baseline", [False, True])
def test_a_batch_of_equal_scores_leaves_the_weight_of_the_kl_in_the_loss(group_baseline: bool) -> None:
    own = trainer(algorithm=ReinforcePlusPlus(group_baseline=group_baseline), **IN_LOSS)
    own.train(solved, replace(config(iterations=1), sampling=PAIRS))
    assert own.last_batch is not None
    assert own.last_batch[0].reference_kl_coef == 0.25


@pytest.mark.parametrize(("baseline", "advantage"), [(None, 0.7), (MovingMean(decay=0.5), 0.2)])
def test_advantages_of_equal_scores_are_their_distance_from_the_baseline(baseline: Any, advantage: float) -> None:
    """They were 7,000 and 2,000; the moving mean is 0.5 here."""
    own = trainer(algorithm=Reinforce(baseline=baseline), init_kl_coef=0.0)
    if baseline is not None:
        own.train(lambda *, responses, **_: [0.5] * len(responses), config(iterations=1))
    own.train(solved, config(iterations=1))
    assert own.last_batch is not None
    batch = own.last_batch[0]
    assert torch.allclose(batch.advantages[batch.mask], torch.tensor(advantage))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-3, -7e5])
def test_whitening_divides_equal_values_by_nothing(value: float) -> None:
    mean, scale = whitening_statistics(torch.full((300, 41), value), torch.rand(300, 41) > 0.1)
    assert torch.allclose(mean, torch.tensor(value))
    assert float(scale) == 1.0


def test_whitened_rewards_take_the_kl_in_the_loss_with_them() -> None:
    """With one token each, the advantages are whitened anyway, so nothing may depend on the option."""
    batches = []
    for whiten_rewards in (False, True):
        own = trainer(algorithm=ReinforcePlusPlus(), whiten_rewards=whiten_rewards, **IN_LOSS)
        own.train(length, replace(config(iterations=1), sampling=replace(SAMPLING, max_new_tokens=1)))
        assert own.last_batch is not None
        batches.append(own.last_batch[0])
    assert torch.allclose(batches[0].advantages, batches[1].advantages, atol=1e-5)
    assert batches[1].reference_kl_coef == pytest.approx(batches[0].reference_kl_coef, rel=1e-5)
    assert batches[0].reference_kl_coef != pytest.approx(0.25, rel=0.01)


def test_whitened_rewards_of_other_algorithms_do_not_depend_on_the_padding() -> None:
    """Each token's reward keeps the mean, so equal scores differ by the number of tokens, and by nothing else."""
    own = trainer(algorithm=GRPO(normalize_std=False), whiten_rewards=True, init_kl_coef=0.0)
    own.train(solved, replace(config(iterations=1), sampling=replace(PAIRS, stop_token_ids=tuple(range(99)))))
    assert own.last_batch is not None
    batch = own.last_batch[0]
    lengths, advantages = batch.mask.sum(1).view(-1, 2), batch.advantages[:, 0].view(-1, 2)
    differs = lengths[:, 0] != lengths[:, 1]
    per_token = (advantages.diff() / lengths.diff())[differs]
    assert len(per_token) > 1
    assert torch.allclose(per_token, per_token[:1], rtol=1e-4)
