"""Trace the memory of scoring and update passes: the trainer's own forward and backward pass on fake tensors.

Deep models are traced at two small depths and extrapolated linearly: all layers are equal.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from rlhf_ppo.kernels.linear_layers import use_fast_layers
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import build_policy, model_config, with_layers
from rlhf_ppo.plan.tracing import FakeInputs, LiveBytes, build_fake, count_live_bytes
from rlhf_ppo.samplers.batch_decoder import PREFILL_POSITIONS

TRACED_DEPTHS = (2, 4)
"""Numbers of layers at which deeper models are traced."""
MAX_TRACED_DEPTH = 12
"""Models with at most this many layers are traced at full depth."""

ENGINE_STRATEGIES = ("zero1", "zero2", "zero3", "fsdp")
"""Strategies whose engine owns the gradients: the LM head's are computed in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MemoryTraces:
    """Sizes and peaks of one process without sharding, in bytes unless stated otherwise."""

    parameters: float
    """Number of weights, value head and adapters included."""
    trainable: float
    """Number of trained weights."""
    head_parameters: float
    """Number of weights in the LM head, also if tied to the embedding."""
    lookup_parameters: float
    """Number of weights in an untied input embedding, which is a lookup without FLOPs."""
    weights: float
    """All weights."""
    value_head: float
    """The value head, the critic's only own weights."""
    gradients: float
    """All gradients."""
    largest_layer: float
    """Weights of the largest layer or the embedding: what a sharded model gathers at once."""
    scoring: float
    """Transient peak of a forward pass without gradients."""
    saved: float
    """Activations saved for the backward pass after the loss."""
    first_forward: float
    """Peak of a forward pass before any gradients exist."""
    first_backward: float
    """Peak of its backward pass, gradients included."""
    next_forward: float
    """Peak of a forward pass with gradients of an earlier pass, these included."""
    next_backward: float
    """Peak of its backward pass, which accumulates gradients."""
    page_mapped: float
    """Tensors of a pass in their own memory pages, not on the heap, without the head's gradient."""
    prefill: float
    """Transient peak of prefilling all rows decoded at once, without the KV cache."""

    @property
    def first_pass(self) -> float:
        """Peak of forward and backward before any gradients exist."""
        return max(self.first_forward, self.first_backward)

    @property
    def next_pass(self) -> float:
        """Peak of forward and backward that accumulates gradients."""
        return max(self.next_forward, self.next_backward)

    def extrapolate(self, other: "MemoryTraces", factor: float) -> "MemoryTraces":
        """Extrapolate linearly: self + factor · (other - self); sizes independent of depth stay."""
        pairs = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        constant = ("head_parameters", "lookup_parameters", "value_head", "largest_layer")
        return MemoryTraces(**{name: a if name in constant else a + factor * (b - a) for name, (a, b) in pairs.items()})


def trace_memory(plan: PlanConfig) -> MemoryTraces:
    """Trace the memory of `plan.model`; a PlanError if there is no such model."""
    config = model_config(plan.model)
    layers = int(config.num_hidden_layers)
    if layers <= MAX_TRACED_DEPTH:
        return _trace_at_depth(config, plan)
    first, second = (_trace_at_depth(with_layers(config, depth), plan) for depth in TRACED_DEPTHS)
    return first.extrapolate(second, (layers - TRACED_DEPTHS[0]) / (TRACED_DEPTHS[1] - TRACED_DEPTHS[0]))


def frozen_model_bytes(plan: PlanConfig, name: str) -> int:
    """Bytes of the weights of a frozen model, such as a reward model, in the plan's precision."""
    frozen = PlanConfig(model=name, precision="bfloat16" if plan.precision == "nf4" else plan.precision)
    with torch.device("meta"):
        policy = build_policy(model_config(name), frozen)
    return _bytes(policy.parameters())


