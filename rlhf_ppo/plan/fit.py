"""Cut a plan's minibatches into passes as the trainer does by a GPU's memory."""

import math
from dataclasses import replace

from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.memory import GIB, make_plan
from rlhf_ppo.plan.models import model_config
from rlhf_ppo.plan.traces import trace_memory
from rlhf_ppo.updates.pass_memory import PassSize, fit_pass, pass_memory_from_saved


def with_fitted_pass_size(plan: PlanConfig) -> PlanConfig:
    """`plan` with as many responses per pass as the trainer would take, and with checkpointing where it switches it on.

    On a CPU, and where processes shard the model, it takes what it is told.
    """
    if plan.device != "cuda" or plan.strategy in ("zero3", "fsdp"):
        return plan
    if plan.token_budget is None:
        size = _fitted(plan)
    else:
        size = PassSize(plan.token_budget, plan.gradient_checkpointing)
    rows = max(1, min(plan.mini_batch_size, size.tokens // plan.tokens))
    return replace(
        plan, mini_batch_size=rows, token_budget=size.tokens, gradient_checkpointing=size.checkpointing,
        gradient_accumulation_steps=plan.gradient_accumulation_steps * math.ceil(plan.mini_batch_size / rows),
    )  # fmt: skip


def _fitted(plan: PlanConfig) -> PassSize:
    kept = replace(plan, gradient_checkpointing=False)
    one, two = (trace_memory(replace(kept, mini_batch_size=rows)) for rows in (1, 2))
    roles = make_plan(plan, one).roles
    state = sum(roles[name] for name in ("policy", "critic", "reference", "optimizer", "gradients", "buffers"))
    copies = 2 * one.parameters if plan.precision == "bf16-mixed" else 0.0
    memory = pass_memory_from_saved((two.saved - one.saved) / plan.tokens, model_config(plan.model), copies=copies)
    available = plan.memory_gib * GIB - state
    return fit_pass(memory, available, plan.tokens, checkpointing=plan.gradient_checkpointing)
