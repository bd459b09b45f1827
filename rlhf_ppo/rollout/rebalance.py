"""Redistribute responses when reward sources skipped all samples of a process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.batch import episode_of_rows, pad_rows
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
    on_cpu = None if responses is None else _to_device(responses, "cpu")
    non_empty: list[Responses] = [batch for batch in gather([on_cpu]) if batch is not None]
    all_responses = _concatenate(non_empty) if non_empty else None
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
    return _to_device(_select(all_responses, rows), device)


def _units(responses: Responses) -> Tensor:
    """Number of what must stay together, for each row: a group, or the segments of an episode."""
    if responses.continues is None:
        return torch.arange(len(responses.inputs)) // responses.group_size
    return episode_of_rows(responses.continues) // responses.group_size


def _concatenate(non_empty: list[Responses]) -> Responses:
    def concatenate_column(name: str) -> Tensor | None:
        values = [getattr(batch, name) for batch in non_empty]
        if any(value is None for value in values):
            return None
        return pad_rows([row for value in values for row in value]) if values[0].dim() > 1 else torch.cat(values)

    tensors: dict[str, Any] = {name: concatenate_column(name) for name in _TENSOR_FIELDS}
    first, *others = non_empty
    return replace(first, inputs=first.inputs.joined([batch.inputs for batch in others]), **tensors)


def _select(all_responses: Responses, rows: Tensor) -> Responses:
    inputs = all_responses.inputs.select(rows)

    def select_column(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows][:, : inputs.width()] if value.dim() > 1 else value[rows]

    tensors: dict[str, Any] = {name: select_column(getattr(all_responses, name)) for name in _TENSOR_FIELDS}
    return replace(all_responses, inputs=inputs, **tensors)


def _to_device(responses: Responses, device: torch.device | str) -> Responses:
    target = torch.device(device)
    tensors: dict[str, Any] = {
        name: None if value is None else value.to(target)
        for name in _TENSOR_FIELDS
        for value in (getattr(responses, name),)
    }
    return replace(responses, inputs=responses.inputs.to(target), **tensors)


_TENSOR_FIELDS = (
    "mask", "scores", "truncated", "excluded", "turn_starts", "continues", "sampler_logprobs", "sampler_values",
)  # fmt: skip
