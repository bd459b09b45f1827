"""ZeRO-3: what a pass reads in several pieces stays whole for as long as the pass and its gradients need it."""

from typing import Any

from torch import nn


def keep_head_whole(policy: Any) -> None:
    """Gather the LM head once a pass, and hold it until the optimiser steps or everything is gathered anyway.

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
