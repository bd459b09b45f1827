"""How much memory a call needs, counted by PyTorch's allocator: the same numbers on every machine."""

import math
from collections.abc import Callable
from itertools import accumulate
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile

from rlhf_ppo.kernels import memory


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors that the call holds at once on the CPU, beyond those that were there before."""
    return max(accumulate(_changes(function)), default=0)


def allocated_bytes(function: Callable[[], object]) -> int:
    """Bytes of all tensors that the call brings to life on the CPU, one after the other."""
    return sum(change for change in _changes(function) if change > 0)


def _changes(function: Callable[[], object]) -> list[int]:
    """Tensors in pages of their own go to the heap here: the allocator that counts knows nothing of such memory."""
    heap = patch.object(memory, "MIN_BYTES", math.inf)
    with heap, profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]
