"""What the C library does with memory that a tensor has given back."""

import ctypes
import logging
import sys
from functools import cache

logger = logging.getLogger(__name__)

# <malloc.h> of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


@cache
def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors for the next ones; whether the C library took the order.

    By default glibc hands every freed block of more than 32 MiB back to the kernel, which clears each page when the
    next tensor touches it. The peak grows, because blocks of many sizes no longer fit into each other's places. It
    holds for the whole process, until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    logger.info("memory of freed tensors is %s", "kept" if kept else "given back")
    return kept
