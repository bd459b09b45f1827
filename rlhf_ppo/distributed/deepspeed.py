"""DeepSpeed ZeRO, also on machines without a GPU: settings, and an LM head that stays gathered through a pass."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn


def accelerator_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Accelerator`, with what DeepSpeed needs beyond the launch file where there is no GPU.

    Without the name of a backend each process would believe that it is alone. DeepSpeed would also compile a way
    through shared memory first, for minutes, and gloo needs none.

    Raises:
        ValueError: The environment asks for the CPU in the one way that makes Accelerate drop DeepSpeed in silence.
    """

    def is_set(name: str) -> bool:
        return os.environ.get(name, "false").lower() == "true"

    if not (is_set("ACCELERATE_USE_DEEPSPEED") or given.get("deepspeed_plugin")) or torch.accelerator.is_available():
        return given
    if is_set("ACCELERATE_USE_CPU"):
        raise ValueError(
            "expected either DeepSpeed or ACCELERATE_USE_CPU=true, got both: Accelerate would drop DeepSpeed without a "
            "word and train by DDP. Unset ACCELERATE_USE_CPU; without a GPU, DeepSpeed finds the CPU by itself."
        )
    connected_already = bool(PartialState._shared_state)
    if connected_already or find_spec("deepspeed") is None:  # Accelerate has a message for the second
        return given
    import deepspeed  # an extra

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    handlers = list(given.get("kwargs_handlers") or [])
    if not any(isinstance(handler, InitProcessGroupKwargs) for handler in handlers):
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    return given | {"kwargs_handlers": handlers}


def keep_torch_optimizer(accelerator: Accelerator) -> None:
    """Without a GPU, leave torch's optimizer where the launch file offloads it: DeepSpeed's own would be compiled."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and accelerator.device.type == "cpu":
        plugin.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)


def keep_head_gathered(policy: Any) -> None:
    """Gather the LM head once a pass, and hold it until the optimizer steps or everything is gathered anyway.

    The head runs once for each chunk of response tokens and again in the backward pass. DeepSpeed would gather and
    release it each time: processes whose responses fill different numbers of chunks would wait for each other for
    ever, and a chunk computed again would find a weight of shape [0].

    Args:
        policy: The `TokenPolicy` itself, its parameters in parts.
    """
    embeddings = policy.language_model.get_output_embeddings()
    if not isinstance(embeddings, nn.Module):
        return
    parameters = [parameter for parameter in embeddings.parameters() if hasattr(parameter, "ds_id")]

    def hold(module: nn.Module, arguments: object) -> None:
        for parameter in parameters:
            state: Any = parameter
            if state.ds_status.name == "NOT_AVAILABLE":
                state.all_gather(param_list=[parameter])
            state.ds_active_sub_modules.add("rlhf_ppo")  # what DeepSpeed looks at before it releases

    policy.register_forward_pre_hook(hold)
