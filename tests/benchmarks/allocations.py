"""How much memory a call needs, counted by PyTorch: the same numbers on every machine."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_ppo.kernels import memory


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors that the call holds at once on the CPU, beyond those that were there before."""
    return max(accumulate(_changes(function)), default=0)


def returned_bytes(function: Callable[[], object]) -> int:
    """Bytes of all tensors that operators return during the call, except views and results in given tensors.

    What an operator takes for itself is left out: a bfloat16 product may copy its operands, or not, by processor.
    """
    with patch.object(memory, "MIN_BYTES", math.inf), _Returned() as record:
        function()
    return record.bytes


class _Returned(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self.bytes += leaf.untyped_storage().nbytes()
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _changes(function: Callable[[], object]) -> list[int]:
    """Tensors in pages of their own go to the heap here: the allocator that counts knows nothing of such memory."""
    heap = patch.object(memory, "MIN_BYTES", math.inf)
    with heap, profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]
