"""Settings of glibc's allocator and of the kernel caches of torch and oneDNN."""

import ctypes
import logging
import os
import sys
from functools import cache

logger = logging.getLogger(__name__)

# <malloc.h> of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


MAX_CACHED_KERNELS = 24
"""Compiled products that oneDNN and torch keep each: a little more than one pass of training needs."""


def limit_kernel_caches() -> None:
    """Limit the caches of compiled kernels of oneDNN and torch; only has an effect before their first product.

    A product is compiled for its shape, in a fraction of a millisecond, and kept with a work space as large as its
    weight. Rows of language have ever new lengths, so that hundreds of megabytes come together, scattered between the
    tensors. Environment variables that are set already stay as they are.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(MAX_CACHED_KERNELS))


@cache
def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors for the next ones; whether the C library took the order.

    By default glibc hands every freed block of more than 32 MiB back to the kernel, which clears each page when the
    next tensor touches it. It holds for the whole process, until it ends.
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
