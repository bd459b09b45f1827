"""Tensors over that socket, in the order in which the client announced them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


def packed_nccl_broadcast_producer(
    iterator: Iterator[Any], group: Any, src: int, post_iter_func: Callable[[Any], torch.Tensor]
) -> None:
    for item in iterator:
        tensor = post_iter_func(item).detach().contiguous()
        group.group.socket.sendall(tensor.flatten().view(torch.uint8).numpy().tobytes())
