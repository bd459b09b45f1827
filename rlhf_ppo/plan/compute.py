"""Work of an iteration in floating-point operations, and time from rates that were measured."""

from dataclasses import asdict, dataclass

from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.models import model_config
from rlhf_ppo.plan.traces import Traces

PHASES = ("rollout", "scoring", "update")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of one process in one iteration; a multiplication with an addition counts as two."""

    rollout: float
    scoring: float
    update: float
    response_tokens: int

    def seconds(self, rates: "Rates") -> dict[str, float]:
        """Of each phase."""
        return {phase: getattr(self, phase) / getattr(rates, phase) for phase in PHASES}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations a second of one device in each phase, as measured."""

    rollout: float
    scoring: float
    update: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def work(config: PlanConfig, traces: Traces) -> Work:
    """Operations of the matrix products: two a weight and token, and attention (Kaplan et al. 2020, §2.1).

    The head runs on response tokens alone. A backward pass costs two forward passes, one where weights are frozen below
    adapters (gradients of activations only); checkpointing costs one more forward.
    """
    shape = model_config(config.model).get_text_config(decoder=True)
    trunk = traces.parameters - traces.head_parameters - traces.lookup_parameters
    rows, new = config.batch_size, config.new_tokens
    attention = 4 * shape.hidden_size * shape.num_hidden_layers * config.tokens / 2  # causal: half the square
    head = 2 * traces.head_parameters
    forward = rows * (config.tokens * (2 * trunk + attention) + new * head)
    backward = 1.0 if config.lora_rank else 2.0
    passes = 1 + backward + (1 if config.gradient_checkpointing else 0)
    models = 2  # policy and reference
    return Work(
        rollout=forward,
        scoring=models * forward,
        update=config.ppo_epochs * passes * forward,
        response_tokens=rows * new,
    )