def _trace_at_depth(config: PreTrainedConfig, plan: PlanConfig) -> MemoryTraces:
    fake_mode = FakeTensorMode()
    model: Any = build_fake(lambda: build_policy(config, plan), fake_mode)
    if plan.device == "cpu":
        use_fast_layers(model)
    policy = TokenPolicy(model, chunk_size=plan.logits_chunk_size)
    if plan.gradient_checkpointing:
        disable_dropout(model)
        policy.checkpointing = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    language_model = policy.language_model
    with count_live_bytes(model, fake_mode, device=plan.device) as live:
        scoring = _scoring(policy, plan, plan.mini_batch_size, live)
        prefill = _prefill(policy, plan, live)
        saved, page_mapped, first_forward, first_backward = _pass(policy, plan, live)
        _, _, next_forward, next_backward = _pass(policy, plan, live)
    input_embedding = language_model.get_input_embeddings().weight
    lm_head = language_model.get_output_embeddings().weight
    sizes = [_bytes(layer.parameters()) for layer in _layers(language_model)]
    return MemoryTraces(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in trained),
        head_parameters=lm_head.numel(),
        lookup_parameters=0 if input_embedding is lm_head else input_embedding.numel(),
        weights=_bytes(model.parameters()),
        value_head=_bytes(model.v_head.parameters()),
        gradients=_bytes(iter(trained)),
        largest_layer=max([*sizes, _bytes([input_embedding])]),
        scoring=scoring, prefill=prefill, saved=saved, first_forward=first_forward, first_backward=first_backward,
        next_forward=next_forward, next_backward=next_backward,
        page_mapped=max(0, page_mapped - (_bytes([lm_head]) if lm_head.requires_grad else 0)),
    )  # fmt: skip


def _pass(policy: TokenPolicy, plan: PlanConfig, live: LiveBytes) -> tuple[float, float, float, float]:
    """Trace one forward and backward pass: saved activations, page-mapped bytes, forward peak, backward peak.

    Each is linear in the depth.
    """
    before = live.reset_peak()
    gradient_bytes = sum(_bytes(iter([p.grad])) for p in policy.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16-mixed"):
        loss_gradient = None if plan.strategy in ENGINE_STRATEGIES else CONSTANT_GRADIENT
        output = policy(_inputs(plan, plan.mini_batch_size), with_entropy=True, loss_gradient=loss_gradient)
        loss = output.logprobs.sum() + output.values.sum()
    saved, page_mapped, forward = live.live - before, live.page_mapped, live.peak - before + gradient_bytes
    live.reset_peak()
    loss.backward()
    return saved, page_mapped, forward, live.peak - before + gradient_bytes


CONSTANT_GRADIENT = LossGradient(lambda logprobs, _, __: (torch.ones_like(logprobs), None), reads_entropy=False)
"""Stand-in for the loss: its gradient by log-probability is 1 at every token, known before the backward pass."""


@torch.no_grad()
def _scoring(policy: TokenPolicy, plan: PlanConfig, rows: int, live: LiveBytes) -> float:
    before = live.reset_peak()
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16-mixed"):
        policy(_inputs(plan, rows))
    return live.peak - before


@torch.no_grad()
def _prefill(policy: TokenPolicy, plan: PlanConfig, live: LiveBytes) -> float:
    before = live.reset_peak()
    rows = min(plan.decode_rows, plan.batch_size, max(1, PREFILL_POSITIONS // plan.prompt_tokens))
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16-mixed"):
        policy.language_model.base_model(
            input_ids=torch.zeros(rows, plan.prompt_tokens, dtype=torch.long), use_cache=False
        )
    return live.peak - before


def _inputs(plan: PlanConfig, rows: int) -> FakeInputs:
    def tokens(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long)

    return FakeInputs(
        prompts=[tokens(plan.prompt_tokens) for _ in range(rows)],
        responses=[tokens(plan.new_tokens) for _ in range(rows)],
    )


def _layers(language_model: Any) -> list[torch.nn.Module]:
    """Transformer layers: the longest `ModuleList` of the model."""
    lists = [list(part) for part in language_model.modules() if isinstance(part, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
