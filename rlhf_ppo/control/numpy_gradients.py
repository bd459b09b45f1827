"""Gradients of an objective by NumPy: the traced forward and backward pass without PyTorch's overhead per call.

On 64 rows a PyTorch operation takes longer to dispatch than to compute. The pass over a minibatch (networks, objective
and its derivative, exactly the functions that `MinibatchUpdate` calls) is traced once to ATen operations, each replaced
by its NumPy equivalent, and that program runs on every minibatch. Operations without equivalent run in PyTorch.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.control.policy import ControlInputs
from rlhf_ppo.updates import Objective
from rlhf_ppo.updates.objective import Masked, Metrics

Array: TypeAlias = Any
aten: Any = torch.ops.aten


class NumpyGradients:
    """A `GradientFunction` for small policies: autograd's gradients up to rounding, in a fraction of the time.

    Args:
        policy: A small policy in float32 on the CPU.
        with_entropy: Whether the objective reads the entropy.
    """

    def __init__(self, policy: nn.Module, *, with_entropy: bool = True) -> None:
        self.policy, self.with_entropy = policy, with_entropy
        self.parameters = dict(policy.named_parameters())
        self._programs: dict[tuple[Objective, int], tuple[list[str], Callable[..., Any]]] = {}
        self._batch: TrainBatch | None = None
        self._columns: list[Array] = []

    def __call__(self, objective: Objective, batch: TrainBatch, rows: Tensor) -> tuple[Metrics, list[Masked]]:
        """Set every parameter's `.grad`; return the objective's metrics and the ratios."""
        if batch is not self._batch:
            self._batch, self._columns = batch, [column.numpy() for column in _batch_columns(batch)]
        key = (objective, len(rows))
        if key not in self._programs:
            self._programs[key] = self._trace(objective, batch, rows)
        names, program = self._programs[key]
        indices = rows.numpy()
        values = [parameter.detach().numpy() for parameter in self.parameters.values()]
        with np.errstate(all="ignore"):  # PyTorch does not warn of overflow either; the update's guards check it
            results = program(*values, *(column[indices] for column in self._columns))
        gradients, metrics, ratio = results[: len(values)], results[len(values) : -1], results[-1]
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = torch.from_numpy(np.ascontiguousarray(gradient))
        found: Metrics = dict(zip(names, map(float, metrics), strict=True))
        return found, [(torch.from_numpy(ratio), batch.mask[rows])]

    def _trace(self, objective: Objective, batch: TrainBatch, rows: Tensor) -> tuple[list[str], Callable[..., Any]]:
        names: list[str] = []

        def derivative(values: list[Tensor], columns: list[Tensor]) -> tuple[Any, list[Tensor], Tensor]:
            parameters = dict(zip(self.parameters, values, strict=True))
            micro_batch = _batch_from_columns(columns)
            output = functional_call(
                self.policy, parameters, (micro_batch.inputs,), {"with_entropy": self.with_entropy}
            )
            terms = objective(output, micro_batch, micro_batch.mask.sum().float())
            names[:] = terms.metrics
            gradients = torch.autograd.grad(terms.loss, values, materialize_grads=True)
            return gradients, list(terms.metrics.values()), terms.ratio

        values = [parameter.detach().clone().requires_grad_() for parameter in self.parameters.values()]
        columns = [column[rows] for column in _batch_columns(batch)]
        traced = make_fx(derivative)(values, columns)
        return names, to_numpy_program(
            make_fx(functionalize(traced))(values, columns)
        )  # functionalize removes in-place operations


def to_numpy_program(traced: GraphModule) -> Callable[..., Any]:
    """Replace the ATen operations of a traced program by NumPy; arguments and results are flat lists of arrays."""
    traced.graph.eliminate_dead_code()
    traced.graph.set_codegen(CodeGen())  # flattening nested lists costs as much as a matrix product
    for node in traced.graph.nodes:
        if node.op == "call_function":
            node.target = _NUMPY.get(node.target) or _through_torch(node.target)
        elif node.op == "get_attr":
            constant = getattr(traced, node.target)
            delattr(traced, node.target)
            setattr(traced, node.target, constant.numpy())
    traced.recompile()
    program: Callable[..., Any] = traced.forward
    return program


def _batch_columns(batch: TrainBatch) -> list[Tensor]:
    inputs: Any = batch.inputs
    return [
        inputs.observations, inputs.actions, batch.mask, batch.logprobs, batch.values, batch.advantages, batch.returns,
    ]  # fmt: skip


def _batch_from_columns(columns: list[Tensor]) -> TrainBatch:
    observations, actions, mask, logprobs, values, advantages, returns = columns
    return TrainBatch(
        inputs=ControlInputs(observations=observations, actions=actions), mask=mask, logprobs=logprobs, values=values,
        advantages=advantages, returns=returns,
    )  # fmt: skip


def _through_torch(operation: Any) -> Callable[..., Any]:
    """Wrap an operation without NumPy equivalent: convert arrays to tensors and back."""

    def tensors(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(tensors, value))
        return torch.as_tensor(np.ascontiguousarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value

    def arrays(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(arrays, value))
        return value.numpy() if isinstance(value, Tensor) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        return arrays(operation(*tensors(args), **{name: tensors(value) for name, value in kwargs.items()}))

    return run


def _dtype(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else torch.empty(0, dtype=dtype).numpy().dtype


def _add(x: Array, y: Array, *, alpha: float = 1) -> Array:
    return x + y if alpha == 1 else x + alpha * y


def _sub(x: Array, y: Array, *, alpha: float = 1) -> Array:
    return x - y if alpha == 1 else x - alpha * y


def _addmm(bias: Array, x: Array, weight: Array) -> Array:
    result = np.dot(x, weight)
    result += bias
    return result


def _pow(x: Array, exponent: float) -> Array:
    return x * x if exponent == 2 else x if exponent == 1 else np.power(x, exponent)


def _sum(x: Array, dim: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return x.sum(axis=tuple(dim) if dim else None, keepdims=keepdim, dtype=_dtype(dtype))


def _sum_all(x: Array, *, dtype: Any = None) -> Array:
    return x.sum(dtype=_dtype(dtype))


def _copy_to(x: Array, *, dtype: Any = None, **_: Any) -> Array:
    return x.astype(_dtype(dtype)) if dtype is not None else x.copy()


def _masked_fill(x: Array, mask: Array, value: float) -> Array:
    result = x.copy() if np.shape(x) == mask.shape else np.broadcast_to(x, mask.shape).copy()
    np.copyto(result, value, where=mask)
    return result


def _expand(x: Array, size: list[int]) -> Array:
    old_size = ((1,) * len(size) + np.shape(x))[-len(size) :]
    result = np.empty([old if new == -1 else new for old, new in zip(old_size, size, strict=True)], dtype=x.dtype)
    result[...] = x
    return result


def _slice(x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    return x[(slice(None),) * dim + (slice(start, end, step),)]


def _slice_backward(gradient: Array, sizes: list[int], dim: int, start: int, end: int, step: int) -> Array:
    result = np.zeros(sizes, dtype=gradient.dtype)
    result[(slice(None),) * dim + (slice(start, end, step),)] = gradient
    return result


def _clamp(x: Array, low: float | None = None, high: float | None = None) -> Array:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _scatter_add(x: Array, dim: int, index: Array, source: Array) -> Array:
    result = x.copy()
    indices = list(np.indices(index.shape, sparse=True))
    indices[dim] = index
    np.add.at(result, tuple(indices), source)
    return result


def _log_softmax(x: Array, dim: int, half: bool) -> Array:
    shifted = x - x.max(axis=dim, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=dim, keepdims=True))


def _log_softmax_backward(gradient: Array, output: Array, dim: int, dtype: Any) -> Array:
    return gradient - np.exp(output) * gradient.sum(axis=dim, keepdims=True)


def _identity(x: Array, *_: Any, **__: Any) -> Array:
    return x


_NUMPY: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: np.multiply,
    aten.mul.Scalar: np.multiply,
    aten.div.Tensor: np.divide,
    aten.div.Scalar: np.divide,
    aten.neg.default: np.negative,
    aten.exp.default: np.exp,
    aten.expm1.default: np.expm1,
    aten.log.default: np.log,
    aten.pow.Tensor_Scalar: _pow,
    aten.tanh.default: np.tanh,
    aten.tanh_backward.default: lambda gradient, output: gradient * (1 - output * output),
    aten.minimum.default: np.minimum,
    aten.maximum.default: np.maximum,
    aten.clamp.default: _clamp,
    aten.addmm.default: _addmm,
    aten.mm.default: np.dot,
    aten.t.default: np.transpose,
    aten.sum.default: _sum_all,
    aten.sum.dim_IntList: _sum,
    aten.cat.default: lambda parts, dim=0: np.concatenate(parts, axis=dim),
    aten.squeeze.dim: lambda x, dim: np.squeeze(x, axis=dim),
    aten.unsqueeze.default: lambda x, dim: np.expand_dims(x, dim),
    aten.view.default: np.reshape,
    aten._unsafe_view.default: np.reshape,
    aten.reshape.default: np.reshape,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_backward,
    aten._to_copy.default: _copy_to,
    aten.clone.default: _identity,
    aten.alias.default: _identity,
    aten.detach.default: _identity,
    aten.new_zeros.default: lambda x, size, **_: np.zeros(size, dtype=x.dtype),
    aten.zeros_like.default: lambda x, **_: np.zeros_like(x),
    aten.ones_like.default: lambda x, **_: np.ones_like(x),
    aten.masked_fill.Scalar: _masked_fill,
    aten.where.self: np.where,
    aten.bitwise_not.default: np.invert,
    aten.logical_and.default: np.logical_and,
    aten.eq.Tensor: np.equal,
    aten.gt.Tensor: np.greater,
    aten.lt.Tensor: np.less,
    aten.ge.Scalar: np.greater_equal,
    aten.le.Scalar: np.less_equal,
    aten.lt.Scalar: np.less,
    aten.gt.Scalar: np.greater,
    aten.eq.Scalar: np.equal,
    aten.scalar_tensor.default: lambda value, *, dtype=None, **_: np.asarray(value, dtype=_dtype(dtype)),
    aten.index.Tensor: lambda x, indices: x[tuple(slice(None) if item is None else item for item in indices)],
    aten.gather.default: lambda x, dim, index: np.take_along_axis(x, index, axis=dim),
    aten.scatter_add.default: _scatter_add,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
}
