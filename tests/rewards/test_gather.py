"""One request about everybody's samples gives what a request from each would have given."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo.rewards.gather import concatenate_requests, select_scores
from rlhf_ppo.rewards.sources import RewardRequest, score_batch
from tests.support.tiny_run import config, share_of_e, trainer

REQUESTS = [
    RewardRequest(prompts=["a", "b"], responses=["xe", ""], columns={"label": [1, 2]}, response_lengths=[3, 1]),
    RewardRequest(prompts=["c"], responses=["eeee"], columns={"label": [3]}, response_lengths=[5]),
]


def a_number_a_token(prompts: Sequence[str], responses: Sequence[str], label: Sequence[int]) -> list[Any]:
    lengths = {"xe": 3, "": 1, "eeee": 5}
    return [
        None if prompt == "b" else [float(label[row])] * lengths[responses[row]] for row, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("source", [a_number_a_token, share_of_e])
def test_each_part_of_the_answer_to_all_is_the_answer_to_its_request(source: Any) -> None:
    everyones = score_batch({"own": source}, concatenate_requests(REQUESTS))
    for rows, request in zip((range(2), range(2, 3)), REQUESTS, strict=True):
        own, expected = select_scores(everyones, rows, request), score_batch({"own": source}, request)
        assert_close(own.scores, expected.scores)
        assert torch.equal(own.skipped, expected.skipped)
        assert_close(own.per_source["own"], expected.per_source["own"], equal_nan=True)


def test_on_one_process_once_is_each() -> None:
    each = trainer().train(share_of_e, config(iterations=1)).history[0]
    once = trainer().train(share_of_e, config(iterations=1, reward_calls="once")).history[0]
    assert once["env/reward_mean"] == each["env/reward_mean"] and once["objective/kl"] == each["objective/kl"]


def test_another_word_for_who_asks_is_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="reward_calls"):
        config(reward_calls="twice")
