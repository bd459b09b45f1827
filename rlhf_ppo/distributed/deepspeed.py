"""DeepSpeed ZeRO: settings for machines without a GPU, and an LM head that stays gathered during a pass."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn


def accelerator_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Accelerator`, plus what DeepSpeed needs without a GPU: the gloo backend, no shared-memory op.

    Without a backend name each process would run alone. DeepSpeed would compile its shared-memory op for minutes, and
    gloo does not need it.

    Raises:
        ValueError: ACCELERATE_USE_CPU is set, for which Accelerate silently drops DeepSpeed.
    """

    def is_set(name: str) -> bool:
        return os.environ.get(name, "false").lower() == "true"

    if not (is_set("ACCELERATE_USE_DEEPSPEED") or kwargs.get("deepspeed_plugin")) or torch.accelerator.is_available():
        return kwargs
    if is_set("ACCELERATE_USE_CPU"):
        raise ValueError(
            "expected either DeepSpeed or ACCELERATE_USE_CPU=true, got both: Accelerate would silently drop "
            "DeepSpeed and train with DDP. Unset ACCELERATE_USE_CPU; without a GPU, DeepSpeed finds the CPU by itself."
        )
    is_initialized = bool(PartialState._shared_state)
    if is_initialized or find_spec("deepspeed") is None:  # Accelerate has a message for the second
        return kwargs
    import deepspeed  # an extra

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    handlers = list(kwargs.get("kwargs_handlers") or [])
    if not any(isinstance(handler, InitProcessGroupKwargs) for handler in handlers):
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    return kwargs | {"kwargs_handlers": handlers}


def keep_torch_optimizer(accelerator: Accelerator) -> None:
    """On a CPU, let an offloaded optimizer stay torch's: DeepSpeed would compile its own."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and accelerator.device.type == "cpu":
        plugin.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)


def keep_head_gathered(policy: Any) -> None:
    """Gather the LM head once per pass and keep it until the optimizer step or the next full gather (ZeRO-3).

    The head runs once per chunk of response tokens and again in the backward pass. DeepSpeed would gather and
    release it each time: processes with different numbers of chunks would deadlock, and a recomputed chunk would see
    a weight of shape [0].

    Args:
        policy: The `TokenPolicy` itself, its parameters sharded.
    """
    embeddings = policy.language_model.get_output_embeddings()
    if not isinstance(embeddings, nn.Module):
        return
    parameters = [parameter for parameter in embeddings.parameters() if hasattr(parameter, "ds_id")]

    def gather_head(module: nn.Module, inputs: object) -> None:
        for parameter in parameters:
            state: Any = parameter
            if state.ds_status.name == "NOT_AVAILABLE":
                state.all_gather(param_list=[parameter])
            state.ds_active_sub_modules.add("rlhf_ppo")  # DeepSpeed releases a parameter only when this is empty

    policy.register_forward_pre_hook(gather_head)
