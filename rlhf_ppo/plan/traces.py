"""What one process allocates while it scores and updates: the trainer's own forward and backward pass, without content.

Deep models are traced at two small depths and continued along the straight line: each layer is the same.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from rlhf_ppo.kernels.head_walk import Slopes
from rlhf_ppo.kernels.linear_layers import use_fast_layers
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import build, model_config, with_layers
from rlhf_ppo.plan.tracing import LiveBytes, ShapedInputs, counting, without_content

DEPTHS = (2, 4)
"""Layers of the two traces of a deeper model."""
WHOLE = 12
"""Up to this depth a model is traced as it is."""


SHARDED = ("zero1", "zero2", "zero3", "fsdp")
"""Where the LM head's gradients are left to the backward pass, because an engine owns them."""


@dataclass(frozen=True, kw_only=True)
class Traces:
    """Numbers of one process that holds everything whole. Bytes, unless said otherwise."""

    parameters: float
    """How many weights there are, value head and adapters included."""
    trainable: float
    """How many of them are trained."""
    head_parameters: float
    """How many stand in the language-model head (also where they are shared with the embedding)."""
    lookup_parameters: float
    """How many stand in an input embedding of its own, where nothing is multiplied."""
    weights: float
    """Of all weights."""
    value_head: float
    """Of the value head, which is all that the critic has for itself."""
    gradients: float
    """Of all gradients."""
    largest_layer: float
    """Weights of one layer, or of the embedding if that is larger: what a sharded model makes whole at a time."""
    scoring: float
    """Transient peak of a forward pass without gradients."""
    saved: float
    """Activations that wait for the backward pass when the loss is known."""
    first_forward: float
    """Peak of a forward pass when no gradient exists before."""
    first_backward: float
    """Peak of its backward pass, gradients included."""
    next_forward: float
    """Peak of a forward pass when gradients of an earlier one exist, these included."""
    next_backward: float
    """Peak of its backward pass, where new gradients are added to those."""
    paged: float
    """Of a pass, in pages of their own beside the head's gradient, and so not on the heap."""
    prefill: float
    """Transient peak of reading all prompts that are decoded together, without the cache."""

    @property
    def first_pass(self) -> float:
        """Peak of forward and backward when no gradient exists before."""
        return max(self.first_forward, self.first_backward)

    @property
    def next_pass(self) -> float:
        """The same when gradients of an earlier pass exist and are added to."""
        return max(self.next_forward, self.next_backward)

    def continued(self, other: "Traces", factor: float) -> "Traces":
        """Along the line from here through `other`, `factor` times as far."""
        pairs = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        same = ("head_parameters", "lookup_parameters", "value_head", "largest_layer")
        return Traces(**{name: a if name in same else a + factor * (b - a) for name, (a, b) in pairs.items()})


def trace(plan: PlanConfig) -> Traces:
    """The traces of `plan.model`.

    Raises:
        PlanError: There is no such model.
    """
    config = model_config(plan.model)
    layers = int(config.num_hidden_layers)
    if layers <= WHOLE:
        return _trace(config, plan)
    first, second = (_trace(with_layers(config, depth), plan) for depth in DEPTHS)
    return first.continued(second, (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def weights_of(plan: PlanConfig, name: str) -> int:
    """Bytes of a second, frozen model in the plan's precision."""
    frozen = PlanConfig(model=name, precision="bfloat16" if plan.precision == "nf4" else plan.precision)
    with torch.device("meta"):
        policy = build(model_config(name), frozen)
    return _bytes(policy.parameters())


def _trace(config: PreTrainedConfig, plan: PlanConfig) -> Traces:
    mode = FakeTensorMode()
    model: Any = without_content(lambda: build(config, plan), mode)
    if plan.device == "cpu":
        use_fast_layers(model)
    policy = TokenPolicy(model, chunk_size=plan.logits_chunk_size)
    if plan.gradient_checkpointing:
        disable_dropout(model)
        policy.checkpointing = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    language_model = policy.language_model
    with counting(model, mode, device=plan.device) as live:
        scoring = _scoring(policy, plan, plan.mini_batch_size, live)
        prefill = _prefill(policy, plan, live)
        saved, paged, first_forward, first_backward = _pass(policy, plan, live)
        _, _, next_forward, next_backward = _pass(policy, plan, live)
    inside, outside = language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight
    sizes = [_bytes(layer.parameters()) for layer in _layers(language_model)]
    return Traces(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in trained),
        head_parameters=outside.numel(),
        lookup_parameters=0 if inside is outside else inside.numel(),
        weights=_bytes(model.parameters()),
        value_head=_bytes(model.v_head.parameters()),
        gradients=_bytes(iter(trained)),
        largest_layer=max([*sizes, _bytes([inside])]),
        scoring=scoring, prefill=prefill, saved=saved, first_forward=first_forward, first_backward=first_backward,
        next_forward=next_forward, next_backward=next_backward,
        paged=max(0, paged - (_bytes([outside]) if outside.requires_grad else 0)),
    )  # fmt: skip


def _pass(policy: TokenPolicy, plan: PlanConfig, live: LiveBytes) -> tuple[float, float, float, float]:
    """Activations saved, bytes in pages of their own, and the peaks of one forward and one backward pass.

    Each grows along a line with the depth.
    """
    before = live.restart()
    had = sum(_bytes(iter([p.grad])) for p in policy.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16-mixed"):
        slopes = None if plan.strategy in SHARDED else SLOPES
        output = policy(_inputs(plan, plan.mini_batch_size), with_entropy=True, slopes=slopes)
        loss = output.logprobs.sum() + output.values.sum()
    saved, paged, forward = live.live - before, live.paged, live.peak - before + had
    live.restart()
    loss.backward()
    return saved, paged, forward, live.peak - before + had


SLOPES = Slopes(lambda logprobs, _, __: (torch.ones_like(logprobs), None), read_entropy=False)
"""Of a loss whose slope is the same at every token, known beforehand as that of the trainer's losses is."""


@torch.no_grad()
def _scoring(policy: TokenPolicy, plan: PlanConfig, rows: int, live: LiveBytes) -> float:
    before = live.restart()
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16-mixed"):
        policy(_inputs(plan, rows))
    return live.peak - before


@torch.no_grad()
def _prefill(policy: TokenPolicy, plan: PlanConfig, live: LiveBytes) -> float:
    before = live.restart()
    rows = min(plan.decode_rows, plan.batch_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16-mixed"):
        policy.language_model.base_model(
            input_ids=torch.zeros(rows, plan.prompt_tokens, dtype=torch.long), use_cache=False
        )
    return live.peak - before


def _inputs(plan: PlanConfig, rows: int) -> ShapedInputs:
    def tokens(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long)

    return ShapedInputs(
        prompts=[tokens(plan.prompt_tokens) for _ in range(rows)],
        responses=[tokens(plan.new_tokens) for _ in range(rows)],
    )


def _layers(language_model: Any) -> list[torch.nn.Module]:
    """The repeated layers: the longest list of modules in the trunk."""
    lists = [list(part) for part in language_model.modules() if isinstance(part, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
