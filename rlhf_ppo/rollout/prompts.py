"""Prompt datasets (texts, conversations or token ids as token ids) and a seeded, resumable sampling order.

`PromptDataset.report` counts every prompt that was truncated or dropped.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import datasets
import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.chat.messages import read_tools
from rlhf_ppo.chat.prompt import ChatPrompt
from rlhf_ppo.rollout.prompt_encoding import (
    OnBadRow,
    PromptForm,
    PromptReport,
    Truncation,
    check_dataset,
    encode_prompts,
    find_prompt_column,
    first_form,
    fit_prompt,
    read_conversation,
    rows_checksum,
)

_TOKEN_COLUMNS = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True)
class PromptBatch:
    """A batch of prompts; item i of every field belongs to the same row of the dataset."""

    indices: list[int]
    """Positions in the `PromptDataset`."""
    input_ids: list[Int[Tensor, " _"]]
    """Token ids, 1-D int64, unpadded."""
    texts: list[str]
    """Texts decoded from `input_ids`; those of conversations are `ChatPrompt`s: with role markers, and messages."""
    columns: dict[str, list[Any]]
    """The dataset's columns for reward sources, the original prompt column included."""
    template_kwargs: list[Mapping[str, Any]] = field(default_factory=list)
    """What the chat template gets: the dataset's `chat_template_kwargs`, and the `tools` of a conversation."""


