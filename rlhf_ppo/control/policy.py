"""Actor and critic for control: separate tanh networks, a Gaussian over joints or a categorical over choices.

The module answers what an update asks of `TokenPolicy`, so PPO, TRPO and REINFORCE train either.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_ppo.batch import PolicyOutput, Rows
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
    """What the policy saw and did: one row an environment, or one row a step (T = 1)."""

    observations: Float[Tensor, "batch time observation"]
    """Normalized, as the policy that acted saw them."""
    actions: Tensor
    """As drawn, not clipped: float [B, T, A] of a Gaussian, long [B, T, 1] of a categorical."""

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
        parts = [self, *others]
        return ControlInputs(
            observations=torch.cat([part.observations for part in parts]),
            actions=torch.cat([part.actions for part in parts]),
        )

    def steps(self) -> "ControlInputs":
        """The same steps with a row each."""
        return ControlInputs(
            observations=self.observations.flatten(0, 1).unsqueeze(1), actions=self.actions.flatten(0, 1).unsqueeze(1)
        )


@runtime_checkable
class Distribution(Protocol):
    """What turns the actor's outputs [..., K] into a distribution over actions."""

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Randomness for actions of `shape`, drawn ahead."""
        ...

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """The action that `noise` picks."""
        ...

    def mode(self, outputs: Tensor) -> Tensor:
        """The most likely action."""
        ...

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Log π(a|s), nats."""
        ...

    def entropy(self, outputs: Tensor) -> Tensor:
        """S[π(.|s)], nats."""
        ...

    def tangents(self, outputs: Tensor, weights: Tensor) -> tuple[tuple[Tensor, ...], FisherMetric]:
        """The distribution's parameters with graph, and their Fisher information."""
        ...

    def kl_from_current(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """A function of new outputs: KL(here || there), nats."""
        ...


class Gaussian(nn.Module):
    """Mean by the network, standard deviation a parameter of each joint.

    Args:
        size: Joints.
        log_std: log σ at the start.
    """

    def __init__(self, size: int, log_std: float = 0.0) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((size,), log_std))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, len(self.log_std), generator=generator)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return outputs + self.log_std.exp() * noise

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return gaussian_logprobs(outputs, self.log_std, actions)

    def entropy(self, outputs: Tensor) -> Tensor:
        return gaussian_entropy(self.log_std).expand(outputs.shape[:-1])

    def tangents(self, outputs: Tensor, weights: Tensor) -> tuple[tuple[Tensor, ...], FisherMetric]:
        spread = self.log_std.expand_as(outputs)
        return (outputs, spread), gaussian_metric(spread, weights)

    def kl_from_current(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        log_std = self.log_std.detach().clone()
        return lambda there: gaussian_kl(outputs, log_std, there, self.log_std)


class Categorical(nn.Module):
    """Logits by the network, one a choice.

    Args:
        size: Choices.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Gumbel noise: the largest of logits + noise is a draw from their softmax (Gumbel 1954)."""
        return -torch.empty(*shape, self.size).exponential_(generator=generator).log()

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return (outputs + noise).argmax(-1, keepdim=True)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1, keepdim=True)

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return token_logprobs(outputs, actions.squeeze(-1))

    def entropy(self, outputs: Tensor) -> Tensor:
        return entropy_from_logits(outputs)

    def tangents(self, outputs: Tensor, weights: Tensor) -> tuple[tuple[Tensor, ...], FisherMetric]:
        return (outputs,), categorical_metric(outputs, weights)

    def kl_from_current(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda there: categorical_kl(outputs, there)


def mlp(sizes: Sequence[int], *, last_gain: float, orthogonal: bool = True) -> nn.Sequential:
    """Linear layers with tanh between; orthogonal weights of gain √2, the last of `last_gain`, and zero biases.

    Args:
        sizes: Inputs, hidden widths, outputs.
        last_gain: 0.01 keeps a new policy close to its standard deviation (Andrychowicz et al. 2021); a critic has 1.
        orthogonal: False leaves PyTorch's initialization.
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
    """Actor and critic, each a network of its own.

    Args:
        observation_size: Entries of an observation.
        distribution: Over actions; `Gaussian` or `Categorical`.
        action_size: Outputs of the actor: joints or choices.
        hidden: Widths of the hidden layers, the same in both networks.
        orthogonal: Orthogonal initialization.
    """

    chunk_size = 1 << 30
    """Rows of one Fisher product: all of them, they are small."""

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
            Log-probabilities and entropy [B, T]; values [B, T+1], whose last column is not computed: 0.
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
        """Actions for a batch of observations: drawn with `noise`, or the most likely ones."""
        outputs = self.actor(observations)
        return self.distribution.mode(outputs) if noise is None else self.distribution.sample(outputs, noise)

    def values(self, observations: Float[Tensor, "*shape observation"]) -> Float[Tensor, "*shape"]:
        """V(s)."""
        values: Tensor = self.critic(observations)
        return values.squeeze(-1)

    def check_curvature(self) -> None:
        """Nothing to refuse: these networks can be differentiated twice."""

    def curvature(
        self, inputs: ControlInputs, weights: Float[Tensor, "batch time"]
    ) -> tuple[tuple[Tensor, ...], FisherMetric]:
        """The distribution's parameters at each action, with a graph, and their Fisher metric."""
        return self.distribution.tangents(self.actor(inputs.observations), weights)

    @torch.no_grad()
    def kl_from_current(
        self, micro_batches: Sequence[ControlInputs]
    ) -> list[Callable[[], Float[Tensor, "batch time"]]]:
        """For each micro-batch, a function that measures the exact KL(π_here || π) of whatever π has become by then."""

        def distance(inputs: ControlInputs) -> Callable[[], Tensor]:
            to = self.distribution.kl_from_current(self.actor(inputs.observations))
            return lambda: to(self.actor(inputs.observations))

        return [distance(inputs) for inputs in micro_batches]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Those of the critic."""
        return list(self.critic.parameters())

    def critic_states(self, inputs: ControlInputs) -> list[Float[Tensor, "time observation"]]:
        """What the critic reads, one tensor a row."""
        return list(inputs.observations)

    def values_of(self, states: Float[Tensor, "actions observation"]) -> Float[Tensor, " actions"]:
        """V at states of `critic_states`."""
        return self.values(states)
