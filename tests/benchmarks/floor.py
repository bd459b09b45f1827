"""The least that an update can cost: its matrix products, nothing else."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.benchmarks.workloads import Workload


@torch.no_grad()
def update_floor(model: Any, workload: Workload) -> float:
    """CPU seconds of the products of all optimiser steps, forward once and backward twice, in the model's dtype.

    Every linear layer of the trunk sees the real tokens of a minibatch in one product, the LM head its response
    tokens; results go into memory that is there already. Attention, norms, softmax and the optimiser are left out:
    a lower bound.
    """
    head = model.get_output_embeddings().weight
    trunk = [layer for layer in model.base_model.modules() if isinstance(layer, nn.Linear | Conv1D)]
    weights = [layer.weight.T if isinstance(layer, Conv1D) else layer.weight for layer in trunk]
    lengths = torch.tensor(workload.lengths())
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    for _ in range(workload.epochs):
        for rows in torch.randperm(workload.rows, generator=generator).split(workload.minibatch):
            responses = int(lengths[rows].sum())
            tokens = responses + workload.prompt * len(rows)
            seconds += sum(products(weight, tokens) for weight in weights) + products(head, responses)
    return seconds


def products(weight: Tensor, tokens: int) -> float:
    """CPU seconds of y = x Wᵀ and of the gradients of x and W."""
    outputs, inputs = weight.shape
    x, y = weight.new_ones(tokens, inputs), weight.new_ones(tokens, outputs)
    y_of_x, x_gradient, weight_gradient = torch.ones_like(y), torch.ones_like(x), torch.ones_like(weight)
    start = time.process_time()
    torch.mm(x, weight.T, out=y_of_x)
    torch.mm(y, weight, out=x_gradient)
    torch.mm(y.T, x, out=weight_gradient)
    return time.process_time() - start
