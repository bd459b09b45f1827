"""What the processes of a run agree on: sums, gathered rows, parameters made whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from trl.models.utils import add_hooks, remove_hooks

from rlhf_ppo.distributed import fsdp

Result = TypeVar("Result")


class Processes:
    """The collective operations of the trainer. Every process calls each of them, in the same order.

    Args:
        accelerator: Knows the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        engine = accelerator.state.deepspeed_plugin
        self.has_zero3 = engine is not None and engine.zero_stage == 3
        """Whether a process holds only parts of each parameter, in DeepSpeed's way."""
        self.has_fsdp = accelerator.distributed_type == DistributedType.FSDP
        """The same in FSDP2's way."""
        self.sharded = self.has_zero3 or self.has_fsdp
        """Whether a forward pass of one process needs all the others."""

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on each of them."""
        reduced: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return reduced

    def reduce_max(self, tensor: Tensor) -> Tensor:
        """The largest entry over processes, on each of them, in main memory."""
        return self.gather(tensor).max()

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, one below the other, in main memory."""
        gathered: Tensor = self.accelerator.gather(tensor.to(self.accelerator.device))
        return gathered.cpu()

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The entries of all processes' lists, in the order of the processes."""
        gathered: list[Any] = gather_object(values) if self.accelerator.num_processes > 1 else values
        return gathered

    def together(self, work: Callable[[], Result]) -> Result:
        """`work()` on every process; if it refuses on one, all refuse, before anybody waits for the others.

        Args:
            work: Holds no collective operation.

        Raises:
            ValueError: It raised elsewhere; the message says where and what. Its own exception where it raised.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        said = self.gather_objects([None if error is None else f"{type(error).__name__}: {error}"])
        if error is not None:
            raise error
        refused = [f"process {rank}: {sentence}" for rank, sentence in enumerate(said) if sentence is not None]
        if refused:
            raise ValueError(f"another process refused, so none goes on with its part. {refused[0]}")
        return result

    def max_passes(self, passes: int) -> int:
        """Forward passes that this process must make: where models are sharded, as many as the busiest one."""
        return int(self.gather(torch.tensor(passes)).max()) if self.sharded else passes

    @contextmanager
    def gathered_parameters(self, model: nn.Module, policy: nn.Module) -> Iterator[None]:
        """Inside, `model` holds every parameter whole on every process: for sampling under ZeRO-3 and FSDP2.

        One copy of the model must fit beside the parts. `policy` is the prepared module around it.
        """
        if self.has_fsdp:
            with fsdp.gathered(policy, reshards=bool(self.accelerator.state.fsdp_plugin.reshard_after_forward)):
                yield
            return
        if not self.has_zero3:
            yield
            return
        import deepspeed  # an extra

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            remove_hooks(policy)  # they would gather and release each layer once more
            try:
                yield
            finally:
                add_hooks(policy)

    @contextmanager
    def gathered_state_dict(self, model: nn.Module, policy: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Inside, the `state_dict` of `model` with whole tensors, on the main process; empty on the others."""
        keep = self.accelerator.is_main_process
        if self.has_fsdp:
            fsdp.reshard(policy)
            state: dict[str, Tensor] = fsdp.gather_nested_tensors(dict(model.state_dict()), keep=keep)
            yield state if keep else {}
        else:
            with self.gathered_parameters(model, policy):
                yield dict(model.state_dict()) if keep else {}