class PromptDataset:
    """Prompts as token ids, with their texts and the columns for reward sources.

    The prompt column holds token ids (`input_ids`), plain text, or conversations: lists of
    `{"role": ..., "content": ...}`, rendered by the tokenizer's chat template up to the start of the answer, with the
    tool schemas of a column `tools`.

    Args:
        dataset: one split, a `datasets.Dataset`.
        tokenizer: the policy's tokenizer.
        column: the prompt column; None: the first that exists of "input_ids", "prompt", "query".
        max_prompt_tokens: maximum prompt length in tokens; None: no limit.
        truncation: how longer prompts are handled: "keep_end" cuts the start (but a BOS token), "keep_start" cuts the
            end, "drop" drops the row, "error" raises ValueError.
        chat_template_kwargs: passed to the chat template of conversations, an environment's messages included.
        on_bad_row: "stop" raises at a row whose prompt cannot be read, "skip" drops and counts it.

    Raises:
        TypeError: not one split of a map-style dataset, or a row of another type than the first.
        ValueError: no such column, no prompt left, a token id outside the vocabulary, or a conversation that is
            malformed, is refused by the chat template, or cannot be answered.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        column: str | None = None,
        max_prompt_tokens: int | None = None,
        truncation: Truncation = "keep_end",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_bad_row: OnBadRow = "stop",
    ) -> None:
        check_dataset(dataset)
        _check_settings(truncation, max_prompt_tokens, on_bad_row)
        self._tokenizer, self._dataset = tokenizer, dataset.with_format(None)
        self._template_kwargs = dict(chat_template_kwargs or {})
        column = find_prompt_column(self._dataset, column)
        self._form: PromptForm = first_form(self._dataset[column], column, on_bad_row)
        _check_truncation(truncation, self._form)
        counts: Counter[str] = Counter()
        self._rows: list[int] = []
        encoded: list[NDArray[np.int32]] = []
        for row, ids in enumerate(
            encode_prompts(self._dataset, column, self._form, tokenizer, chat_template_kwargs, on_bad_row)
        ):
            if ids is None:
                counts["unreadable"] += 1
                continue
            fit = fit_prompt(ids, row, max_prompt_tokens, truncation, bos=tokenizer.bos_token_id)
            outcome = "empty" if not ids else "too_long" if fit is None else "truncated" if len(fit) < len(ids) else ""
            counts[outcome] += 1
            if fit:
                self._rows.append(row)
                encoded.append(np.asarray(fit, np.int32))
                counts["ending_in_eos"] += fit[-1] == tokenizer.eos_token_id
        self._ends = np.cumsum([len(ids) for ids in encoded])
        self._tokens = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *encoded]))
        self.report = PromptReport(
            column=column,
            form=self._form,
            rows=len(dataset),
            kept=len(self._rows),
            truncated=counts["truncated"],
            too_long=counts["too_long"],
            empty=counts["empty"],
            unreadable=counts["unreadable"],
            ending_in_eos=counts["ending_in_eos"],
            max_prompt_tokens=max_prompt_tokens,
            truncation=truncation,
        )
        if not self._rows:
            raise ValueError(f"No prompt is left: {self.report.describe()}. Check the column and max_prompt_tokens.")

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int | None = None,
        truncation: Truncation = "keep_end",
    ) -> "PromptDataset":
        """Make a dataset from a list of texts, as the column "prompt"."""
        dataset = datasets.Dataset.from_dict({"prompt": list(texts)})
        return cls(dataset, tokenizer, max_prompt_tokens=max_prompt_tokens, truncation=truncation)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Length of each prompt, in tokens."""
        lengths: list[int] = np.diff(self._ends, prepend=0).tolist()
        return lengths

    @property
    def checksum(self) -> int:
        """CRC-32 of all token ids; of the rows, where the chat template writes today's date into each prompt."""
        if self._form == "conversation" and "strftime_now" in str(self._tokenizer.chat_template):
            return rows_checksum(self._dataset, self._rows, (self.report.column, "tools"))
        return zlib.crc32(self._ends.tobytes(), zlib.crc32(self._tokens.numpy().tobytes()))

    def __getitem__(self, index: int) -> Int[Tensor, " prompt"]:
        """Token ids of one prompt, 1-D int64."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._tokens[start : int(self._ends[index])].long()

    def batch(self, indices: Sequence[int]) -> PromptBatch:
        """Return the prompts at `indices`, in this order, with their texts and columns."""
        input_ids = [self[index] for index in indices]
        texts = [
            str(self._tokenizer.decode(ids, skip_special_tokens=self._form != "conversation")) for ids in input_ids
        ]
        options: list[Mapping[str, Any]] = [self._template_kwargs] * len(indices)
        columns: dict[str, list[Any]] = self._dataset[[self._rows[index] for index in indices]]
        if self._form == "conversation":
            column = self.report.column
            conversations = [read_conversation(value, column) for value in columns[column]]
            tools = [read_tools(value, "tools") for value in columns.get("tools", [None] * len(indices))]
            options = [self._template_kwargs | ({"tools": schemas} if schemas else {}) for schemas in tools]
            texts = [ChatPrompt(text, messages) for text, messages in zip(texts, conversations, strict=True)]
        columns = {name: values for name, values in columns.items() if name not in _TOKEN_COLUMNS}
        return PromptBatch(list(indices), input_ids, texts, columns, options)


def _check_truncation(truncation: Truncation, form: PromptForm) -> None:
    if form == "conversation" and truncation == "keep_start":
        raise ValueError(
            "truncation='keep_start' would cut off the end of a conversation, where the answer begins: the policy "
            "would continue the user's turn. Use 'keep_end', 'drop' or 'error'."
        )


def _check_settings(truncation: object, max_prompt_tokens: int | None, on_bad_row: object) -> None:
    if on_bad_row not in get_args(OnBadRow):
        raise ValueError(f"on_bad_row must be one of {', '.join(get_args(OnBadRow))}, got {on_bad_row!r}.")
    if truncation not in get_args(Truncation):
        raise ValueError(f"truncation must be one of {', '.join(get_args(Truncation))}, got {truncation!r}.")
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1 or None (no limit), got {max_prompt_tokens}.")


class PromptSampler:
    """Infinite iterator over batches of prompt indices, in a new seeded permutation each epoch.

    Epoch e is a permutation seeded by (seed, e), so the position is the only state. A batch that reaches the end of an
    epoch continues in the next one: no prompt is left out, no batch is short. Each process takes `batch_size` of the
    `world_size * batch_size` prompts of a step; with `lengths`, in descending order of length and alternating
    direction, so that processes have similar numbers of tokens.

    Args:
        length: number of prompts in the dataset.
        batch_size: prompts per step on this process.
        seed: the same on all processes, >= 0.
        rank: this process.
        world_size: number of processes.
        lengths: tokens of each prompt; None: each process takes `batch_size` consecutive prompts.
        checksum: of the prompts; an order that was saved for prompts with another one is refused.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | None = None,
        checksum: int = 0,
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"PromptSampler needs length >= 1 and batch_size >= 1, got {length} and {batch_size}.")
        if seed < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"PromptSampler needs seed >= 0 and 0 <= rank < world_size, got seed {seed}, rank {rank}, "
                f"world_size {world_size}."
            )
        self._length, self._batch_size, self._seed = length, batch_size, seed
        self._rank, self._world_size, self._lengths, self._checksum = rank, world_size, lengths, checksum
        self._position = 0
        self._epoch_order: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> float:
        """Passes over the dataset so far, all processes together."""
        return self._position / self._length

    def __iter__(self) -> Iterator[list[int]]:
        """Return itself; it never ends."""
        return self

    def __next__(self) -> list[int]:
        """Next batch of this process: `batch_size` indices into the dataset."""
        start, count = self._position, self._world_size * self._batch_size
        self._position += count
        global_batch = [self._index_at(position) for position in range(start, start + count)]
        return [global_batch[slot] for slot in self._own_slots(global_batch)]

    def _own_slots(self, global_batch: list[int]) -> list[int]:
        slots = list(range(len(global_batch)))
        if self._lengths is None or self._world_size == 1:
            return slots[self._rank * self._batch_size :][: self._batch_size]
        tokens = [self._lengths[index] for index in global_batch]
        slots.sort(key=lambda slot: -tokens[slot])
        reverse_rank = self._world_size - 1 - self._rank
        return sorted(
            slots[turn * self._world_size + (reverse_rank if turn % 2 else self._rank)]
            for turn in range(self._batch_size)
        )

    def state_dict(self) -> dict[str, int]:
        """Seed, prompts and position; the same on every process, valid for any number of processes."""
        return {"seed": self._seed, "length": self._length, "checksum": self._checksum, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the saved position; a ValueError if the state is of another seed or of other prompts."""
        for name, expected in (("seed", self._seed), ("length", self._length), ("checksum", self._checksum)):
            if state.get(name, expected) != expected:  # earlier versions saved no checksum
                raise ValueError(
                    f"The saved prompt order has {name} {state[name]}, this run has {expected}: prompts would be "
                    "repeated, skipped or others. Resume with dataset and seed of the first run, or start a new one."
                )
        self._position = state["position"]

    def go_on_from(self, earlier: "PromptSampler") -> None:
        """Begin at the position of an earlier order, if that is of the same prompts."""
        if (earlier._length, earlier._checksum) == (self._length, self._checksum):
            self._position = earlier._position

    def _index_at(self, position: int) -> int:
        epoch, offset = divmod(position, self._length)
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(self._length).tolist()
            self._epoch_order = (epoch, order)
        return self._epoch_order[1][offset]
