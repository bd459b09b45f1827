"""Which dtype each part of a run has on which device: master weights, matrix products, LM head, sampler, reference."""

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.functional.masked import HALF_PRECISION

logger = logging.getLogger(__name__)

PrecisionName: TypeAlias = Literal["auto", "float32", "bf16", "fp16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes of the parts of a run; norms, softmaxes, losses and the optimizer's state are float32 throughout.

    So are trained weights: steps of PPO's size are lost in the rounding of bfloat16.
    """

    compute: torch.dtype = torch.float32
    """Of the matrix products of layers, forward and backward."""
    head: torch.dtype = torch.float32
    """Of the matrix products of the LM head; their results are float32 on a GPU."""
    sampler: torch.dtype = torch.float32
    """Of the matrix products while sampling: those of scoring, else the two would disagree."""
    reference: torch.dtype | None = None
    """Of the weights of the reference's linear layers; None: as loaded."""
    tf32: bool = False
    """Whether float32 products on a GPU may round their operands to TensorFloat-32."""
    autocast: torch.dtype | None = None
    """Dtype of `torch.autocast` around the layers; None: layers cast themselves, or nothing is cast."""

    def __str__(self) -> str:
        parts = {"products": self.compute, "reference": self.reference}
        parts |= {"LM head": self.head} if self.head != self.compute else {}
        parts |= {"sampler": self.sampler} if self.sampler != self.compute else {}
        said = [f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in parts.items() if dtype is not None]
        tf32 = ["float32 products in TF32"] if self.tf32 else []
        return ", ".join(["precision: trained weights in float32", *said, *tf32])

    def sampling(self, device: torch.device) -> AbstractContextManager[object]:
        """Context manager: while active, a sampler's layers compute as those of the policy do."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)


def requested_precision(
    precision: PrecisionName, *, bf16: bool, mixed_precision: str | None, device: torch.device, float32_only: bool
) -> PrecisionName:
    """The precision that settings ask for together; "auto" where none does.

    Args:
        mixed_precision: Of Accelerate, where set by a script or launch file; None where not.
        float32_only: Whether the algorithm works in float32 alone; it is then chosen unless another one is asked for.

    Raises:
        ValueError: They contradict each other, or the device computes bfloat16 only by emulation.
    """
    asked: dict[str, str] = {} if precision == "auto" else {f"precision={precision!r}": precision}
    if bf16:
        asked["bf16=True"] = "bf16"
    if mixed_precision is not None:
        asked[f"mixed_precision={mixed_precision!r}"] = "float32" if mixed_precision == "no" else mixed_precision
    if len(set(asked.values())) > 1:
        raise ValueError(
            f"expected one precision, got {' and '.join(asked)}: they contradict each other. Keep precision= alone."
        )
    name = next(iter(asked.values()), "float32" if float32_only else "auto")
    if name == "bf16" and device.type == "cuda" and not has_bfloat16(device):
        raise ValueError(
            f"expected a GPU with bfloat16 (compute capability 8.0 or more), got {torch.cuda.get_device_name(device)}: "
            "it would emulate bfloat16, slower than float32. Use precision='auto', which is float16 here."
        )
    if name not in ("auto", *DTYPES):
        raise ValueError(f"mixed_precision must be 'no', 'bf16' or 'fp16', got {name!r}: use one of them.")
    return name  # type: ignore[return-value]


def choose_precision(name: PrecisionName, device: torch.device, *, autocast_on_cpu: bool = False) -> Precision:
    """The dtypes of a run.

    Args:
        name: "auto": bfloat16 on a GPU that has it (compute capability 8.0), float16 on an older one, else float32.
        autocast_on_cpu: Whether Accelerate was asked for autocast on a CPU; otherwise linear layers cast themselves.
    """
    if device.type != "cuda":
        compute = torch.float32 if name == "auto" else DTYPES[name]
        if autocast_on_cpu:
            return Precision(compute=compute, sampler=compute, autocast=compute)
        return Precision(compute=compute, head=compute, sampler=compute)
    if name == "auto":
        name = "bf16" if has_bfloat16(device) else "fp16"
    if name == "float32":
        return Precision()
    dtype = DTYPES[name]
    return Precision(compute=dtype, head=dtype, sampler=dtype, reference=dtype, tf32=True, autocast=dtype)


def has_bfloat16(device: torch.device | None = None) -> bool:
    """Whether a GPU computes bfloat16 itself. `torch.cuda.is_bf16_supported()` counts emulation, too."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def accelerate_device(*, cpu: bool) -> torch.device:
    """The kind of device that Accelerate will choose, before it has."""
    on_cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def use_float32_masters(model: nn.Module) -> int:
    """Turn a model whose trained weights are in half precision into a float32 one, in place; how many were trained so.

    At a learning rate of 1e-5 nearly all of an optimizer's steps are smaller than half the distance between two
    bfloat16 numbers, and such a weight does not move.
    """
    halves = [weight for weight in model.parameters() if weight.dtype in HALF_PRECISION]
    trained = sum(weight.requires_grad for weight in halves)
    if trained:
        for tensor in (*halves, *(buffer for buffer in model.buffers() if buffer.dtype in HALF_PRECISION)):
            tensor.data = tensor.data.float()
        logger.info("%d trained weights were loaded in half precision: they are float32 now", trained)
    return trained


def cast_linear_layers(model: nn.Module, dtype: torch.dtype, *, keep: Iterable[nn.Parameter] = ()) -> None:
    """Cast the weights of a frozen model's linear layers, in place; its calls then run under autocast to that dtype.

    Results are those of float32 weights under autocast. Embeddings, norms and weights tied to embeddings stay as they
    are, and so does what is trained or in `keep`.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    kept = {id(weight) for weight in (*keep, *(weight for module in embeddings for weight in module.parameters()))}
    for module in model.modules():
        for weight in module.parameters(recurse=False) if type(module) in (nn.Linear, Conv1D) else ():
            if not weight.requires_grad and weight.dtype == torch.float32 and id(weight) not in kept:
                weight.data = weight.data.to(dtype)
    contexts: list[torch.autocast] = []

    def enter(module: nn.Module, inputs: object) -> None:
        contexts.append(torch.autocast(next(module.parameters()).device.type, dtype=dtype))
        contexts[-1].__enter__()

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        contexts.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
