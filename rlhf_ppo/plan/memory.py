"""Bytes on one device, by role and by phase, for a number of devices that share by some strategy."""

from dataclasses import dataclass, replace

from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import DTYPES, model_config
from rlhf_ppo.plan.traces import Traces
from rlhf_ppo.samplers.kv_cache import bytes_per_token

GIB = 2**30
BUCKET_ELEMENTS = 5e8
"""Elements that DeepSpeed reduces at a time (its default `reduce_bucket_size`)."""
HEAP_SPARE = 0.7
"""Of what comes and goes on a CPU, the share that the C library's heap holds besides, in freed blocks of other sizes.

Not derived: read off the five runs marked `fitted` in docs/results/plan.json, where the live bytes are the traced ones.
"""
NF4_BYTES = 0.5 + 0.127 / 8
"""Bytes of a weight in NF4 with its constants quantized too (Dettmers et al. 2023, section 3)."""
ROLES = (
    "policy", "critic", "reference", "reward", "gradients", "optimizer", "activations", "logits", "kv", "buffers",
    "spare",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one device needs."""

    config: PlanConfig
    devices: int
    roles: dict[str, float]
    """Role -> bytes while it is there; the names are `ROLES`."""
    phases: dict[str, float]
    """Phase -> peak bytes: rollout, scoring, update."""

    @property
    def peak(self) -> float:
        """The largest of the phases, bytes."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within `memory_gib`."""
        return self.peak <= self.config.memory_gib * GIB


@dataclass(frozen=True, kw_only=True)
class _Shares:
    """What stays on one device of each part, as a share, and what sharing costs on top."""

    weights: float = 1.0
    reference: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    masters: bool = False
    """A second copy of trained weights in float32 beside the moments (DeepSpeed)."""
    buffers: float = 0.0
    gathered: float = 0.0
    """Whole weights that exist at a time during forward and backward, beside the parts."""


def make_plan(config: PlanConfig, traces: Traces, *, devices: int = 1, reward_weights: float = 0.0) -> Plan:
    """Add up what one of `devices` devices needs.

    Args:
        config: The run.
        traces: Of its model, see `rlhf_ppo.plan.trace`.
        devices: Processes, one a device.
        reward_weights: Bytes of a reward model beside the policy, whole on every device.
    """
    # DeepSpeed keeps bf16 weights where Accelerate's autocast keeps float32 ones.
    if config.strategy.startswith("zero") and config.precision == "bf16-mixed":
        traces = replace(traces, weights=traces.weights / 2, gradients=traces.gradients / 2)
    if config.precision == "nf4":
        traces = replace(traces, weights=traces.weights - _packed(traces))
    shares = _shares(config, traces, devices)
    state_size = 4.0 if shares.masters else traces.gradients / traces.trainable
    moments = 2 * traces.trainable * state_size + (4 * traces.trainable if shares.masters else 0)
    gradients = traces.gradients * shares.gradients
    passes = traces.first_pass if config.gradient_accumulation_steps == 1 else traces.next_pass
    unshared = passes - traces.gradients  # what the passes allocate beside gradients
    transient = max(unshared, 0.0) + gradients if shares.gradients < 1 else max(passes, traces.gradients)
    standing = {
        "policy": traces.weights * shares.weights,
        "critic": traces.value_head * shares.weights,
        "reference": 0.0 if config.lora_rank else traces.weights * shares.reference,
        "reward": reward_weights,
        "optimizer": moments * shares.optimizer,
    }
    standing["policy"] -= standing["critic"]
    rollout = _rollout(config)
    whole = traces.weights if shares.weights < 1 else 0.0  # gathered once for a rollout
    floor = sum(standing.values()) + shares.buffers
    # Gradients come once and stay, so the first pass finds no hole of theirs; pages of their own leave none.
    spare = HEAP_SPARE * max(0.0, transient - gradients - traces.paged) if config.device == "cpu" else 0.0
    roles = standing | {
        "gradients": gradients,
        "activations": traces.saved,
        "logits": max(0.0, transient - gradients - traces.saved),
        "kv": rollout["kv"],
        "buffers": shares.buffers + max(shares.gathered, whole),
        "spare": spare,
    }
    phases = {
        "rollout": floor + whole + rollout["kv"] + max(rollout["logits"], traces.prefill),
        "scoring": floor + shares.gathered + traces.scoring,
        "update": floor + shares.gathered + transient + spare,
    }
    return Plan(config=config, devices=devices, roles={name: roles[name] for name in ROLES}, phases=phases)


def _packed(traces: Traces) -> float:
    """Bytes that 4 bits save on the linear layers of a frozen bfloat16 base; embeddings and head stay whole."""
    layers = traces.parameters - traces.trainable - traces.head_parameters - traces.lookup_parameters
    return layers * (2 - NF4_BYTES)


def _shares(config: PlanConfig, traces: Traces, devices: int) -> _Shares:
    part = 1.0 / devices
    per_element = traces.gradients / traces.trainable
    bucket = min(traces.trainable, BUCKET_ELEMENTS) * per_element
    match config.strategy:
        case "ddp":
            return _Shares(buffers=traces.gradients if devices > 1 else 0.0)  # its buckets are a second copy
        case "zero1":
            return _Shares(optimizer=part, masters=True, buffers=bucket)
        case "zero2":
            return _Shares(optimizer=part, gradients=part, masters=True, buffers=bucket)
        case "zero3":
            return _Shares(
                weights=part, reference=part, optimizer=part, gradients=part, masters=True, buffers=bucket,
                gathered=2 * traces.largest_layer,
            )  # fmt: skip
        case _:  # fsdp
            return _Shares(
                weights=part, reference=part, optimizer=part, gradients=part, gathered=2 * traces.largest_layer
            )


def _rollout(config: PlanConfig) -> dict[str, float]:
    """Keys and values, and logits, of the rows that are decoded together."""
    shape = model_config(config.model)
    dtype = DTYPES["bfloat16" if config.precision == "bf16-mixed" else config.precision]
    row = bytes_per_token(shape, dtype) * config.tokens
    rows = min(config.decode_rows, config.batch_size, max(1, int(config.kv_budget_gib * GIB // row)))
    vocabulary = shape.get_text_config(decoder=True).vocab_size
    # The logits of a step and those of the step before it, in float32 and in the type of the model.
    logits = rows * vocabulary * (2 * dtype.itemsize + (4 if dtype.itemsize < 4 else 0))
    return {"kv": float(rows * row), "logits": float(logits)}
