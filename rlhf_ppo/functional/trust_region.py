"""TRPO's natural-gradient step: Fisher-vector products, conjugate gradient, line search.

All work on flat vectors: `flatten` makes one from the trainable parameters, `unflatten` splits it again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import zero_where_masked

Vector: TypeAlias = Float[Tensor, " parameters"]
MatrixVectorProduct: TypeAlias = Callable[[Tensor], Tensor]
"""v -> A v for a symmetric matrix A."""
FisherMetric: TypeAlias = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Multiplies tangents by the Fisher information of a distribution with respect to its own parameters."""


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor] | None = None) -> Vector:
    """Concatenate the entries of all tensors, in order, into one vector.

    Args:
        tensors: Parameters or gradients. A gradient may be None, which counts as zeros.
        like: Tensors that give the shapes of None entries.
    """
    shapes: Sequence[Tensor | None] = tensors if like is None else like
    flat = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor is not None:
            flat.append(tensor.reshape(-1))
        elif shape is not None:
            flat.append(torch.zeros_like(shape).reshape(-1))
        else:
            raise ValueError(
                "expected tensors, got None: the length of the vector would be wrong. "
                "Pass the parameters as `like` when some of them have no gradient."
            )
    return torch.cat(flat)


def unflatten(vector: Vector, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a flat vector into views with the shapes of `like`.

    Raises:
        ValueError: The vector does not have as many entries as `like`.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.numel() != sum(sizes):
        raise ValueError(
            f"expected a vector of {sum(sizes)} entries, got {vector.numel()}: values would go to other "
            "parameters. Flatten and unflatten with the same list, trainable parameters only."
        )
    return [chunk.view_as(tensor) for chunk, tensor in zip(vector.split(sizes), like, strict=True)]


def fisher_vector_product(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], *, metric: FisherMetric, damping: float = 0.0
) -> MatrixVectorProduct:
    """The map v -> (Jᵀ H J + damping) v, by two vector-Jacobian products (Schulman et al. 2015, app. C.1).

    J is the Jacobian of the distribution's parameters (logits; mean and log-std) with respect to the network's, H the
    Fisher information on the former. This is the Hessian of the mean KL(π_old || π_θ) at θ = θ_old. J v is the
    derivative of (wᵀ J) v in a dummy w, so the forward graph is differentiated twice: attention must run eager or in
    PyTorch's math kernel. The graph of `outputs` stays alive as long as the returned function.

    Args:
        outputs: Parameters of the distribution, with graph.
        parameters: The trainable parameters; those that `outputs` does not depend on get zeros.
        metric: H: `categorical_metric` or `gaussian_metric`, weighted by 1 / count, so that micro-batches add
            up.
        damping: Added to the diagonal, >= 0; language models need 0.1 to 1.
    """
    dummies = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    pullback = torch.autograd.grad(
        list(outputs), list(parameters), dummies, create_graph=True, retain_graph=True, allow_unused=True
    )
    used = [(gradient, index) for index, gradient in enumerate(pullback) if gradient is not None]

    def product(vector: Tensor) -> Tensor:
        tangent_parameters = unflatten(vector, parameters)
        directional = torch.stack([(gradient * tangent_parameters[index]).sum() for gradient, index in used]).sum()
        tangents = torch.autograd.grad(directional, dummies, retain_graph=True, materialize_grads=True)
        cotangents = [tangent.detach() for tangent in metric(tangents)]
        curvature = torch.autograd.grad(
            list(outputs), list(parameters), cotangents, retain_graph=True, allow_unused=True
        )
        return flatten(curvature, like=parameters) + damping * vector

    return product


