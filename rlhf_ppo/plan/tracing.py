"""Count live bytes of real code run on fake tensors, without computing anything."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.kernels import chunk_sizes, memory
from rlhf_ppo.kernels.matmul import bfloat16_is_faster, onednn_is_faster


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of all storages made by operations, while they live.

    Counts PyTorch's allocations, not those inside libraries (workspaces of matrix kernels, free blocks of an
    allocator).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes alive at once since `reset_peak`."""
        self.page_mapped = 0
        """Bytes since `reset_peak` of tensors that `kernels.memory` would map in their own pages, outside the heap."""
        self._storages: set[int] = set()

    def reset_peak(self) -> int:
        """Reset the peak to the live bytes and return these."""
        self.peak, self.page_mapped = self.live, 0
        return self.live

    def empty(self, shape: Sequence[int], *, like: Tensor, capacity: int = 0) -> Tensor:
        """Replacement for `rlhf_ppo.kernels.memory.empty`, which cannot map a fake tensor."""
        size = math.prod(shape) * like.element_size()
        self.page_mapped += size if size >= memory.MIN_BYTES else 0
        return like.new_empty(shape)

    def exclude(self, tensors: Iterator[Tensor]) -> None:
        """Do not count these tensors (weights)."""
        self._storages.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The code checks whether a mask is all True and whether a difference is 0. For fake tensors the answer is yes.
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return True if args[0].dtype is torch.bool else 0
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._on_free, key, size)

    def _on_free(self, key: int, size: int) -> None:
        self.live -= size
        self._storages.discard(key)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


class FakeInputs(TokenInputs):
    """Fake token ids with real lengths."""

    def response_lengths(self) -> Int[Tensor, " batch"]:
        with unset_fake_temporarily():
            return super().response_lengths()

    def costs(self) -> Int[Tensor, " batch"]:
        with unset_fake_temporarily():
            return super().costs()


def build_fake(build: Callable[[], nn.Module], fake_mode: FakeTensorMode) -> nn.Module:
    """Build a module whose parameters and buffers are fake CPU tensors, by calling `build`.

    It is built on the meta device, where all conversions work, and then gets fake CPU tensors, on which attention,
    autocast and checkpointing run as in training.
    """
    with torch.device("meta"):
        module = build()
    replaced: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            with fake_mode:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                replaced[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return replaced[id(tensor)]

    for submodule in module.modules():
        for tensors_by_name in (submodule._parameters, submodule._buffers):
            for name, tensor in list(tensors_by_name.items()):
                if tensor is not None:
                    tensors_by_name[name] = empty(tensor)  # type: ignore[assignment]
    return module


@contextmanager
def count_live_bytes(module: nn.Module, fake_mode: FakeTensorMode, *, device: str = "cpu") -> Iterator[LiveBytes]:
    """Context manager: while active, tensors are fake and their live bytes are counted, without the module's own.

    All are CPU tensors; for device "cuda", chunks of logits have the size that they have there.
    """
    # Which matrix products are faster is measured once per process, which fake tensors do not allow.
    onednn_is_faster(), bfloat16_is_faster()
    counter = LiveBytes()
    counter.exclude(iter([*module.parameters(), *module.buffers()]))
    # For fake tensors transformers makes a mask that it omits for real tensors without padding.
    mask_patch = patch.object(masking_utils, "is_tracing", lambda _=None: False)
    chunk_patch = patch.object(chunk_sizes, "CPU_SIZES", chunk_sizes.chunk_sizes(torch.device(device)))
    with mask_patch, chunk_patch, patch.object(memory, "empty", counter.empty), fake_mode, counter:
        yield counter
