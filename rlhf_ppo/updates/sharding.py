"""Assign the rows of a minibatch to processes.

A minibatch is a set of rows of the *global* batch, the same on every process, so that a run on two processes takes the
same steps as a run on one. Rows are assigned by cost, independently of the process that sampled them.
"""

import heapq
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor

from rlhf_ppo.batch import TrainBatch


def all_gather_batch(batch: TrainBatch, accelerator: Accelerator) -> TrainBatch:
    """Concatenate the rows of all processes, process 0 first; processes may hold different numbers of rows."""
    if accelerator.num_processes == 1:
        return batch
    parts: list[TrainBatch] = gather_object([batch.to(torch.device("cpu"))])
    return parts[0].joined(parts[1:]).to(batch.mask.device)


def assign_rows(costs: Int[Tensor, " rows"], processes: int) -> list[Int[Tensor, " local_rows"]]:
    """Assign positions 0 ... n-1 to processes: the costliest first, to the least loaded process (Graham 1969)."""
    assigned: list[list[int]] = [[] for _ in range(processes)]
    work = [(0, 0, process) for process in range(processes)]
    for position in torch.argsort(costs, descending=True, stable=True).tolist():
        load, rows, process = heapq.heappop(work)
        assigned[process].append(position)
        heapq.heappush(work, (load + int(costs[position]), rows + 1, process))
    return [torch.tensor(positions, dtype=torch.long) for positions in assigned]


def local_micro_batches(
    batch: TrainBatch,
    rows: Int[Tensor, " rows"],
    split: Callable[[Tensor], list[Tensor]],
    *,
    process: int,
    processes: int,
) -> list[TrainBatch]:
    """This process's micro-batches of an optimizer step; every process gets the same number.

    A process with too few micro-batches repeats the shortest row with its actions masked: passes are collective when
    parameters are sharded, and DDP waits for gradients from every process.

    Args:
        split: Cuts the positions of a process's rows into micro-batches, from their costs.
    """
    rows = rows.cpu()
    costs = batch.inputs.costs()[rows]
    per_process = [
        [positions[micro_batch] for micro_batch in split(costs[positions])]
        for positions in assign_rows(costs, processes)
    ]
    local = [batch.select(rows[positions]) for positions in per_process[process]]
    missing = max(len(micro_batches) for micro_batches in per_process) - len(local)
    if missing:
        shortest = costs.argmin().reshape(1)
        local += [batch.select(rows[shortest]).without_actions()] * missing
    return local
