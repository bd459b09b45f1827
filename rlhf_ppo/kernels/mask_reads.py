"""Keep the host from reading attention masks on a GPU: it would wait for the device in every forward pass.

`transformers` reads whether a mask is all ones, to leave it out, and whether positions are those of packed rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import masking_utils


def right_padded_mask(ids: Tensor) -> Tensor | None:
    """The mask of rows padded on the right: on a GPU none, elsewhere ones, without which some models warn."""
    return None if ids.device.type == "cuda" else torch.ones_like(ids)


@contextmanager
def skip_mask_reads(device: torch.device) -> Iterator[None]:
    """Context manager: while active, on a GPU, a given mask is always applied, and rows without one are not packed."""
    if device.type != "cuda":
        yield
        return
    with (
        patch.object(masking_utils, "is_tracing", lambda _=None: True),
        patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None),
    ):
        yield
