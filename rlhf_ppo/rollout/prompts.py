"""Prompts: a dataset of texts, conversations or token ids becomes token ids, and a seeded order to draw them in.

Nothing is dropped or cut in silence: `PromptDataset.report` counts every prompt that was changed or left out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import datasets
import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.rollout.prompt_encoding import (
    PromptForm,
    Truncation,
    check_dataset,
    encode_prompts,
    find_prompt_column,
    fit_prompt,
    prompt_form,
)

_TOKEN_COLUMNS = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """What became of the rows of a dataset on their way to being prompts."""

    column: str
    """The column that the prompts were read from."""
    form: PromptForm
    """What that column holds: ready token ids, plain text, or conversations."""
    rows: int
    """Rows in the dataset."""
    kept: int
    """Prompts that can be drawn."""
    truncated: int
    """Prompts cut down to `max_prompt_tokens`; they are among the kept."""
    too_long: int
    """Prompts left out because they are longer than `max_prompt_tokens` and the rule is "drop"."""
    empty: int
    """Prompts left out because they hold no token: a policy needs one token to continue from."""
    ending_in_eos: int
    """Kept prompts whose last token is the end-of-sequence token; to a decoder this says that the text is over."""
    max_prompt_tokens: int | None
    """The limit on the length of a prompt, in tokens."""
    truncation: Truncation
    """What was done with prompts beyond the limit."""

    def describe(self) -> str:
        """One sentence for the log, with every count that is not zero."""
        limit = f"{self.max_prompt_tokens} tokens"
        side = {"keep_end": "keeping the end", "keep_start": "keeping the start"}.get(self.truncation, self.truncation)
        notes = [
            f"{self.truncated} cut to {limit}, {side}" if self.truncated else "",
            f"{self.too_long} left out as longer than {limit}" if self.too_long else "",
            f"{self.empty} left out as empty" if self.empty else "",
            f"{self.ending_in_eos} end in the end-of-sequence token" if self.ending_in_eos else "",
        ]
        found = "; ".join(note for note in notes if note)
        return f"{self.kept} of {self.rows} prompts from column {self.column!r}" + (f" ({found})" if found else "")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts drawn together: item i of every field belongs to the same row of the dataset."""

    indices: list[int]
    """Positions in the `PromptDataset`."""
    input_ids: list[Int[Tensor, " _"]]
    """Token ids, 1-D int64, unpadded."""
    texts: list[str]
    """What the policy reads, as text: decoded from `input_ids`; a conversation keeps its role markers."""
    columns: dict[str, list[Any]]
    """The dataset's other columns, the untouched prompt column included, for reward sources."""


class PromptDataset:
    """Prompts ready to be sampled from: token ids, their texts, and the columns that reward sources want.

    The prompt column holds token ids (`input_ids`), plain text, or conversations: lists of
    `{"role": ..., "content": ...}`, rendered by the tokenizer's chat template up to the start of the answer.

    Args:
        dataset: one split of a `datasets.Dataset`.
        tokenizer: the policy's tokenizer.
        column: where the prompts are. None takes the first that exists of "input_ids", "prompt", "query".
        max_prompt_tokens: longest prompt, in tokens; None for no limit.
        truncation: what happens beyond the limit. "keep_end" cuts from the front (the latest words stay),
            "keep_start" cuts from the back, "drop" leaves the row out, "error" refuses the dataset.
        chat_template_kwargs: passed on to the chat template of conversations.

    Raises:
        TypeError: not one split of a map-style dataset, or a row of another type than the first.
        ValueError: no such column, no prompt left, a token id outside the vocabulary, or a conversation that
            cannot be answered.
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
    ) -> None:
        check_dataset(dataset)
        _check_limit(truncation, max_prompt_tokens)
        self._tokenizer, self._dataset = tokenizer, dataset.with_format(None)
        column = find_prompt_column(self._dataset, column)
        self._form: PromptForm = prompt_form(self._dataset[0][column], column)
        if self._form == "conversation" and truncation == "keep_start":
            raise ValueError(
                "truncation='keep_start' would cut off the end of a conversation, where the answer begins: the policy "
                "would continue the user's words. Take 'keep_end', 'drop' or 'error'."
            )
        counts: Counter[str] = Counter()
        rows: list[int] = []
        kept: list[NDArray[np.int32]] = []
        for row, ids in enumerate(
            encode_prompts(self._dataset[column], column, self._form, tokenizer, chat_template_kwargs)
        ):
            cut = fit_prompt(ids, row, max_prompt_tokens, truncation)
            outcome = "empty" if not ids else "too_long" if cut is None else "truncated" if len(cut) < len(ids) else ""
            counts[outcome] += 1
            if cut:
                rows.append(row)
                kept.append(np.asarray(cut, np.int32))
                counts["ending_in_eos"] += cut[-1] == tokenizer.eos_token_id
        self._rows = rows
        self._ends = np.cumsum([len(ids) for ids in kept])
        self._tokens = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *kept]))
        self.report = PromptReport(
            column=column,
            form=self._form,
            rows=len(dataset),
            kept=len(rows),
            truncated=counts["truncated"],
            too_long=counts["too_long"],
            empty=counts["empty"],
            ending_in_eos=counts["ending_in_eos"],
            max_prompt_tokens=max_prompt_tokens,
            truncation=truncation,
        )
        if not rows:
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
        """The same from a plain list of texts; they become the column "prompt"."""
        dataset = datasets.Dataset.from_dict({"prompt": list(texts)})
        return cls(dataset, tokenizer, max_prompt_tokens=max_prompt_tokens, truncation=truncation)

    def __len__(self) -> int:
        """How many prompts can be drawn."""
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        found: list[int] = np.diff(self._ends, prepend=0).tolist()
        return found

    def __getitem__(self, index: int) -> Int[Tensor, " prompt"]:
        """Token ids of one prompt, 1-D int64."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._tokens[start : int(self._ends[index])].long()

    def batch(self, indices: Sequence[int]) -> PromptBatch:
        """The prompts at these positions, with their texts and columns, in this order."""
        input_ids = [self[index] for index in indices]
        texts = [
            str(self._tokenizer.decode(ids, skip_special_tokens=self._form != "conversation")) for ids in input_ids
        ]
        columns: dict[str, list[Any]] = self._dataset[[self._rows[index] for index in indices]]
        columns = {name: values for name, values in columns.items() if name not in _TOKEN_COLUMNS}
        return PromptBatch(indices=list(indices), input_ids=input_ids, texts=texts, columns=columns)


