"""The least that an optimizer step can cost: its matrix products, nothing else."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.benchmarks.workloads import Workload


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """A product by oneDNN, which torch carries and does not use for float32."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return result


@torch.no_grad()
def step_floor(model: Any, workload: Workload, rows: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """CPU seconds of the products of one optimizer step, forward once and backward twice.

    Every linear layer of the trunk sees the real tokens of the step's rows in one product, the LM head their response
    tokens; in attention, the queries of each row see its keys. Norms, softmax, activations and the optimizer are left
    out: a lower bound.

    Returns:
        Of the products with weights: `torch`, by `torch.mm` into memory that is there already; `fastest`, by the
        faster of that and oneDNN. `attention`: the products of attention, by the faster of `torch.bmm` and oneDNN.
    """
    head = model.get_output_embeddings().weight.to(dtype)
    trunk = [layer for layer in model.base_model.modules() if isinstance(layer, nn.Linear | Conv1D)]
    weights = [layer.weight.T if isinstance(layer, Conv1D) else layer.weight for layer in trunk]
    lengths = torch.tensor(workload.lengths())[rows.cpu()]
    responses = int(lengths.sum())
    tokens = responses + workload.prompt * len(rows)
    found = {"torch": 0.0, "fastest": 0.0}
    for weight, inputs in [*((weight.to(dtype), tokens) for weight in weights), (head, responses)]:
        by_torch, by_the_other = layer_seconds(weight, inputs)
        found["torch"] += by_torch
        found["fastest"] += min(by_torch, by_the_other)
    row_lengths = (lengths + workload.prompt).tolist()
    found["attention"] = workload.layers * sum(attention_seconds(workload, length) for length in row_lengths)
    return found


def attention_seconds(workload: Workload, length: int) -> float:
    """CPU seconds of the six products of one layer for one row: scores and output, the gradients of what they are of.

    Whole squares: what a token does not see is multiplied, too. In float32, in which attention runs on a CPU.
    """
    q, k, v, grad = torch.randn(4, workload.heads, length, workload.width // workload.heads)
    weights = torch.rand(workload.heads, length, length)
    forward = [(q, k.mT), (weights, v)]
    backward = [(weights.mT, grad), (grad, v.mT), (weights, k), (weights.mT, q)]
    products = forward + backward
    ways: list[list[Callable[[], object]]] = [[partial(torch.bmm, a, b) for a, b in products]]
    if torch.backends.mkldnn.is_available():
        ways.append([partial(by_onednn, a, b) for pair in products for a, b in zip(*pair, strict=True)])
    return min(_seconds(way) for way in ways)


def layer_seconds(weight: Tensor, tokens: int) -> tuple[float, float]:
    """CPU seconds of y = x Wᵀ and of the gradients of x and W: by torch, by oneDNN."""
    outputs, inputs = weight.shape
    x, y = torch.randn(tokens, inputs).to(weight), torch.randn(tokens, outputs).to(weight)
    operands = ((x, weight.T), (y, weight), (y.T, x))
    results = [x.new_ones(a.shape[0], b.shape[1]) for a, b in operands]
    ways: list[list[Callable[[], object]]] = [
        [partial(torch.mm, a, b, out=result) for (a, b), result in zip(operands, results, strict=True)]
    ]
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        ways.append([partial(by_onednn, a, b) for a, b in operands])
    seconds = [_seconds(way) for way in ways]
    return seconds[0], seconds[-1]


def _seconds(products: Sequence[Callable[[], object]]) -> float:
    start = time.process_time()
    for multiply in products:
        multiply()
    return time.process_time() - start
