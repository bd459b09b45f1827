"""Redistribute responses when reward sources skipped all samples of a process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.batch import episode_of_rows
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.updates.sharding import assign_rows


def rebalance_empty_ranks(
    responses: Responses | None, gather: Callable[[list[Any]], list[Any]], rank: int, device: torch.device
) -> Responses:
    """Return this process's responses or, if any process has none, its share of all responses. Collective.

    An update assigns minibatches to processes anew, so where a response is changes no result.

    Args:
        responses: This process's responses; None: it has none.
        gather: Concatenates the lists of all processes, in rank order.

    Raises:
        ValueError: Fewer responses (or groups) are left than processes; raised on every process.
    """
    counts = gather([0 if responses is None else len(responses.inputs)])
    if all(counts):
        assert responses is not None
        return responses
    on_cpu = None if responses is None else responses.to(torch.device("cpu"))
    non_empty: list[Responses] = [batch for batch in gather([on_cpu]) if batch is not None]
    all_responses = non_empty[0].joined(non_empty[1:]) if non_empty else None
    unit = torch.zeros(0, dtype=torch.long) if all_responses is None else _units(all_responses)
    if all_responses is None or len(unit.unique()) < len(counts):
        group_size = 1 if all_responses is None else all_responses.group_size
        raise ValueError(
            f"reward sources skipped all but {sum(counts)} samples of the batch, {len(counts)} processes need "
            f"{group_size} each at least: there is nothing to learn from. Check for which samples the sources return "
            "None, or raise batch_size."
        )
    row_costs = all_responses.inputs.costs()
    costs = row_costs.new_zeros(len(unit.unique())).index_add(0, unit, row_costs)
    rows = torch.isin(unit, assign_rows(costs, len(counts))[rank]).nonzero().flatten()
    return all_responses.select(rows).to(device)


def _units(responses: Responses) -> Tensor:
    """Number of what must stay together, for each row: a group, or the segments of an episode."""
    if responses.continues is None:
        return torch.arange(len(responses.inputs)) // responses.group_size
    return episode_of_rows(responses.continues) // responses.group_size
