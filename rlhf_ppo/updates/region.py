"""The trust region of an update: its size, and what cannot have one."""

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
    """A policy whose Fisher information can be had: over tokens (`TokenPolicy`) or over joints."""

    chunk_size: int
    """Padded tokens or steps of one Fisher product's graph."""

    def __call__(self, inputs: Any, *, with_entropy: bool = False) -> PolicyOutput:
        """Score every action."""
        ...

    def check_curvature(self) -> None:
        """Refuse what cannot be differentiated twice."""
        ...

    def curvature(self, inputs: Any, weights: Tensor) -> tuple[tuple[Tensor, ...], FisherMetric]:
        """The distribution's parameters at each action, with a graph, and their Fisher metric."""
        ...

    def kl_from_current(self, micro_batches: Sequence[Any]) -> list[Callable[[], Tensor]]:
        """For each micro-batch, a function that measures KL(π_here || π) [B, T] of whatever π has become by then."""
        ...

    def critic_parameters(self) -> list[nn.Parameter]:
        """Those of the value function alone."""
        ...

    def critic_states(self, inputs: Any) -> list[Tensor]:
        """What the value function reads at each action, one tensor [T_i, ...] a row."""
        ...

    def values_of(self, states: Tensor) -> Tensor:
        """V at such states, rows behind each other."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """Size and shape of the region, and how a step in it is found."""

    max_kl: float = 0.01
    """δ, nats per action: the step's KL in the quadratic model. A step beyond 1.5 δ of true mean KL is not accepted."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal for the direction, not for its length; language models need 0.1 to 1."""
    curvature_fraction: float = 0.25
    """Share of the rows that the Fisher products are computed on; gradient and line search see all rows."""
    cg_iterations: int = 10
    """Fisher products of the conjugate gradient."""
    shrink: float = 0.8
    """The line search tries shrink^k of the step, k = 0, 1, ..."""
    max_backtracks: int = 10
    """Shorter steps that are tried before the update is given up."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.max_kl > 0:
            raise ValueError(f"max_kl must be > 0, got {self.max_kl}: no step would be allowed. Usual: 0.01.")
        if not self.damping >= 0:
            raise ValueError(f"damping must be >= 0, got {self.damping}: the matrix would lose its sign. Usual: 0.1.")
        if not 0 < self.curvature_fraction <= 1:
            raise ValueError(
                f"curvature_fraction must be in (0, 1], got {self.curvature_fraction}: it is a share of the rows. "
                "Pass e.g. 0.25."
            )


def check_processes(accelerator: Accelerator) -> None:
    """Refuse sharded parameters and autocast."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise ValueError(
            f"expected whole parameters on every process, got {accelerator.distributed_type.value}: Fisher products "
            "differentiate the forward pass twice, and sharded parameters are freed after the first. Run TRPO on one "
            "process or with DDP, or use PPOClip or PPOPenalty."
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"expected mixed_precision='no', got {accelerator.mixed_precision!r}: a KL of 0.01 nats drowns in its "
            "rounding, and the line search would judge noise. Use float32, or PPOClip."
        )


def check_parameters(parameters: list[nn.Parameter]) -> None:
    """Refuse a policy of which nothing is trained, or in low precision."""
    if not parameters:
        raise ValueError("the policy has no trainable parameters, only its value head: unfreeze some, or add adapters")
    low = {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}
    if low:
        raise ValueError(
            f"expected trainable parameters in float32, got {sorted(map(str, low))}: a KL of 0.01 nats drowns in "
            "rounding. Load the model with dtype=torch.float32, or train float32 LoRA adapters, or use PPOClip."
        )