def categorical_metric(logits: Float[Tensor, "*shape vocab"], weights: Float[Tensor, "*shape"]) -> FisherMetric:
    """Fisher information of softmax(logits): u -> w (diag(p) - p pᵀ) u at each position.

    Args:
        logits: Logits divided by the temperature; finite everywhere.
        weights: w, 1 / count at actions of the policy and 0 elsewhere.
    """
    probabilities = torch.softmax(logits.detach(), dim=-1)

    def metric(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (tangent,) = tangents
        centered = tangent - (probabilities * tangent).sum(-1, keepdim=True)
        return (weights.unsqueeze(-1) * probabilities * centered,)

    return metric


def gaussian_metric(log_std: Float[Tensor, "*shape actions"], weights: Float[Tensor, "*shape"]) -> FisherMetric:
    """Fisher information of a diagonal Gaussian on (mean, log_std): 1 / σ² and 2.

    Args:
        log_std: log σ, broadcast to the shape of the mean.
        weights: 1 / count at actions of the policy and 0 elsewhere.
    """
    precision = torch.exp(-2 * log_std.detach())

    def metric(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mean_tangent, log_std_tangent = tangents
        return weights.unsqueeze(-1) * precision * mean_tangent, weights.unsqueeze(-1) * 2 * log_std_tangent

    return metric


def step_weights(mask: Bool[Tensor, "*shape"], count: int | float | Tensor) -> Float[Tensor, "*shape"]:
    """The `weights` of a Fisher metric: 1 / count at actions of the policy, 0 elsewhere."""
    return zero_where_masked(torch.ones(mask.shape, device=mask.device) / count, mask)


def conjugate_gradient(
    product: MatrixVectorProduct, target: Vector, *, iterations: int = 10, tolerance: float = 1e-10
) -> Vector:
    """Approximate solution x of A x = b for a positive definite A (Hestenes and Stiefel 1952), from x = 0.

    Stops early when the residual is small or a direction has no positive finite curvature, and returns x so far.
    Residuals may rise before they fall, which is no error.

    Args:
        product: A, equal on all processes.
        target: b.
        iterations: Largest number of products.
        tolerance: Relative: stop when |r|² <= tolerance · |b|².
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    squared_residual = target.dot(target)
    threshold = tolerance * squared_residual
    for _ in range(iterations):
        if not bool(squared_residual > threshold):
            break
        product_direction = product(direction)
        curvature = direction.dot(product_direction)
        if not bool(torch.isfinite(curvature) & (curvature > 0)):
            break
        step_size = squared_residual / curvature
        solution = solution + step_size * direction
        residual = residual - step_size * product_direction
        previous, squared_residual = squared_residual, residual.dot(residual)
        direction = residual + (squared_residual / previous) * direction
    return solution


def trust_region_step(direction: Vector, fisher_direction: Vector, max_kl: float) -> Vector:
    """Scale `direction` to the step whose KL is `max_kl` in the quadratic model: x √(2δ / xᵀFx).

    Args:
        direction: x, the natural gradient.
        fisher_direction: F x.
        max_kl: δ, nats, > 0.

    Raises:
        ValueError: δ is not positive, or xᵀFx is not positive and finite.
    """
    curvature = float(direction.dot(fisher_direction))
    if not max_kl > 0:
        raise ValueError(f"max_kl must be > 0, got {max_kl}: no step would be allowed. TRPO's usual value is 0.01.")
    if not (math.isfinite(curvature) and curvature > 0):
        raise ValueError(
            f"expected xᵀFx > 0 and finite, got {curvature}: the length of the step would be undefined. "
            "Skip this update where the gradient is zero; otherwise raise the damping or compute F in float32."
        )
    return direction * math.sqrt(2 * max_kl / curvature)


@dataclass(frozen=True, kw_only=True)
class LineSearchResult:
    """Result of `line_search`."""

    parameters: Tensor
    """The accepted vector; `start` itself if none was accepted."""
    accepted: bool
    """Whether a candidate was accepted."""
    backtracks: int
    """Rejected candidates."""
    improvement: float
    """Improvement of the surrogate at `parameters`; 0 if none was accepted."""
    kl: float
    """KL(π_old || π_θ) at `parameters`, nats; 0 if none was accepted."""


def line_search(
    evaluate: Callable[[Tensor], tuple[float, float]],
    start: Vector,
    step: Vector,
    *,
    max_kl: float,
    shrink: float = 0.8,
    max_backtracks: int = 10,
) -> LineSearchResult:
    """Shorten a step until it improves the surrogate within the trust region (Schulman et al. 2015, app. C).

    Candidates are start + shrink^k · step, k = 0, 1, ... The first with improvement > 0 and KL <= max_kl is accepted;
    nan is neither. `evaluate` leaves the network at the last candidate: write `result.parameters` back; on failure that
    is `start` itself, bit for bit.

    Args:
        evaluate: Parameters -> (improvement of the surrogate over the start, mean KL in nats), equal on all processes.
        start: θ_old.
        step: The full step.
        max_kl: Largest accepted KL, nats; TRPO for language models allows 1.5 δ.
        shrink: Factor between successive candidates, in (0, 1).
        max_backtracks: Candidates after the first.

    Raises:
        ValueError: `shrink` is not between 0 and 1.
    """
    if not 0 < shrink < 1:
        raise ValueError(f"shrink must be between 0 and 1, got {shrink}: steps would not get shorter. Pass e.g. 0.8.")
    for k in range(max_backtracks + 1):
        candidate = start + shrink**k * step
        improvement, kl = evaluate(candidate)
        if improvement > 0 and kl <= max_kl:
            return LineSearchResult(parameters=candidate, accepted=True, backtracks=k, improvement=improvement, kl=kl)
    return LineSearchResult(parameters=start, accepted=False, backtracks=max_backtracks + 1, improvement=0.0, kl=0.0)
