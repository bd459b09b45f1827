"""Policy, reference and optimizer handed to Accelerate, as processes and engine need them."""

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
from rlhf_ppo.distributed.placement import Reference, place_reference
from rlhf_ppo.kernels.allocator import keep_freed_memory
from rlhf_ppo.kernels.linear_layers import use_fast_layers
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.scoring import TokenPolicy


@dataclass(frozen=True)
class PreparedModels:
    """What the trainer works with."""

    policy: Any
    """Scores batches: a `TokenPolicy`, wrapped where several processes train it (by DDP, FSDP or DeepSpeed)."""
    optimizer: Optimizer
    lr_scheduler: Any
    """Accelerate's wrapper of the given one, or None."""
    reference: Reference | None
    """Like `policy`, frozen; None where the model is its own reference, with its adapters off."""


def prepare_models(
    accelerator: Accelerator,
    config: PPOConfig,
    model: PreTrainedModelWrapper,
    ref_model: PreTrainedModelWrapper | None,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
) -> PreparedModels:
    """Move everything to its device and wrap it for the processes.

    Raises:
        ValueError: A setting needs parameters whole that this launch holds in parts, or the other way round.
    """
    engine = accelerator.state.deepspeed_plugin
    has_fsdp = accelerator.distributed_type == DistributedType.FSDP
    sharded = has_fsdp or (engine is not None and engine.zero_stage == 3)
    if sharded and config.kl_penalty == "full":
        raise ValueError(
            "kl_penalty='full' reads the LM heads of policy and reference at once, which ZeRO-3 and FSDP hold in "
            "parts between passes. Use kl_penalty='kl', or launch with DDP or ZeRO-2."
        )
    scoring = _scoring(accelerator, config, sharded=sharded)
    token_policy = TokenPolicy(model, **scoring)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        disable_dropout(model)
        token_policy.checkpointing = True
    if engine is not None:
        # Sizes that the engine checks against each other and otherwise only reports.
        sizes = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": accelerator.num_processes}
        engine.deepspeed_config.update(sizes)
    if accelerator.device.type == "cpu":
        # Engines and FSDP have layers of their own.
        _settle_on_cpu(config, [model, ref_model], own_layers=engine is None and not has_fsdp)
    with fsdp_sharding(accelerator) if has_fsdp else nullcontext():
        policy, optimizer = accelerator.prepare(token_policy, optimizer)
    if has_fsdp:
        set_fsdp_root(policy, accelerator)
    elif sharded:
        keep_head_gathered(token_policy)
    scheduler = None if lr_scheduler is None else accelerator.prepare_scheduler(lr_scheduler)
    reference = None
    if ref_model is not None:
        scorer = TokenPolicy(ref_model, **scoring).requires_grad_(False)
        reference = place_reference(scorer, accelerator, config.reference_placement, policy=list(model.parameters()))
        if not (token_policy.has_plain_head() and scorer.has_plain_head()):
            token_policy.fused_scoring = scorer.fused_scoring = False
    return PreparedModels(policy, optimizer, scheduler, reference)


def _scoring(accelerator: Accelerator, config: PPOConfig, *, sharded: bool) -> dict[str, Any]:
    """How policy and reference score."""
    return {
        "temperature": config.temperature,
        "chunk_size": config.logits_chunk_size,
        "fused_head": config.fused_head,
        # One attention call a length: many launches. And a trial that some processes make and others do not.
        "packing": config.packing and accelerator.device.type == "cpu" and not sharded,
    }


def _settle_on_cpu(config: PPOConfig, models: list[PreTrainedModelWrapper | None], *, own_layers: bool) -> None:
    """Memory and layers as a CPU has them fastest."""
    if config.keep_freed_memory:
        keep_freed_memory()
    if own_layers and (config.fast_products or config.bf16):
        for model in models:
            if model is not None:
                use_fast_layers(model, product_dtype=torch.bfloat16 if config.bf16 else None)
