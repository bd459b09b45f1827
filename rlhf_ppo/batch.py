"""Typed batches of one iteration: `PolicyInputs` -> `Rollout` -> `TrainBatch`.

Each stage returns a new frozen batch; no field is filled in later. Rows are episodes (one response each), columns are
time steps (one response token each). `mask` is True exactly at the policy's actions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_ppo.utils.transfer import upload

Rows = Int[Tensor, " rows"]
Batch = TypeVar("Batch", bound="RowBatch")


@runtime_checkable
class PolicyInputs(Protocol):
    """What a policy reads to score the actions of a batch again."""

    def select(self, rows: Rows) -> "PolicyInputs":
        """The same inputs for `rows` alone."""

    def costs(self) -> Int[Tensor, " batch"]:
        """Tokens (or steps) of each row; micro-batches are sorted and cut by them."""

    def width(self) -> int:
        """T: time steps of the longest row, the columns of every [batch, time] tensor."""

    def to(self, device: torch.device) -> "PolicyInputs":
        """The same inputs on a device."""

    def joined(self, others: Sequence[Any]) -> "PolicyInputs":
        """Concatenate: these rows, then those of `others`, which have the same type."""


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Prompts and responses without padding: the token ids that were sampled, never decoded and tokenized again."""

    prompts: Sequence[Tensor]
    """One Long [P_i] per row, without padding."""
    responses: Sequence[Tensor]
    """One Long [T_i] per row, the stop token included, without padding."""

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Rows) -> "TokenInputs":
        indices = rows.tolist()
        return TokenInputs(prompts=[self.prompts[i] for i in indices], responses=[self.responses[i] for i in indices])

    def costs(self) -> Int[Tensor, " batch"]:
        pairs = zip(self.prompts, self.responses, strict=True)
        return torch.tensor([len(prompt) + len(response) for prompt, response in pairs])

    def width(self) -> int:
        return max(len(response) for response in self.responses)

    def to(self, device: torch.device) -> "TokenInputs":
        return TokenInputs(
            prompts=[prompt.to(device) for prompt in self.prompts],
            responses=[response.to(device) for response in self.responses],
        )

    def joined(self, others: Sequence["TokenInputs"]) -> "TokenInputs":
        return TokenInputs(**join_columns([self, *others], ("prompts", "responses")))

    def response_lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each response, [B]."""
        return torch.tensor([len(response) for response in self.responses])


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """Log-probabilities, values and entropies of a batch of actions, padded with zeros to the longest row."""

    logprobs: Float[Tensor, "batch time"]
    """log π(a_t | s_t) in nats, float32."""
    values: Float[Tensor, "batch time+1"]
    """V(s_0) ... V(s_T): one more than actions."""
    entropy: Float[Tensor, "batch time"] | None = None
    """Shannon entropy of π(. | s_t) in nats over the full vocabulary, float32."""
    reference_kl: Float[Tensor, "batch time"] | None = None
    """Exact KL(π(. | s_t) || π_ref(. | s_t)) in nats, float32; None where it was not requested."""
    old_kl: Float[Tensor, "batch time"] | None = None
    """Exact KL(π_old(. | s_t) || π(. | s_t)) in nats, float32; None where it was not requested."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """B episodes of at most T actions, sampled by the rollout policy π_old, with rewards and values."""

    inputs: PolicyInputs
    mask: Bool[Tensor, "batch time"]
    """True where a step is an action of the policy: not prompt, padding, tool output or auto-reset step."""
    logprobs: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time+1"]
    rewards: Float[Tensor, "batch time"]
    """Final reward of each step, KL penalty included."""
    terminated: Bool[Tensor, "batch time"]
    """The episode ended at this step: it has no future."""
    truncated: Bool[Tensor, "batch time"]
    """The episode was cut off at this step: V(s_{t+1}) stands for its unobserved future."""
    ref_logprobs: Float[Tensor, "batch time"] | None = None
    scores: Float[Tensor, " batch"] | None = None
    """Undiscounted score of each episode, before reward shaping."""
    excluded: Bool[Tensor, " batch"] | None = None
    """True where an episode is kept out of the loss, but not out of baselines and statistics; None: nowhere."""
    group_size: int = 1
    """Number of consecutive rows that answer the same prompt."""
    turn_starts: Bool[Tensor, "batch time"] | None = None
    """True at the first action of each turn; None: a turn is a run of actions without a masked step."""
    reference_kl_coef: float = 0.0
    """Weight of the KL to the reference in the *loss*, in reward per nat; the KL in the rewards is separate."""


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """A batch whose fields are tensors with one row for each of `inputs`, None, or values of the whole batch."""

    inputs: PolicyInputs
    mask: Bool[Tensor, "batch time"]
    """True where a step is an action of the policy."""

    def __len__(self) -> int:
        return self.mask.shape[0]

    def select(self: Batch, rows: Rows) -> Batch:
        """The same batch for `rows` alone, its columns cut to the longest of these rows."""
        inputs = self.inputs.select(rows)
        width, index = inputs.width(), upload(rows, self.mask.device)
        cut = self.map_tensors(lambda value: value[index][:, :width] if value.dim() > 1 else value[index])
        return replace(self, inputs=inputs, **cut)

    def to(self: Batch, device: torch.device) -> Batch:
        return replace(self, inputs=self.inputs.to(device), **self.map_tensors(lambda value: value.to(device)))

    def joined(self: Batch, others: Sequence[Batch]) -> Batch:
        """Concatenate: these rows, then those of `others`, padded to the longest row; None where one of them is."""
        columns = join_columns([self, *others], list(self.map_tensors(lambda value: value)))
        return replace(self, inputs=self.inputs.joined([other.inputs for other in others]), **columns)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Fields that are tensors, by name, each changed."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class TrainBatch(RowBatch):
    """The batch that an update trains on: actions with their advantages and value targets."""

    logprobs: Float[Tensor, "batch time"]
    """log π_old of the rollout policy, nats: the denominator of the probability ratio."""
    values: Float[Tensor, "batch time"]
    """V at the time of the rollout: the center of value clipping."""
    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]
    """Value targets R_t."""
    ref_logprobs: Float[Tensor, "batch time"] | None = None
    reference_kl_coef: float = 0.0
    """Weight of the KL to the reference in the loss, in the units of the scaled `advantages`."""
    nll_weights: Float[Tensor, "batch time"] | None = None
    """Weight of each action's negative log-likelihood in the loss; None: no such loss."""
    old_states: Float[Tensor, "batch time hidden"] | None = None
    """Hidden states of the rollout policy, for the exact KL to it; None where no loss uses that KL."""

    def without_actions(self) -> "TrainBatch":
        """The same rows with an all-False mask: a pass over them adds 0 to every sum and gradient."""
        return replace(self, mask=torch.zeros_like(self.mask))


