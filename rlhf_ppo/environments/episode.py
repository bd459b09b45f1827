"""`Episode`: the tokens of one finished episode, with rewards and turns, as they enter the loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A finished episode: all tokens after the prompt, the policy's own and the environment's."""

    prompt_ids: Tensor
    """Token ids before the first reply, [P]."""
    response_ids: Tensor
    """Token ids of all replies and of the observations between them, as they were sampled and appended, [T]."""
    mask: Tensor
    """Bool [T]: True at tokens that the policy sampled."""
    rewards: Tensor
    """Reward of each token, [T]: that of a turn at the last token of its reply."""
    logprobs: Tensor | None = None
    """Log-probability of each token under the sampler, [T], nats, 0 outside the mask; None: unknown."""
    truncated: bool = False
    """The episode was cut off: V after its last token stands for its future."""
    turn_ends: tuple[int, ...] | None = None
    """Position after the last sampled token of each turn; None: every run of sampled tokens is a turn."""
    contexts: tuple[tuple[int, Tensor], ...] = ()
    """Where the chat template rewrote the history: a position of `response_ids`, and the token ids that the policy read
    there instead of all before. Each begins a segment."""
    info: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of the episode."""

    def __post_init__(self) -> None:
        length = len(self.response_ids)
        lengths = {"mask": self.mask, "rewards": self.rewards, "logprobs": self.logprobs}
        for name, values in lengths.items():
            if values is not None and values.shape != self.response_ids.shape:
                raise ValueError(
                    f"Episode.{name} must have one entry for each of the {length} response tokens, got shape "
                    f"{tuple(values.shape)}: it is unknown which token each belongs to. Omit the prompt's entries."
                )
        if self.mask.dtype != torch.bool or not bool(self.mask.any()):
            raise ValueError(
                f"Episode.mask must be a boolean tensor with a True, got {self.mask.dtype} with {int(self.mask.sum())} "
                "non-zero entries: there is no action to learn from. Mark the tokens that the policy sampled."
            )
        masked = self.rewards.masked_fill(self.mask, 0)
        if bool((masked != 0).any()):
            position = int((masked != 0).nonzero()[0])
            raise ValueError(
                f"Episode.rewards must be 0 at tokens that the policy did not sample, got {float(masked[position])} at "
                f"token {position}: such a reward reaches no action and is lost. Put the reward of a turn at the last "
                "token of its reply."
            )
        self._check_turns(length)
        self._check_contexts(length)

    def _check_contexts(self, length: int) -> None:
        positions = [position for position, _ in self.contexts]
        if not all(isinstance(ids, Tensor) for _, ids in self.contexts):
            raise TypeError(
                "Episode.contexts must hold a tensor of token ids for each position, got another type: the model could "
                "not read it. Pass (position, torch.tensor(ids))."
            )
        spans = pairwise([0, *positions, length])
        if not all(0 <= start < end and bool(self.mask[start:end].any()) for start, end in spans):
            raise ValueError(
                f"Episode.contexts must begin at rising positions with a sampled token behind each, got {positions} "
                f"for {length} tokens: a segment would hold no action. Leave out contexts in which the policy did not "
                "act."
            )
        ends = self.turn_ends
        if ends is not None and any(int(self.mask[:start].nonzero()[-1]) + 1 not in ends for start in positions):
            raise ValueError(
                f"Episode.contexts must begin between turns, got positions {positions} and turn_ends {ends}: a reply "
                "would be divided over two contexts. Begin each context at the position of the turn that reads it."
            )

    def _check_turns(self, length: int) -> None:
        if self.turn_ends is None:
            return
        starts = (0, *self.turn_ends)[:-1]
        in_order = all(0 <= start < end <= length for start, end in zip(starts, self.turn_ends, strict=True))
        if not (self.turn_ends and in_order and all(bool(self.mask[end - 1]) for end in self.turn_ends)):
            raise ValueError(
                f"Episode.turn_ends must be rising positions, each after a sampled token, got {self.turn_ends} for "
                f"{length} tokens: turn-level advantages would mix turns. Pass None to take every run of sampled "
                "tokens as a turn."
            )

    @cached_property
    def turn_starts(self) -> Bool[Tensor, " time"]:
        """True at the first sampled token of each turn."""
        own = self.mask.tolist()
        if self.turn_ends is None:
            starts = [
                position for position in range(len(own)) if own[position] and not (position and own[position - 1])
            ]
        else:
            starts = [own.index(True, begin) for begin in (0, *self.turn_ends[:-1])]
        result = torch.zeros_like(self.mask)
        result[starts] = True
        return result

    def segments(self) -> list[tuple[Tensor, slice]]:
        """Context and span of `response_ids` of each segment; a span ends behind the last token that was sampled."""
        starts = [0, *(position for position, _ in self.contexts)]
        prompts = [self.prompt_ids, *(ids for _, ids in self.contexts)]
        ends = [int(self.mask[:start].nonzero()[-1]) + 1 for start in starts[1:]] + [len(self.mask)]
        return [(prompt, slice(*span)) for prompt, *span in zip(prompts, starts, ends, strict=True)]

    def replies(self) -> list[Int[Tensor, " reply"]]:
        """The sampled tokens of each turn."""
        starts = self.turn_starts.nonzero().flatten().tolist()
        spans = zip(starts, [*starts[1:], len(self.mask)], strict=True)
        return [self.response_ids[start:end][self.mask[start:end]] for start, end in spans]

    @property
    def turns(self) -> int:
        """Number of turns."""
        return int(self.turn_starts.sum())

    @property
    def total_reward(self) -> float:
        """Sum of the rewards."""
        return float(self.rewards.double().sum())

    def numbers(self) -> dict[str, float]:
        """What is averaged over episodes: turns, segments, truncation, sampled and observed tokens, and `info`."""
        sampled = int(self.mask.sum())
        return {
            "turns": float(self.turns), "segments": 1.0 + len(self.contexts), "truncated": float(self.truncated),
            "sampled_tokens": float(sampled),
            "observed_tokens": float(len(self.mask) - sampled), **self.info,
        }  # fmt: skip
