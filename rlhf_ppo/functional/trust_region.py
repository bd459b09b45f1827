"""The natural-gradient step of TRPO: Fisher products, conjugate gradient, line search.

All on flat vectors: `flatten` makes one of the trainable parameters, `unflatten` cuts it back.
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
"""Symmetric matrix times vector."""
Metric: TypeAlias = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Fisher information of the distribution on its own parameters, times tangents of their shapes."""


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor] | None = None) -> Vector:
    """One vector of all entries, in order.

    Args:
        tensors: Parameters or gradients. A gradient may be None: it reads as zeros.
        like: Tensors whose shapes stand in for None.
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
    """The pieces of a flat vector, as views in the shapes of `like`.

    Raises:
        ValueError: The vector does not have as many entries as `like`.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.numel() != sum(sizes):
        raise ValueError(
            f"expected a vector of {sum(sizes)} entries, got {vector.numel()}: pieces would belong to other "
            "parameters. Flatten and unflatten with the same list, trainable parameters only."
        )
    return [piece.view_as(tensor) for piece, tensor in zip(vector.split(sizes), like, strict=True)]


def fisher_vector_product(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], *, metric: Metric, damping: float = 0.0
) -> MatrixVectorProduct:
    """The map v -> (Jᵀ H J + damping) v, by two vector-Jacobian products (Schulman et al. 2015, app. C.1).

    J is the Jacobian of the distribution's parameters (logits; mean and log-std) with respect to the network's, H the
    Fisher information on the former. This is the Hessian of the mean KL(π_old || π_θ) at θ = θ_old. J v is the
    derivative of (wᵀ J) v in a dummy w, so the forward graph is differentiated twice: attention must run eager or in
    PyTorch's math kernel. The graph of `outputs` stays alive as long as the returned function.

    Args:
        outputs: Parameters of the distribution, with graph.
        parameters: The trainable parameters; those that `outputs` does not depend on have zero curvature.
        metric: H: `categorical_metric` or `gaussian_metric`, weighted by 1 / count, so that pieces add up.
        damping: Added to the diagonal, >= 0; language models need 0.1 to 1.
    """
    dummies = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    pullback = torch.autograd.grad(
        list(outputs), list(parameters), dummies, create_graph=True, retain_graph=True, allow_unused=True
    )
    used = [(gradient, index) for index, gradient in enumerate(pullback) if gradient is not None]

    def product(vector: Tensor) -> Tensor:
        pieces = unflatten(vector, parameters)
        directional = torch.stack([(gradient * pieces[index]).sum() for gradient, index in used]).sum()
        tangents = torch.autograd.grad(directional, dummies, retain_graph=True, materialize_grads=True)
        cotangents = [tangent.detach() for tangent in metric(tangents)]
        curvature = torch.autograd.grad(
            list(outputs), list(parameters), cotangents, retain_graph=True, allow_unused=True
        )
        return flatten(curvature, like=parameters) + damping * vector

    return product


def categorical_metric(logits: Float[Tensor, "*shape vocab"], weights: Float[Tensor, "*shape"]) -> Metric:
    """Fisher information of softmax(logits): u -> w (diag(p) - p pᵀ) u at each position.

    Args:
        logits: The outputs themselves (divided by the temperature).
        weights: w, 1 / count at our actions and 0 elsewhere, where logits must be finite.
    """
    probabilities = torch.softmax(logits.detach(), dim=-1)

    def metric(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (tangent,) = tangents
        centered = tangent - (probabilities * tangent).sum(-1, keepdim=True)
        return (weights.unsqueeze(-1) * probabilities * centered,)

    return metric


def gaussian_metric(log_std: Float[Tensor, "*shape actions"], weights: Float[Tensor, "*shape"]) -> Metric:
    """Fisher information of a diagonal Gaussian on (mean, log_std): 1 / σ² and 2.

    Args:
        log_std: log σ, broadcast to the shape of the mean.
        weights: 1 / count at our actions and 0 elsewhere.
    """
    precision = torch.exp(-2 * log_std.detach())

    def metric(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mean, spread = tangents
        return weights.unsqueeze(-1) * precision * mean, weights.unsqueeze(-1) * 2 * spread

    return metric


def step_weights(mask: Bool[Tensor, "*shape"], count: int | float | Tensor) -> Float[Tensor, "*shape"]:
    """The `weights` of a metric: 1 / count at our actions, 0 elsewhere."""
    return zero_where_masked(torch.ones(mask.shape, device=mask.device) / count, mask)


def conjugate_gradient(
    product: MatrixVectorProduct, target: Vector, *, iterations: int = 10, tolerance: float = 1e-10
) -> Vector:
    """Approximate solution x of A x = b for a positive definite A (Hestenes and Stiefel 1952), from x = 0.

    It stops early where the residual is small, and where a direction has no positive finite curvature: the x found up
    to there is returned. Residuals may rise before they fall, which is no error.

    Args:
        product: A, equal on all processes.
        target: b.
        iterations: At most so many products.
        tolerance: Relative: stop where |r|² <= tolerance · |b|².
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    squares = target.dot(target)
    enough = tolerance * squares
    for _ in range(iterations):
        if not bool(squares > enough):
            break
        curved = product(direction)
        curvature = direction.dot(curved)
        if not bool(torch.isfinite(curvature) & (curvature > 0)):
            break
        rate = squares / curvature
        solution = solution + rate * direction
        residual = residual - rate * curved
        previous, squares = squares, residual.dot(residual)
        direction = residual + (squares / previous) * direction
    return solution


def trust_region_step(direction: Vector, curved: Vector, max_kl: float) -> Vector:
    """The longest step along `direction` whose KL is `max_kl` in the quadratic model: x √(2δ / xᵀFx).

    Args:
        direction: x, the natural gradient.
        curved: F x.
        max_kl: δ, nats, > 0.

    Raises:
        ValueError: δ is not positive, or xᵀFx is not positive and finite.
    """
    curvature = float(direction.dot(curved))
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
    """What `line_search` settled on."""

    parameters: Tensor
    """The accepted vector; the very start where none was accepted."""
    accepted: bool
    """Whether the parameters moved."""
    backtracks: int
    """Candidates that were turned down."""
    improvement: float
    """Gain of the surrogate at `parameters`; 0 where none was accepted."""
    kl: float
    """KL(π_old || π_θ) at `parameters`, nats; 0 where none was accepted."""


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

    Candidates are start + shrink^k · step, k = 0, 1, ... One is accepted where improvement > 0 and KL <= max_kl; nan
    is neither. `evaluate` leaves the network wherever it was asked last: write `result.parameters` back, which on
    failure is `start` itself, bit for bit.

    Args:
        evaluate: Parameters -> (improvement of the surrogate over the start, mean KL in nats), equal on all processes.
        start: θ_old.
        step: The full step.
        max_kl: The largest KL to accept; TRPO for language models allows 1.5 δ.
        shrink: In (0, 1).
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