def split_into_micro_batches(
    costs: Int[Tensor, " rows"], *, size: int | None = None, token_budget: int | None = None
) -> list[Int[Tensor, " micro_batch"]]:
    """Cut positions 0 ... n-1, sorted by cost, longest first, into micro-batches of bounded rows and padded tokens.

    A row longer than the budget becomes a micro-batch of its own: no row is dropped.
    """
    micro_batches: list[list[int]] = []
    longest = 0
    for position in torch.argsort(costs, descending=True, stable=True).tolist():
        if micro_batches:
            rows = len(micro_batches[-1]) + 1
            if (size is None or rows <= size) and (token_budget is None or rows * longest <= token_budget):
                micro_batches[-1].append(position)
                continue
        micro_batches.append([position])
        longest = int(costs[position])
    return [torch.tensor(micro_batch) for micro_batch in micro_batches]


def pad_rows(rows: Sequence[Tensor], *, width: int | None = None, value: float = 0.0) -> Tensor:
    """Stack 1-D rows of unequal length into [B, width], padded on the right with `value`."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    if width is None or width <= padded.shape[1]:
        return padded
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=value)


def episode_of_rows(continues: Bool[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Index of each row's episode, from whether the next row goes on with it."""
    return torch.nn.functional.pad((~continues[:-1]).long().cumsum(0), (1, 0))


def concatenate_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows: [B_i] to [ΣB_i], or [B_i, T_i, ...] to [ΣB_i, max T_i, ...], padded with zeros on the right."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    unpadded = [0, 0] * (parts[0].dim() - 2)
    return torch.cat([torch.nn.functional.pad(part, (*unpadded, 0, width - part.shape[1])) for part in parts])


def join_columns(owners: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Attributes of several objects, one after the other: lists, tensors, dicts of them; None where one is None."""

    def join(columns: Sequence[Any]) -> Any:
        if any(column is None for column in columns):
            return None
        if isinstance(columns[0], Mapping):
            return {name: join([column[name] for column in columns]) for name in columns[0]}
        if isinstance(columns[0], Tensor):
            return concatenate_rows(columns)
        return list(chain.from_iterable(columns))

    return {name: join([getattr(owner, name) for owner in owners]) for name in names}


def select_columns(owner: object, names: Sequence[str], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of an object's attributes: of lists, tensors, dicts of them; None and empty lists stay."""

    def select(column: Any) -> Any:
        match column:
            case None | []:
                return column
            case Tensor():
                return column[torch.tensor(rows, dtype=torch.long)]
            case Mapping():
                return {name: select(part) for name, part in column.items()}
            case _:
                return [column[row] for row in rows]

    return {name: select(getattr(owner, name)) for name in names}
