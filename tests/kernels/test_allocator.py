"""Freed memory stays with the process, and compiled products do not pile up."""

import os
import subprocess
import sys

import pytest

from rlhf_ppo.kernels.allocator import MAX_CACHED_KERNELS, keep_freed_memory, limit_kernel_caches

FAULTS = """
import resource, torch
from rlhf_ppo.kernels.allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
def use():
    torch.ones(2**24)  # 64 MiB
for _ in range(40):  # at first, small blocks behind the freed one may keep it from being large enough
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

LENGTHS = """
import os, psutil, torch
from rlhf_ppo.kernels.matmul import _by_onednn, onednn_is_faster
onednn_is_faster()
weight = torch.randn(384, 1024)
_by_onednn(torch.randn(300, 384), weight)
before = psutil.Process().memory_info().rss
for length in range(100, 300):
    _by_onednn(torch.randn(length, 384), weight)
print((psutil.Process().memory_info().rss - before) // 2**20)
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"])
"""


def run(program: str, **environment: str) -> list[str]:
    known = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True, env={**known, **environment}
    )
    return found.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="this C library does not take the order")
def test_a_large_tensor_after_another_touches_no_new_page() -> None:
    """64 MiB are at least 32 pages, and 16 384 where the system uses small ones."""
    faults = [int(run(FAULTS.format(keep=keep))[0]) for keep in (False, True)]
    assert faults[1] < 0.1 * faults[0]


@pytest.mark.slow
def test_products_of_ever_new_lengths_leave_little_behind() -> None:
    """Each keeps a work space of its weight's size, 1.5 MiB here: 200 of them without a limit."""
    ours, theirs = run(LENGTHS), run(LENGTHS, ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024")
    assert ours[1:] == [str(MAX_CACHED_KERNELS)] * 2 and theirs[1:] == ["1024", "1024"]
    assert int(ours[0]) <= 0.6 * int(theirs[0]) or int(theirs[0]) < 100  # other processors' kernels keep less


def test_kernel_caches_are_bounded_and_the_users_own_limit_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1000")
    limit_kernel_caches()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(MAX_CACHED_KERNELS)
    assert os.environ["LRU_CACHE_CAPACITY"] == "1000"
