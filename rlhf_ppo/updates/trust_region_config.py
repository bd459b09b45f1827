"""Settings of the trust-region update, the policy protocol it needs, and checks of what it cannot train."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from rlhf_ppo.batch import PolicyOutput
from rlhf_ppo.functional.trust_region import FisherMetric
from rlhf_ppo.utils.field_types import check_fields


@runtime_checkable
class FisherPolicy(Protocol):
    """A policy whose Fisher information can be computed: `TokenPolicy` or `ControlPolicy`."""

    chunk_size: int
    """Largest number of padded tokens or steps in the graph of one Fisher-vector product."""

    def __call__(self, inputs: Any, *, with_entropy: bool = False) -> PolicyOutput:
        """Score every action."""

    def check_twice_differentiable(self) -> None:
        """Raise ValueError if the forward pass cannot be differentiated twice."""

    def outputs_and_metric(self, inputs: Any, weights: Tensor) -> tuple[tuple[Tensor, ...], FisherMetric]:
        """The distribution's parameters at each action, with gradient, and their Fisher metric."""

    def kl_from_current(self, micro_batches: Sequence[Any]) -> list[Callable[[], Tensor]]:
        """For each micro-batch, a function that returns KL(π at this call || π at its call), [B, T], nats."""

    def critic_parameters(self) -> list[nn.Parameter]:
        """The parameters of the value function alone."""

    def critic_states(self, inputs: Any) -> list[Tensor]:
        """The inputs of the value head at each action, one tensor [T_i, ...] per row."""

    def values_from_states(self, states: Tensor) -> Tensor:
        """V at the concatenated states of `critic_states`."""


@dataclass(frozen=True, kw_only=True)
class TrustRegionConfig:
    """Size of the trust region, and settings of conjugate gradient and line search."""

    max_kl: float = 0.01
    """δ, nats per action: the step's KL in the quadratic model. Steps with a true mean KL above 1.5 δ are rejected."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal for the step's direction, but not for its length. Language models need 0.1
    to 1."""
    curvature_fraction: float = 0.25
    """Fraction of rows for the Fisher-vector products; gradient and line search use all rows."""
    cg_iterations: int = 10
    """Fisher-vector products per conjugate gradient solve."""
    shrink: float = 0.8
    """The line search tries shrink^k of the step, k = 0, 1, ..."""
    max_backtracks: int = 10
    """Number of shorter steps to try before the update is given up."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.max_kl > 0:
            raise ValueError(f"max_kl must be > 0, got {self.max_kl}: no step would be allowed. Usual: 0.01.")
        if not self.damping >= 0:
            raise ValueError(f"damping must be >= 0, got {self.damping}: the matrix would be indefinite. Usual: 0.1.")
        if not 0 < self.curvature_fraction <= 1:
            raise ValueError(
                f"curvature_fraction must be in (0, 1], got {self.curvature_fraction}: it is a fraction of the rows. "
                "Pass e.g. 0.25."
            )


def check_processes(accelerator: Accelerator) -> None:
    """Raise ValueError for sharded parameters or autocast."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise ValueError(
            f"expected unsharded parameters, got {accelerator.distributed_type.value}: Fisher products "
            "differentiate the forward pass twice, and sharded parameters are freed after the first. Run TRPO on one "
            "process or with DDP, or use PPOClip or PPOPenalty."
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"expected mixed_precision='no', got {accelerator.mixed_precision!r}: a KL of 0.01 nats is below its "
            "rounding error, so the line search would compare noise. Use float32, or PPOClip."
        )


def check_parameters(parameters: list[nn.Parameter]) -> None:
    """Raise ValueError if no parameter of the policy is trained, or one in low precision."""
    if not parameters:
        raise ValueError("the policy has no trainable parameters, only its value head: unfreeze some, or add adapters")
    low = {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}
    if low:
        raise ValueError(
            f"expected trainable parameters in float32, got {sorted(map(str, low))}: a KL of 0.01 nats is below the "
            "rounding error. Load the model with dtype=torch.float32, or train float32 LoRA adapters, or use PPOClip."
        )
