"""FSDP2: shard the policy, gather it for sampling and saving, shard loaded state.

Accelerate wraps the model with `fully_shard`: one group per layer, and the root's group for
embeddings, final norm and heads.
A pass gathers one layer at a time; sampling and saving need all of them, see `gathered_parameters`.
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
    """Let Accelerate use FSDP2 on the CPU, where it silently drops the plugin and runs DDP.

    Args:
        accelerator: The new `Accelerator`.
        plugin: The plugin passed to it; None: read it from the environment, which `accelerate launch` sets.

    Raises:
        ValueError: FSDP1, weights loaded on the main process only, or CPU offload on a CPU.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = plugin or FullyShardedDataParallelPlugin()
        for each_state in (state, PartialState()):  # further `AcceleratorState()`s copy the second
            each_state.distributed_type = DistributedType.FSDP
    if state.distributed_type != DistributedType.FSDP:
        return  # one process: nothing is sharded
    plugin_in_use = state.fsdp_plugin
    if plugin_in_use.fsdp_version != 2:
        raise ValueError(
            f"expected fsdp_version 2, got {plugin_in_use.fsdp_version}: FSDP1 flattens parameters, so they are "
            "no longer the model's own. Set `fsdp_version: 2` in the launch file, as recipes/launch/fsdp2.yaml does."
        )
    if plugin_in_use.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is on: all processes but the first would copy the reference from weights "
            "that they have not loaded. Set it to false in the launch file; each process then loads the model once."
        )
    if accelerator.device.type == "cpu" and isinstance(plugin_in_use.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "fsdp_offload_params is on, but all weights are on the CPU already: FSDP2's offload pins memory for an "
            "accelerator, and there is none. Use recipes/launch/fsdp2_cpu.yaml on the CPU."
        )


@contextmanager
def fsdp_sharding(accelerator: Accelerator) -> Iterator[None]:
    """Context manager: while active, Accelerate shards a model in the model's own precision, layer by layer.

    Accelerate's mixed-precision policy would round log-probabilities and gradients to 16 bits at the model's outputs;
    passes run under autocast instead, as under DDP (`set_fsdp_root`). Accelerate would also remember the layer class
    and look for it in the next model.
    """
    plugin = accelerator.state.fsdp_plugin
    saved = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    plugin.mixed_precision_policy = None
    try:
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = saved


def set_fsdp_root(policy: nn.Module, accelerator: Accelerator) -> None:
    """Make `policy` the FSDP2 root: the first module to run becomes it, and sampling would run an inner one first."""
    attributes = vars(policy)
    attributes["forward"] = _empty_forward
    try:
        with torch.no_grad():
            policy()
    finally:
        del attributes["forward"]
    attributes["forward"] = accelerator.autocast()(policy.forward)
    reshard(policy)


def _empty_forward() -> None:
    """Forward pass that runs only the FSDP hooks."""


@contextmanager
def gathered_parameters(policy: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Context manager: while active, all parameters under `policy` are unsharded, and passes are not collective.

    Processes may then run different numbers of passes. It takes one full copy in compute precision beside the shards,
    freed on exit. Do not move parameters or take a `state_dict` while it is active.

    Args:
        policy: The FSDP root.
        reshard_after_forward: The plugin's setting, restored for the inner modules on exit.
    """
    root, *inner = _fsdp_modules(policy)  # the root never reshards after a pass
    for module in (root, *inner):
        module.unshard()
    for module in inner:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in inner:
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)
        reshard(policy)


def reshard(policy: nn.Module) -> None:
    """Free unsharded parameters, so that `parameters()` are shards again. Not collective."""
    for module in _fsdp_modules(policy):
        module.reshard()


def gather_nested_tensors(tree: Any, *, keep: bool) -> Any:
    """Replace every sharded tensor in nested dicts, lists and tuples by its full value on the CPU. Collective.

    Gathers one tensor at a time on the device. Where `keep` is false, sharded tensors become None.
    """
    if isinstance(tree, dict):
        return {key: gather_nested_tensors(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gather_nested_tensors(value, keep=keep) for value in tree)
    if isinstance(tree, DTensor):
        full = tree.full_tensor()
        return full.cpu() if keep else None
    return tree


def shard_like(value: Any, parameter: Tensor) -> Any:
    """Shard `value` as `parameter` is sharded; return anything but a tensor of its shape unchanged."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    device = parameter.to_local().device
    return distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Shard a full optimizer `state_dict`, so that `optimizer` over sharded parameters can load it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    sharded = {
        index: {name: shard_like(value, parameter) for name, value in state["state"][index].items()}
        for index, parameter in zip(indices, parameters, strict=True)
        if index in state["state"]
    }
    return {**state, "state": sharded}


def _fsdp_modules(policy: nn.Module) -> list[FSDPModule]:
    """FSDP modules under `policy`, the root first."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]
