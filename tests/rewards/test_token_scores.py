"""Scores of a few tokens: in `step()`, from a reward source, and in the rewards that come of them."""

from typing import Any

import pytest
import torch

from rlhf_ppo.rewards.sources import RewardRequest, score_batch
from rlhf_ppo.rewards.token_scores import token_scores


def test_each_score_stands_at_its_token_and_negative_positions_count_from_the_end() -> None:
    assert token_scores({0: 1.0, -1: 0.5}, 4).tolist() == [1.0, 0.0, 0.0, 0.5]
    assert token_scores({}, 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sparse", [{4: 1.0}, {-5: 1.0}, {3: 1.0, -1: 2.0}])
def test_a_position_outside_or_named_twice_is_refused(sparse: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="response of 4"):
        token_scores(sparse, 4)


def request() -> RewardRequest:
    return RewardRequest(prompts=["a", "b"], responses=["cde", "f"], response_lengths=[3, 1])


def test_a_reward_source_may_score_some_tokens_beside_others_that_score_all() -> None:
    sources: dict[str, Any] = {
        "sparse": lambda **_: [{1: 2.0}, {-1: 1.0}], "whole": lambda **_: [10.0, 20.0],
    }  # fmt: skip
    found = score_batch(sources, request())
    assert found.per_token is not None
    assert found.per_token.tolist() == [[0.0, 2.0, 10.0], [21.0, 0.0, 0.0]]
    assert found.total.tolist() == [12.0, 21.0]


def test_a_wrong_position_names_source_and_sample() -> None:
    with pytest.raises(ValueError, match=r"'sparse', sample 1: expected positions"):
        score_batch({"sparse": lambda **_: [{0: 1.0}, {7: 1.0}]}, request())
    assert torch.isfinite(token_scores({0: 1.0}, 1)).all()
