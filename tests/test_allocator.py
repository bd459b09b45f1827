"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from rlhf_ppo.allocator import keep_freed_memory

FAULTS = """
import resource, torch
from rlhf_ppo.allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
def use():
    torch.ones(2**24)  # 64 MiB
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="this C library does not take the order")
def test_a_large_tensor_after_another_touches_no_new_page() -> None:
    """64 MiB are at least 32 pages, and 16 384 where the system uses small ones."""
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    ]
    assert faults[1] < 0.1 * faults[0]
