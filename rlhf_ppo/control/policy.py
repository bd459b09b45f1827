"""Actor and critic for control: separate tanh networks, with Gaussian or categorical actions.

`ControlPolicy` has the interface of `TokenPolicy`, so the same PPO, TRPO and REINFORCE updates train both.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_ppo.batch import PolicyOutput, Rows, join_columns
from rlhf_ppo.functional import (
    categorical_kl,
    categorical_metric,
    entropy_from_logits,
    gaussian_entropy,
    gaussian_kl,
    gaussian_logprobs,
    gaussian_metric,
    token_logprobs,
)
from rlhf_ppo.functional.trust_region import FisherMetric


@dataclass(frozen=True, kw_only=True)
class ControlInputs:
    """Observations and actions: one row per environment, or one row per step (T = 1)."""

    observations: Float[Tensor, "batch time observation"]
    """Normalized as in the rollout."""
    actions: Tensor
    """As sampled, not clipped: float [B, T, A] of a Gaussian, long [B, T, 1] of a categorical."""

    def __len__(self) -> int:
        return len(self.observations)

    def select(self, rows: Rows) -> "ControlInputs":
        return ControlInputs(observations=self.observations[rows], actions=self.actions[rows])

    def costs(self) -> Int[Tensor, " batch"]:
        return torch.full((len(self),), self.width())

    def width(self) -> int:
        return self.observations.shape[1]

    def to(self, device: torch.device) -> "ControlInputs":
        return ControlInputs(observations=self.observations.to(device), actions=self.actions.to(device))

    def joined(self, others: Sequence["ControlInputs"]) -> "ControlInputs":
        return ControlInputs(**join_columns([self, *others], ("observations", "actions")))

    def flatten_time(self) -> "ControlInputs":
        """One row per step: [B T, 1, ...]."""
        return ControlInputs(
            observations=self.observations.flatten(0, 1).unsqueeze(1), actions=self.actions.flatten(0, 1).unsqueeze(1)
        )


class Gaussian(nn.Module):
    """Diagonal Gaussian: the network outputs the mean; log σ is a parameter, the same in every state.

    Args:
        size: Action dimensions.
        log_std: Initial log σ.
    """

    def __init__(self, size: int, log_std: float = 0.0) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((size,), log_std))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Sample in advance the noise for actions of leading shape `shape`."""
        return torch.randn(*shape, len(self.log_std), generator=generator)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return outputs + self.log_std.exp() * noise

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return gaussian_logprobs(outputs, self.log_std, actions)

    def entropy(self, outputs: Tensor) -> Tensor:
        return gaussian_entropy(self.log_std).expand(outputs.shape[:-1])

    def outputs_and_metric(self, outputs: Tensor, weights: Tensor) -> tuple[tuple[Tensor, ...], FisherMetric]:
        """The distribution's parameters, with gradient, and their Fisher metric."""
        log_std = self.log_std.expand_as(outputs)
        return (outputs, log_std), gaussian_metric(log_std, weights)

    def kl_from_current(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """A function of new outputs: KL(these outputs || new outputs), nats."""
        log_std = self.log_std.detach().clone()
        return lambda new: gaussian_kl(outputs, log_std, new, self.log_std)


class Categorical(nn.Module):
    """Categorical distribution; the network outputs the logits.

    Args:
        size: Number of actions.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Gumbel noise: argmax(logits + noise) is a sample from softmax(logits) (Gumbel 1954)."""
        return -torch.empty(*shape, self.size).exponential_(generator=generator).log()

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return (outputs + noise).argmax(-1, keepdim=True)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1, keepdim=True)

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return token_logprobs(outputs, actions.squeeze(-1))

    def entropy(self, outputs: Tensor) -> Tensor:
        return entropy_from_logits(outputs)

    def outputs_and_metric(self, outputs: Tensor, weights: Tensor) -> tuple[tuple[Tensor, ...], FisherMetric]:
        return (outputs,), categorical_metric(outputs, weights)

    def kl_from_current(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda new: categorical_kl(outputs, new)


def mlp(sizes: Sequence[int], *, last_gain: float, orthogonal: bool = True) -> nn.Sequential:
    """Multi-layer perceptron with tanh; orthogonal weights of gain √2, the last of `last_gain`, and zero biases.

    Args:
        sizes: Widths of input, hidden layers and output.
        last_gain: 0.01 for an actor, whose initial means are then near 0 (Andrychowicz et al. 2021); 1 for a critic.
        orthogonal: False: PyTorch's initialization.
    """
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(itertools.pairwise(sizes)):
        is_last = index == len(sizes) - 2
        linear = nn.Linear(width, following)
        if orthogonal:
            nn.init.orthogonal_(linear.weight, last_gain if is_last else 2**0.5)
            nn.init.zeros_(linear.bias)
        layers += [linear] if is_last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class ControlPolicy(nn.Module):
    """Actor and critic as separate networks.

    Args:
        observation_size: Entries of an observation.
        distribution: Distribution over actions, `Gaussian` or `Categorical`.
        action_size: Outputs of the actor: action dimensions, or number of actions.
        hidden: Widths of the hidden layers, the same in both networks.
        orthogonal: Orthogonal initialization.
    """

    chunk_size = 1 << 30
    """Largest number of rows per Fisher-vector product: unlimited, since rows are small."""

    def __init__(
        self,
        observation_size: int,
        distribution: Gaussian | Categorical,
        action_size: int,
        *,
        hidden: Sequence[int] = (64, 64),
        orthogonal: bool = True,
    ) -> None:
        super().__init__()
        self.actor = mlp([observation_size, *hidden, action_size], last_gain=0.01, orthogonal=orthogonal)
        self.critic = mlp([observation_size, *hidden, 1], last_gain=1.0, orthogonal=orthogonal)
        self.distribution = distribution

    def forward(self, inputs: ControlInputs, *, with_entropy: bool = False) -> PolicyOutput:
        """Score every action of `inputs`.

        Returns:
            Log-probabilities and entropy [B, T]; values [B, T+1], with 0 in the last column.
        """
        shape = inputs.observations.shape[:2]
        observations, actions = inputs.observations.flatten(0, 1), inputs.actions.flatten(0, 1)
        outputs = self.actor(observations)
        values = self.critic(observations).view(shape)
        entropy = self.distribution.entropy(outputs).reshape(shape) if with_entropy else None
        return PolicyOutput(
            logprobs=self.distribution.logprobs(outputs, actions).view(shape),
            values=torch.cat([values, torch.zeros_like(values[:, :1])], dim=1),
            entropy=entropy,
        )

    def act(self, observations: Float[Tensor, "*batch observation"], noise: Tensor | None) -> Tensor:
        """Actions for a batch of observations: sampled with `noise`, or the most likely ones if it is None."""
        outputs = self.actor(observations)
        return self.distribution.mode(outputs) if noise is None else self.distribution.sample(outputs, noise)

    def values(self, observations: Float[Tensor, "*shape observation"]) -> Float[Tensor, "*shape"]:
        """V(s)."""
        values: Tensor = self.critic(observations)
        return values.squeeze(-1)

    def check_twice_differentiable(self) -> None:
        """Do nothing: these networks can be differentiated twice."""

    def outputs_and_metric(
        self, inputs: ControlInputs, weights: Float[Tensor, "batch time"]
    ) -> tuple[tuple[Tensor, ...], FisherMetric]:
        """The distribution's parameters at each action, with gradient, and their Fisher metric."""
        return self.distribution.outputs_and_metric(self.actor(inputs.observations), weights)

    @torch.no_grad()
    def kl_from_current(
        self, micro_batches: Sequence[ControlInputs]
    ) -> list[Callable[[], Float[Tensor, "batch time"]]]:
        """For each micro-batch, a function that returns the exact KL(π at this call || π at its call), nats."""

        def kl_function(inputs: ControlInputs) -> Callable[[], Tensor]:
            kl_to = self.distribution.kl_from_current(self.actor(inputs.observations))
            return lambda: kl_to(self.actor(inputs.observations))

        return [kl_function(inputs) for inputs in micro_batches]

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's parameters."""
        return list(self.critic.parameters())

    def critic_states(self, inputs: ControlInputs) -> list[Float[Tensor, "time observation"]]:
        """The critic's inputs, one tensor per row."""
        return list(inputs.observations)

    def values_from_states(self, states: Float[Tensor, "actions observation"]) -> Float[Tensor, " actions"]:
        """V at the concatenated states of `critic_states`."""
        return self.values(states)
