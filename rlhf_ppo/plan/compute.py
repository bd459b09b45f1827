"""FLOPs of an iteration, and its time from measured FLOP rates."""

from dataclasses import dataclass

from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import model_config
from rlhf_ppo.plan.traces import MemoryTraces

PHASES = ("rollout", "scoring", "update")


@dataclass(frozen=True, kw_only=True)
class IterationFlops:
    """Floating-point operations of one process in one iteration, by phase; a multiply-add counts as two."""

    rollout: float
    scoring: float
    update: float
    response_tokens: int

    def seconds(self, rates: "FlopRates") -> dict[str, float]:
        """Time of each phase, seconds."""
        return {phase: getattr(self, phase) / getattr(rates, phase) for phase in PHASES}


@dataclass(frozen=True, kw_only=True)
class FlopRates:
    """Measured FLOPs per second of one device, by phase."""

    rollout: float
    scoring: float
    update: float


def iteration_flops(config: PlanConfig, traces: MemoryTraces) -> IterationFlops:
    """Count the FLOPs of matrix products: two per weight and token, plus attention (Kaplan et al. 2020, §2.1).

    The LM head runs on response tokens only. A backward pass costs two forward passes, or one if only adapters are
    trained (gradients of activations only); checkpointing costs one more forward pass.
    """
    shape = model_config(config.model).get_text_config(decoder=True)
    trunk = traces.parameters - traces.head_parameters - traces.lookup_parameters
    rows, new_tokens = config.batch_size, config.new_tokens
    attention = 4 * shape.hidden_size * shape.num_hidden_layers * config.tokens / 2  # causal: half the square
    head = 2 * traces.head_parameters
    forward = rows * (config.tokens * (2 * trunk + attention) + new_tokens * head)
    backward = 1.0 if config.lora_rank else 2.0
    forward_passes = 1 + backward + (1 if config.gradient_checkpointing else 0)
    num_models = 2  # policy and reference
    return IterationFlops(
        rollout=forward,
        scoring=num_models * forward,
        update=config.ppo_epochs * forward_passes * forward,
        response_tokens=rows * new_tokens,
    )
