"""Where a reward source has left a process without any sample: everybody learns from some of the others'."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.batch import pad_rows
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.updates.sharding import assign_rows


def rebalance_empty_ranks(
    own: Responses | None, gather: Callable[[list[Any]], list[Any]], process: int, device: torch.device
) -> Responses:
    """This process's responses, or, where any process has none, a fair share of all. Collective.

    An update deals its minibatches out anew, so who holds a response changes no result.

    Args:
        own: What this process has; None: nothing.
        gather: The lists of all processes, joined in their order.
        process: Which one this is.
        device: Where its policy is.

    Raises:
        ValueError: Fewer responses (or groups of them) are left than there are processes; on every process.
    """
    counts = gather([0 if own is None else len(own.inputs)])
    if all(counts):
        assert own is not None
        return own
    parts: list[Responses] = [part for part in gather([None if own is None else _on(own, "cpu")]) if part is not None]
    group = parts[0].group_size if parts else 1
    if sum(counts) // group < len(counts):
        raise ValueError(
            f"reward sources skipped all but {sum(counts)} samples of the batch, {len(counts)} processes need "
            f"{group} each at least: there is nothing to learn from. Look at what the sources return None for, or "
            "raise batch_size."
        )
    everything = _joined(parts)
    costs = everything.inputs.costs().reshape(-1, group).sum(dim=1)
    groups = assign_rows(costs, len(counts))[process].sort().values
    rows = (groups[:, None] * group + torch.arange(group)).flatten()
    return _on(_selected(everything, rows), device)


def _joined(parts: list[Responses]) -> Responses:
    def tall(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        return pad_rows([row for value in values for row in value]) if values[0].dim() > 1 else torch.cat(values)

    columns: dict[str, Any] = {name: tall(name) for name in _COLUMNS}
    return replace(parts[0], inputs=parts[0].inputs.joined([part.inputs for part in parts[1:]]), **columns)


def _selected(everything: Responses, rows: Tensor) -> Responses:
    inputs = everything.inputs.select(rows)

    def short(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows][:, : inputs.width()] if value.dim() > 1 else value[rows]

    columns: dict[str, Any] = {name: short(getattr(everything, name)) for name in _COLUMNS}
    return replace(everything, inputs=inputs, **columns)


def _on(responses: Responses, device: torch.device | str) -> Responses:
    place = torch.device(device)
    columns: dict[str, Any] = {
        name: None if value is None else value.to(place) for name in _COLUMNS for value in (getattr(responses, name),)
    }
    return replace(responses, inputs=responses.inputs.to(place), **columns)


_COLUMNS = ("mask", "scores", "truncated", "sampler_logprobs", "sampler_values")
