"""What training the small model and adapting a pretrained one share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def batches(rows: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of rows without end, each pass in a new order; what is left of a pass is dropped."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for begin in range(0, len(rows) - size + 1, size):
            yield rows[order[begin : begin + size]]


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 if the device computes with it; a CPU that only imitates it would be slower."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool(torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()
