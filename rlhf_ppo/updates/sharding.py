"""Who does what of an optimizer step when there are several processes.

A minibatch is a set of rows of the *global* batch, the same on every process, so that a run on two processes takes the
steps of a run on one. Its rows are dealt out by work; where they were sampled does not matter.
"""

import heapq

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor

from rlhf_ppo.batch import TrainBatch, split_into_micro_batches


def all_gather_batch(batch: TrainBatch, accelerator: Accelerator) -> TrainBatch:
    """The rows of all processes, those of process 0 first; processes may hold different numbers of rows."""
    if accelerator.num_processes == 1:
        return batch
    parts: list[TrainBatch] = gather_object([batch.to(torch.device("cpu"))])
    return parts[0].joined(parts[1:]).to(batch.mask.device)


def assign_rows(costs: Int[Tensor, " rows"], processes: int) -> list[Int[Tensor, " share"]]:
    """Positions 0 ... n-1 for each process: the costliest first, to whoever has the least work so far (Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    work = [(0, 0, process) for process in range(processes)]
    for position in torch.argsort(costs, descending=True, stable=True).tolist():
        load, rows, process = heapq.heappop(work)
        shares[process].append(position)
        heapq.heappush(work, (load + int(costs[position]), rows + 1, process))
    return [torch.tensor(share, dtype=torch.long) for share in shares]


def local_micro_batches(
    batch: TrainBatch,
    rows: Int[Tensor, " rows"],
    *,
    size: int | None,
    token_budget: int | None,
    process: int,
    processes: int,
) -> list[TrainBatch]:
    """This process's micro-batches of an optimizer step, as many as every other process has.

    A process that runs out of rows goes over the shortest row without learning from it: passes are collective when
    parameters are sharded, and DDP waits for everybody's gradients.

    Args:
        batch: The global batch.
        rows: Rows of the optimizer step.
        size: Most rows in a micro-batch; None for no bound.
        token_budget: Most padded tokens (rows x longest row) in a micro-batch; None for no bound.
        process: Whose micro-batches.
        processes: How many share the work.
    """
    costs = batch.inputs.costs()[rows.cpu()]
    shares = assign_rows(costs, processes)
    cuts = [
        [
            share[micro_batch]
            for micro_batch in split_into_micro_batches(costs[share], size=size, token_budget=token_budget)
        ]
        for share in shares
    ]
    own = [batch.select(rows[micro_batch.to(rows.device)]) for micro_batch in cuts[process]]
    missing = max(len(micro_batches) for micro_batches in cuts) - len(own)
    if missing:
        shortest = costs.argmin().reshape(1).to(rows.device)
        own += [batch.select(rows[shortest]).without_actions()] * missing
    return own
