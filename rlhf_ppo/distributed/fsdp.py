"""FSDP2: parameters in parts on every process, whole where somebody needs them whole.

Accelerate wraps the model (`fully_shard`: every layer a group of its own, embeddings, final norm and heads in the group
of the root). A pass gathers one layer at a time; sampling and saving need all of them, see `gathered`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def enable_fsdp2_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let Accelerate use FSDP2 on the CPU, too: it drops the plugin there without a word and would run DDP.

    Args:
        accelerator: Just made.
        plugin: What it was given; None: the environment, which `accelerate launch` fills from the launch file, says.

    Raises:
        ValueError: FSDP1, or weights that only the main process has.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = plugin or FullyShardedDataParallelPlugin()
        for known in (state, PartialState()):  # the second is what every further `AcceleratorState()` starts from
            known.distributed_type = DistributedType.FSDP
    if state.distributed_type != DistributedType.FSDP:
        return  # one process: nothing is shared out
    found = state.fsdp_plugin
    if found.fsdp_version != 2:
        raise ValueError(
            f"expected fsdp_version 2, got {found.fsdp_version}: FSDP1 flattens parameters, so that they are no longer "
            "those of the model. Set `fsdp_version: 2` in the launch file, as recipes/launch/fsdp2.yaml does."
        )
    if found.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is on: all processes but one would copy the reference from weights that "
            "they have not loaded. Set it to false in the launch file; each process then loads the model once."
        )
    if accelerator.device.type == "cpu" and isinstance(found.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "fsdp_offload_params is on, but everything is in main memory already: FSDP2's offload pins memory for an "
            "accelerator, and there is none. Use recipes/launch/fsdp2_cpu.yaml on the CPU."
        )


@contextmanager
def fsdp_sharding(accelerator: Accelerator) -> Iterator[None]:
    """Context manager: while active, Accelerate shards a model in its own precision, by its own kind of layers.

    Accelerate's mixed-precision policy would round log-probabilities and gradients to 16 bits where they leave the
    model; passes run under autocast instead, as they do under DDP (`set_fsdp_root`). And Accelerate would remember the
    kind of layers and look for it in the next model.
    """
    plugin = accelerator.state.fsdp_plugin
    kept = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    plugin.mixed_precision_policy = None
    try:
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = kept


def set_fsdp_root(policy: nn.Module, accelerator: Accelerator) -> None:
    """Tell FSDP2 which module is the outermost: it takes the first that runs, and sampling would run an inner one."""
    own = vars(policy)
    own["forward"] = _nothing
    try:
        with torch.no_grad():
            policy()
    finally:
        del own["forward"]
    own["forward"] = accelerator.autocast()(policy.forward)
    reshard(policy)


def _nothing() -> None:
    """A forward pass of which only the hooks matter."""


@contextmanager
def gathered(policy: nn.Module, *, reshards: bool) -> Iterator[None]:
    """Inside, every parameter is whole on every process, and passes of the modules under `policy` gather nothing.

    Processes may therefore make different numbers of passes. The price: one whole copy in the precision of the passes,
    beside the parts; given back on leaving. Nothing that moves parameters or takes a `state_dict` belongs inside.

    Args:
        policy: The root.
        reshards: Whether layers otherwise give their whole parameters back after each pass.
    """
    root, *inner = _groups(policy)  # the root keeps its own parameters whole after a pass
    for module in (root, *inner):
        module.unshard()
    for module in inner:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in inner:
            module.set_reshard_after_forward(reshards, recurse=False)
        reshard(policy)


def reshard(policy: nn.Module) -> None:
    """Give whole parameters back: `parameters()` are parts again. Without a collective operation."""
    for module in _groups(policy):
        module.reshard()


def gather_nested_tensors(tree: Any, *, keep: bool) -> Any:
    """The same nested dicts, lists and tuples with every tensor in parts made whole, in main memory.

    All processes call it. One tensor at a time is whole on the device; where `keep` is false nothing of it stays.
    """
    if isinstance(tree, dict):
        return {key: gather_nested_tensors(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gather_nested_tensors(value, keep=keep) for value in tree)
    if isinstance(tree, DTensor):
        found = tree.full_tensor()
        return found.cpu() if keep else None
    return tree


def shard_like(value: Any, parameter: Tensor) -> Any:
    """This process's part of `value`, cut as `parameter` is; anything else than a tensor of its shape as it is."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    device = parameter.to_local().device
    return distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The `state_dict` of an optimizer over whole parameters, as one over these parameters loads it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    parts = {
        index: {name: shard_like(value, parameter) for name, value in state["state"][index].items()}
        for index, parameter in zip(indices, parameters, strict=True)
        if index in state["state"]
    }
    return {**state, "state": parts}


def _groups(policy: nn.Module) -> list[FSDPModule]:
    """Modules whose parameters are shared out together, the root first."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]
