"""Prepare policy, reference and optimizer with Accelerate: for one device, DDP, FSDP2 or DeepSpeed."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_ppo.distributed.deepspeed import keep_head_gathered
from rlhf_ppo.distributed.fsdp import fsdp_sharding, set_fsdp_root
from rlhf_ppo.distributed.placement import ReferenceModel, place_reference
from rlhf_ppo.kernels.allocator import keep_freed_memory
from rlhf_ppo.kernels.liger_layers import use_liger_layers
from rlhf_ppo.kernels.linear_layers import use_fast_layers
from rlhf_ppo.kernels.varlen_attention import matches_plain_attention
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.precision import Precision, cast_linear_layers, use_float32_masters
from rlhf_ppo.models.scoring import TokenPolicy


@dataclass(frozen=True)
class PreparedModels:
    """Policy, optimizer, scheduler and reference, prepared for their device and the processes."""

    policy: Any
    """A `TokenPolicy`, wrapped by DDP, FSDP or DeepSpeed if several processes train it."""
    optimizer: Optimizer
    lr_scheduler: Any
    """Accelerate's wrapper of the given scheduler, or None."""
    reference: ReferenceModel | None
    """The frozen reference; None if the model is its own reference, with its adapters off."""


def prepare_models(
    accelerator: Accelerator,
    config: PPOConfig,
    model: PreTrainedModelWrapper,
    ref_model: PreTrainedModelWrapper | None,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    precision: Precision,
) -> PreparedModels:
    """Move models and optimizer to their device and wrap them for the processes.

    Raises:
        ValueError: A setting needs full parameters in a sharded launch, or sharded ones in another launch.
    """
    deepspeed_plugin = accelerator.state.deepspeed_plugin
    has_fsdp = accelerator.distributed_type == DistributedType.FSDP
    sharded = has_fsdp or (deepspeed_plugin is not None and deepspeed_plugin.zero_stage == 3)
    if sharded:
        _check_sharded(config)
    by_engine = deepspeed_plugin is not None or has_fsdp  # they replace layers and cast weights themselves
    if not by_engine:
        _use_float32_masters(model, ref_model)
    settings = _scoring_settings(accelerator.device, config, precision, sharded=sharded)
    token_policy = TokenPolicy(model, **settings)
    if config.gradient_checkpointing:
        enable_checkpointing(model, token_policy)
    if deepspeed_plugin is not None:
        # Sizes that the engine checks against each other and otherwise only reports.
        sizes = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": accelerator.num_processes}
        deepspeed_plugin.deepspeed_config.update(sizes)
    if accelerator.device.type == "cpu":
        _apply_cpu_settings(config, precision, [model, ref_model], may_replace_layers=not by_engine)
    with fsdp_sharding(accelerator) if has_fsdp else nullcontext():
        policy, optimizer = accelerator.prepare(token_policy, optimizer)
    if has_fsdp:
        set_fsdp_root(policy, accelerator)
    elif sharded:
        keep_head_gathered(token_policy)
    _use_gpu_layers(accelerator.device, precision, [] if by_engine else [model, ref_model])
    scheduler = None if lr_scheduler is None else accelerator.prepare_scheduler(lr_scheduler)
    reference = None
    if ref_model is not None:
        scorer = TokenPolicy(ref_model, **settings).requires_grad_(False)
        if not sharded and token_policy.paths and _are_alike(token_policy, scorer):  # proven: that may undo layers
            scorer.proven = token_policy.paths  # equal models by equal paths: otherwise they differ by rounding
        if not by_engine:
            _cast_reference(precision, scorer, model)
        reference = place_reference(scorer, accelerator, config.reference_placement, policy=list(model.parameters()))
        if not (token_policy.has_plain_head() and scorer.has_plain_head()):
            token_policy.fused_scoring = scorer.fused_scoring = False
    if not by_engine:
        _apply_precision(precision, token_policy)
    elif not sharded:  # else with the first forward pass, which is collective
        token_policy.paths  # noqa: B018  # proves them
    return PreparedModels(policy, optimizer, scheduler, reference)


def _are_alike(policy: TokenPolicy, reference: TokenPolicy) -> bool:
    """Whether policy and reference are of one architecture, down to every setting, and in one precision."""
    models = [policy.language_model, reference.language_model]
    settings = [{name: value for name, value in model.config.to_dict().items() if name[0] != "_"} for model in models]
    kinds = [(type(model), model.dtype, {type(module) for module in model.modules()}) for model in models]
    return settings[0] == settings[1] and kinds[0] == kinds[1]


def _scoring_settings(
    device: torch.device, config: PPOConfig, precision: Precision, *, sharded: bool
) -> dict[str, Any]:
    """Arguments of the `TokenPolicy` of policy and reference."""
    return {
        "temperature": config.temperature,
        "chunk_size": config.logits_chunk_size,
        "fused_head": config.fused_head,
        # A trial that some processes make and others do not would hang sharded ones.
        "packing": config.packing
        and not sharded
        and (device.type == "cpu" or matches_plain_attention(device, precision.compute)),
    }


def _check_sharded(config: PPOConfig) -> None:
    if config.kl_penalty == "full":
        raise ValueError(
            "kl_penalty='full' reads the LM heads of policy and reference at once, which ZeRO-3 and FSDP keep "
            "sharded between passes. Use kl_penalty='kl', or launch with DDP or ZeRO-2."
        )


def enable_checkpointing(model: PreTrainedModelWrapper, policy: TokenPolicy) -> None:
    """Let the layers recompute their activations in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    disable_dropout(model)
    policy.checkpointing = True


def _use_float32_masters(model: PreTrainedModelWrapper, ref_model: PreTrainedModelWrapper | None) -> None:
    """Give weights that are trained in half precision float32 masters; the reference then starts equal.

    A separate critic is a model of its own: a frozen base under the policy's adapters keeps its dtype beside it.
    """
    if model.critic is not None:
        use_float32_masters(model.critic)
    if use_float32_masters(model) and ref_model is not None:
        ref_model.float()


def _cast_reference(precision: Precision, reference: TokenPolicy, model: PreTrainedModelWrapper) -> None:
    _apply_precision(precision, reference)
    if precision.reference is not None:  # layers that it shares with the policy are saved in float32
        cast_linear_layers(reference.language_model, precision.reference, keep=model.parameters())


def _apply_precision(precision: Precision, policy: TokenPolicy) -> None:
    """Let passes compute in the dtypes of `precision`, once the fast paths have been proved in float32."""
    policy.paths  # noqa: B018  # proves them
    policy.trunk.autocast = precision.autocast
    policy.trunk.head_dtype = None if precision.autocast is None else precision.head


def _use_gpu_layers(device: torch.device, precision: Precision, models: list[PreTrainedModelWrapper | None]) -> None:
    for model in models if device.type == "cuda" else ():
        if model is not None:
            use_liger_layers(model, device, precision.compute)


def _apply_cpu_settings(
    config: PPOConfig, precision: Precision, models: list[PreTrainedModelWrapper | None], *, may_replace_layers: bool
) -> None:
    """Apply the settings that speed up training on a CPU: kept memory, fast linear layers."""
    if config.keep_freed_memory:
        keep_freed_memory()
    matmul_dtype = precision.compute if precision.autocast is None and precision.compute != torch.float32 else None
    if may_replace_layers and (config.fast_products or matmul_dtype is not None):
        for model in models:
            if model is not None:
                use_fast_layers(model, matmul_dtype=matmul_dtype)
