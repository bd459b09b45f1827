"""Fingerprint of weights: equal for equal models, and cheap however large they are."""

import hashlib
from collections.abc import Iterable

from torch import Tensor

_ENTRIES = 64
"""Number of entries of each tensor in the fingerprint."""


def weights_fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the name, the shape and some entries of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in named:
        flat = tensor.detach().flatten()
        entries = flat[:: max(1, flat.numel() // _ENTRIES)][:_ENTRIES]
        digest.update(f"{name} {tuple(tensor.shape)} {entries.float().tolist()}".encode())
    return digest.hexdigest()
