"""Live bytes of a computation that is never carried out: the real code on tensors without content."""

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
from rlhf_ppo.kernels import head_walk, memory
from rlhf_ppo.kernels.matmul import bfloat16_is_faster, onednn_is_faster


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, from their birth to their end.

    It sees what PyTorch allocates, not what a library takes for itself (workspaces of matrix kernels, an allocator's
    spare blocks).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes alive at once since `restart`."""
        self.paged = 0
        """Bytes of tensors that would have had pages of their own, outside of the heap, since `restart`."""
        self._alive: set[int] = set()

    def restart(self) -> int:
        """Forget the peak; returns the bytes alive."""
        self.peak, self.paged = self.live, 0
        return self.live

    def empty(self, shape: Sequence[int], *, like: Tensor, room_for: int = 0) -> Tensor:
        """In the place of `rlhf_ppo.kernels.memory.empty`: a tensor without content has no memory."""
        size = math.prod(shape) * like.element_size()
        self.paged += size if size >= memory.LEAST else 0
        return like.new_empty(shape)

    def leave_out(self, tensors: Iterator[Tensor]) -> None:
        """Not to be counted: what was there before (weights)."""
        self._alive.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The code asks whether a mask is all True and whether a difference is 0. Without content the answer is yes.
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_content(args[0]):
            return True if args[0].dtype is torch.bool else 0
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self.live -= size
        self._alive.discard(key)


def _has_no_content(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


class ShapedInputs(TokenInputs):
    """Tokens of which only the number counts; their lengths are known although their values are not."""

    def response_lengths(self) -> Int[Tensor, " batch"]:
        with unset_fake_temporarily():
            return super().response_lengths()

    def costs(self) -> Int[Tensor, " batch"]:
        with unset_fake_temporarily():
            return super().costs()


def without_content(build: Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """The module that `build` makes, with parameters of the right shape and type on the CPU and nothing in them.

    It is built on the meta device, where everything can be converted, and then given CPU tensors, for which attention,
    autocast and checkpointing take the paths that they take in training.
    """
    with torch.device("meta"):
        module = build()
    made: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                content = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(content, tensor.requires_grad) if is_parameter else content
        return made[id(tensor)]

    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in list(store.items()):
                if tensor is not None:
                    store[name] = empty(tensor)  # type: ignore[assignment]
    return module


@contextmanager
def counting(module: nn.Module, mode: FakeTensorMode, *, device: str = "cpu") -> Iterator[LiveBytes]:
    """Inside, tensors have no content, and their bytes are counted; the module's own are not.

    They are CPU tensors in any case; for "cuda", chunks of logits are as large as they are there.
    """
    # Which products are faster is measured once a process, and cannot be measured on tensors without content.
    onednn_is_faster(), bfloat16_is_faster()
    live = LiveBytes()
    live.leave_out(iter([*module.parameters(), *module.buffers()]))
    # Where transformers sees tensors without content, it makes a mask that it leaves out for real ones without padding.
    masks = patch.object(masking_utils, "is_tracing", lambda _=None: False)
    chunks = patch.object(head_walk, "ON_CPU", head_walk.sizes(torch.device(device)))
    with masks, chunks, patch.object(memory, "empty", live.empty), mode, live:
        yield live
