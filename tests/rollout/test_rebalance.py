"""A process without samples gets some of the others'."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.rebalance import rebalance_empty_ranks

CPU = torch.device("cpu")


def responses(lengths: list[int], first: int, group_size: int = 1) -> Responses:
    """Rows whose tokens and scores are their numbers."""
    tokens = [torch.full((length,), first + row) for row, length in enumerate(lengths)]
    return Responses(
        inputs=TokenInputs(prompts=tokens, responses=tokens),
        mask=pad_rows([torch.ones(length) for length in lengths]).bool(),
        scores=torch.arange(first, first + len(lengths)).float(),
        group_size=group_size,
        sampler_logprobs=pad_rows([row.float() for row in tokens]),
    )


def among(parts: list[Responses | None], process: int) -> Responses:
    """What `rebalance_empty_ranks` gives to one of several processes, which all say the same things."""
    said = iter([[0 if part is None else len(part.inputs) for part in parts], parts])
    gather: Callable[[list[Any]], list[Any]] = lambda _: list(next(said))
    return rebalance_empty_ranks(parts[process], gather, process, CPU)


def test_where_everybody_has_something_nothing_moves() -> None:
    parts: list[Responses | None] = [responses([3, 1], 0), responses([2], 2)]
    assert among(parts, 1) is parts[1]


def test_every_response_is_dealt_out_once_with_all_that_belongs_to_it() -> None:
    parts: list[Responses | None] = [responses([5, 1, 2, 2], 0), None]
    given = [among(parts, process) for process in range(2)]
    assert sorted(torch.cat([share.scores for share in given]).tolist()) == [0.0, 1.0, 2.0, 3.0]
    assert sorted(sum(map(len, share.inputs.responses)) for share in given) == [5, 5]
    for share in given:
        assert share.mask.sum(dim=1).tolist() == [len(response) for response in share.inputs.responses]
        assert share.sampler_logprobs is not None
        for row, response in enumerate(share.inputs.responses):
            assert set(response.tolist()) == {int(share.scores[row])}
            assert_close(share.sampler_logprobs[row, : len(response)], response.float())


def test_groups_stay_together() -> None:
    parts: list[Responses | None] = [None, responses([1, 4, 3, 3], 0, group_size=2)]
    assert sorted(among(parts, process).scores.tolist() for process in range(2)) == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize("process", [0, 1])
def test_too_few_responses_are_an_error_on_every_process(process: int) -> None:
    with pytest.raises(ValueError, match="skipped all but 1 samples of the batch, 2 processes need 1 each"):
        among([responses([3], 0), None], process)
