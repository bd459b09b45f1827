"""Memory of one device by role and phase, for any number of devices and a sharding strategy."""

from dataclasses import dataclass, replace

from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import DTYPES, model_config
from rlhf_ppo.plan.traces import MemoryTraces
from rlhf_ppo.samplers.kv_cache import bytes_per_token

GIB = 2**30
BUCKET_ELEMENTS = 5e8
"""Elements in a DeepSpeed gradient bucket (its default `reduce_bucket_size`)."""
HEAP_OVERHEAD = 0.7
"""Heap memory in freed blocks on a CPU, as a fraction of transient memory (fragmentation of the C library's heap).

Fitted to the five runs marked `fitted` in docs/results/plan.json, in which live bytes equal the traced ones.
"""
NF4_BYTES = 0.5 + 0.127 / 8
"""Bytes per weight in NF4 with double quantization (Dettmers et al. 2023, section 3)."""
ROLES = (
    "policy", "critic", "reference", "reward", "gradients", "optimizer", "activations", "logits", "kv", "buffers",
    "spare",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory of one device."""

    config: PlanConfig
    devices: int
    roles: dict[str, float]
    """Role -> bytes while allocated; the names are `ROLES`."""
    phases: dict[str, float]
    """Phase -> peak bytes: rollout, scoring, update."""

    @property
    def peak(self) -> float:
        """Largest peak of the phases, bytes."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within `memory_gib`."""
        return self.peak <= self.config.memory_gib * GIB


@dataclass(frozen=True, kw_only=True)
class _Fractions:
    """Fraction of each part on one device, and the buffers that sharding needs."""

    weights: float = 1.0
    reference: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    masters: bool = False
    """Whether trained weights have a float32 master copy beside the moments (DeepSpeed)."""
    buffers: float = 0.0
    """Gradient buckets, bytes."""
    gathered: float = 0.0
    """Unsharded weights alive at once during forward and backward, bytes."""


def make_plan(config: PlanConfig, traces: MemoryTraces, *, devices: int = 1, reward_weights: float = 0.0) -> Plan:
    """Add up the memory of one of `devices` devices.

    Args:
        traces: Memory traces of its model, see `rlhf_ppo.plan.trace_memory`.
        devices: Number of devices, with one process each.
        reward_weights: Bytes of a reward model, unsharded on every device.
    """
    # DeepSpeed keeps bf16 weights where Accelerate's autocast keeps float32 ones.
    if config.strategy.startswith("zero") and config.precision == "bf16-mixed":
        traces = replace(traces, weights=traces.weights / 2, gradients=traces.gradients / 2)
    if config.precision == "nf4":
        traces = replace(traces, weights=traces.weights - _nf4_savings(traces))
    fractions = _fractions(config, traces, devices)
    state_size = 4.0 if fractions.masters else traces.gradients / traces.trainable
    moments = 2 * traces.trainable * state_size + (4 * traces.trainable if fractions.masters else 0)
    gradients = traces.gradients * fractions.gradients
    passes = traces.first_pass if config.gradient_accumulation_steps == 1 else traces.next_pass
    activation_bytes = passes - traces.gradients  # what the passes allocate besides gradients
    transient = max(activation_bytes, 0.0) + gradients if fractions.gradients < 1 else max(passes, traces.gradients)
    persistent = {
        "policy": traces.weights * fractions.weights,
        "critic": traces.value_head * fractions.weights,
        "reference": 0.0 if config.lora_rank else traces.weights * fractions.reference,
        "reward": reward_weights,
        "optimizer": moments * fractions.optimizer,
    }
    persistent["policy"] -= persistent["critic"]
    gathered_weights = traces.weights if fractions.weights < 1 else 0.0  # gathered for a rollout
    persistent_bytes = sum(persistent.values()) + fractions.buffers
    rollout = _rollout_bytes(config, free=config.memory_gib * GIB - persistent_bytes - gathered_weights)
    # Gradients stay allocated and page-mapped tensors are not on the heap: neither leaves freed blocks.
    spare = HEAP_OVERHEAD * max(0.0, transient - gradients - traces.page_mapped) if config.device == "cpu" else 0.0
    roles = persistent | {
        "gradients": gradients,
        "activations": traces.saved,
        "logits": max(0.0, transient - gradients - traces.saved),
        "kv": rollout["kv"],
        "buffers": fractions.buffers + max(fractions.gathered, gathered_weights),
        "spare": spare,
    }
    phases = {
        "rollout": persistent_bytes + gathered_weights + rollout["kv"] + max(rollout["logits"], traces.prefill),
        "scoring": persistent_bytes + fractions.gathered + traces.scoring,
        "update": persistent_bytes + fractions.gathered + transient + spare,
    }
    return Plan(config=config, devices=devices, roles={name: roles[name] for name in ROLES}, phases=phases)


def _nf4_savings(traces: MemoryTraces) -> float:
    """Bytes saved by 4-bit linear layers in a frozen bfloat16 base; embeddings and head stay bfloat16."""
    layers = traces.parameters - traces.trainable - traces.head_parameters - traces.lookup_parameters
    return layers * (2 - NF4_BYTES)


def _fractions(config: PlanConfig, traces: MemoryTraces, devices: int) -> _Fractions:
    part = 1.0 / devices
    element_size = traces.gradients / traces.trainable
    bucket = min(traces.trainable, BUCKET_ELEMENTS) * element_size
    match config.strategy:
        case "ddp":
            return _Fractions(buffers=traces.gradients if devices > 1 else 0.0)  # DDP's buckets are a second copy
        case "zero1":
            return _Fractions(optimizer=part, masters=True, buffers=bucket)
        case "zero2":
            return _Fractions(optimizer=part, gradients=part, masters=True, buffers=bucket)
        case "zero3":
            return _Fractions(
                weights=part, reference=part, optimizer=part, gradients=part, masters=True, buffers=bucket,
                gathered=2 * traces.largest_layer,
            )  # fmt: skip
        case _:  # fsdp
            return _Fractions(
                weights=part, reference=part, optimizer=part, gradients=part, gathered=2 * traces.largest_layer
            )


def _rollout_bytes(config: PlanConfig, *, free: float) -> dict[str, float]:
    """Bytes of the KV cache and of logits for the rows decoded at once."""
    budget = max(free, 0.0) / 2 if config.device == "cuda" else 4.0 * GIB
    if config.kv_budget_gib is not None:
        budget = config.kv_budget_gib * GIB
    model_shape = model_config(config.model)
    dtype = DTYPES["bfloat16" if config.precision == "bf16-mixed" else config.precision]
    row_bytes = bytes_per_token(model_shape, dtype) * config.tokens
    rows = min(config.decode_rows, config.batch_size, max(1, int(budget // row_bytes)))
    vocabulary = model_shape.get_text_config(decoder=True).vocab_size
    # The logits of a step and those of the step before it, in float32 and in the type of the model.
    logits = rows * vocabulary * (2 * dtype.itemsize + (4 if dtype.itemsize < 4 else 0))
    return {"kv": float(rows * row_bytes), "logits": float(logits)}
