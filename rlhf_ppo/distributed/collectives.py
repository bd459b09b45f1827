"""Collective operations: sums, gathered rows, unsharded parameters."""

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
    """Collective operations of the trainer. Every process must call each of them, in the same order.

    Args:
        accelerator: The run's `Accelerator`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        engine = accelerator.state.deepspeed_plugin
        self.has_zero3 = engine is not None and engine.zero_stage == 3
        """Whether DeepSpeed ZeRO-3 shards the parameters."""
        self.has_fsdp = accelerator.distributed_type == DistributedType.FSDP
        """Whether FSDP2 shards the parameters."""
        self.sharded = self.has_zero3 or self.has_fsdp
        """Whether a forward pass is collective: parameters are sharded."""

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, returned on each of them."""
        reduced: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return reduced

    def reduce_max(self, tensor: Tensor) -> Tensor:
        """Largest entry over all processes, 0-dim on the CPU of each of them."""
        return self.gather(tensor).max()

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all processes, concatenated along dim 0, on the CPU."""
        gathered: Tensor = self.accelerator.gather(tensor.to(self.accelerator.device))
        return gathered.cpu()

    def any_process(self, holds: bool) -> bool:
        """Whether a condition holds on any process."""
        return float(self.reduce_sum(torch.tensor(float(holds), device=self.accelerator.device))) > 0

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """Concatenate the lists of all processes, in rank order."""
        gathered: list[Any] = gather_object(values) if self.accelerator.num_processes > 1 else values
        return gathered

    def run_or_fail_together(self, work: Callable[[], Result]) -> Result:
        """Run `work()` on every process; if it raises on one, raise on all, so that none waits in a collective.

        Args:
            work: Must not call collective operations.

        Raises:
            ValueError: `work` raised on another process; the message has its rank and error. Where `work` itself
                raised, its own exception is raised.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        errors = self.gather_objects([None if error is None else f"{type(error).__name__}: {error}"])
        if error is not None:
            raise error
        failures = [f"process {rank}: {message}" for rank, message in enumerate(errors) if message is not None]
        if failures:
            raise ValueError(f"another process refused, so all processes stop. {failures[0]}")
        return result

    def max_passes(self, passes: int) -> int:
        """Number of forward passes to run here: the maximum over processes if models are sharded, else `passes`."""
        return int(self.gather(torch.tensor(passes)).max()) if self.sharded else passes

    @contextmanager
    def gathered_parameters(self, model: nn.Module, policy: nn.Module) -> Iterator[None]:
        """Context manager: while active, `model` is unsharded on every process, for sampling under ZeRO-3 and FSDP2.

        One full copy of the model must fit beside the shards. `policy` is the prepared module around `model`.
        """
        if self.has_fsdp:
            with fsdp.gathered_parameters(
                policy, reshard_after_forward=bool(self.accelerator.state.fsdp_plugin.reshard_after_forward)
            ):
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
        """Context manager: yield the full `state_dict` of `model` on the main process, {} on the others."""
        keep = self.accelerator.is_main_process
        if self.has_fsdp:
            fsdp.reshard(policy)
            state: dict[str, Tensor] = fsdp.gather_nested_tensors(dict(model.state_dict()), keep=keep)
            yield state if keep else {}
        else:
            with self.gathered_parameters(model, policy):
                yield dict(model.state_dict()) if keep else {}