def _check_limit(truncation: object, max_prompt_tokens: int | None) -> None:
    if truncation not in get_args(Truncation):
        raise ValueError(f"truncation must be one of {', '.join(get_args(Truncation))}, got {truncation!r}.")
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1 or None (no limit), got {max_prompt_tokens}.")


class PromptSampler:
    """An endless, seeded order of prompts: a fresh permutation each epoch, cut into full batches.

    Epoch e is a permutation drawn from (seed, e) alone, so a position is all there is to remember. A batch that
    reaches the end of an epoch goes on in the next one: no prompt is left out, no batch is short. Of the
    `world_size * batch_size` prompts of a step each process takes its own `batch_size`; dealt out by length, the
    longest first and to and fro, so that all have about as many tokens to read.

    Args:
        length: number of prompts in the dataset.
        batch_size: prompts per step on this process.
        seed: the same on all processes, >= 0.
        rank: this process.
        world_size: number of processes.
        lengths: tokens of each prompt; None: each process takes the next `batch_size` as they come.
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
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"PromptSampler needs length >= 1 and batch_size >= 1, got {length} and {batch_size}.")
        if seed < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"PromptSampler needs seed >= 0 and 0 <= rank < world_size, got seed {seed}, rank {rank}, "
                f"world_size {world_size}."
            )
        self._length, self._batch_size, self._seed = length, batch_size, seed
        self._rank, self._world_size, self._lengths = rank, world_size, lengths
        self._position = 0
        self._epoch_order: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> float:
        """Passes over the dataset so far, all processes together."""
        return self._position / self._length

    def __iter__(self) -> Iterator[list[int]]:
        """Itself: it never ends."""
        return self

    def __next__(self) -> list[int]:
        """The next batch of this process: `batch_size` positions in the dataset."""
        start, count = self._position, self._world_size * self._batch_size
        self._position += count
        global_batch = [self._at(position) for position in range(start, start + count)]
        return [global_batch[place] for place in self._own_places(global_batch)]

    def _own_places(self, global_batch: list[int]) -> list[int]:
        places = list(range(len(global_batch)))
        if self._lengths is None or self._world_size == 1:
            return places[self._rank * self._batch_size :][: self._batch_size]
        tokens = [self._lengths[index] for index in global_batch]
        places.sort(key=lambda place: -tokens[place])
        back = self._world_size - 1 - self._rank
        return sorted(
            places[turn * self._world_size + (back if turn % 2 else self._rank)] for turn in range(self._batch_size)
        )

    def state_dict(self) -> dict[str, int]:
        """The exact position, the same on every process; loads under another number of processes, too."""
        return {"seed": self._seed, "length": self._length, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where the saved sampler stood.

        Raises:
            ValueError: the state belongs to a dataset of another length or to another seed.
        """
        for name, ours in (("seed", self._seed), ("length", self._length)):
            if state[name] != ours:
                raise ValueError(
                    f"The saved prompt order has {name} {state[name]}, this run has {ours}: prompts would be repeated "
                    "and skipped. Resume with the dataset and seed of the first run, or start a new one."
                )
        self._position = state["position"]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self._length)
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(self._length).tolist()
            self._epoch_order = (epoch, order)
        return self._epoch_order[1][offset]
