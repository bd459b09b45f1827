"""Encode the prompt column of a dataset as token ids: find it, check it, tokenize and truncate."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.chat.cells import parse_cell
from rlhf_ppo.chat.encoding import encode_texts
from rlhf_ppo.chat.messages import as_messages, read_text, read_tools
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.chat.template import render_chat

Truncation = Literal["keep_end", "keep_start", "drop", "error"]
PromptForm = Literal["tokens", "text", "conversation"]
OnBadRow = Literal["stop", "skip"]

_DEFAULT_COLUMNS = ("input_ids", "prompt", "query")
_RESERVED_COLUMNS = frozenset({"prompts", "responses"})
_CHUNK_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """Counts of the dataset rows that were kept, truncated and dropped as prompts."""

    column: str
    """The column that the prompts were read from."""
    form: PromptForm
    """Whether the column holds token ids, texts or conversations."""
    rows: int
    """Rows in the dataset."""
    kept: int
    """Prompts in the dataset, truncated ones included."""
    truncated: int
    """Kept prompts that were cut to `max_prompt_tokens`."""
    too_long: int
    """Prompts dropped because they have more than `max_prompt_tokens` tokens (truncation "drop")."""
    empty: int
    """Prompts dropped because they have no tokens: a policy needs one to continue from."""
    unreadable: int = 0
    """Rows dropped because they hold no prompt that can be read (on_bad_row "skip")."""
    ending_in_eos: int
    """Kept prompts whose last token is the end-of-sequence token, after which a decoder has nothing to continue."""
    max_prompt_tokens: int | None
    """Maximum length of a prompt, in tokens; None: no limit."""
    truncation: Truncation
    """How longer prompts were handled."""

    def describe(self) -> str:
        """One sentence for the log, with every nonzero count."""
        limit = f"{self.max_prompt_tokens} tokens"
        side = {"keep_end": "keeping the end", "keep_start": "keeping the start"}.get(self.truncation, self.truncation)
        notes = [
            f"{self.truncated} cut to {limit}, {side}" if self.truncated else "",
            f"{self.too_long} left out as longer than {limit}" if self.too_long else "",
            f"{self.empty} left out as empty" if self.empty else "",
            f"{self.unreadable} left out as unreadable" if self.unreadable else "",
            f"{self.ending_in_eos} end in the end-of-sequence token" if self.ending_in_eos else "",
        ]
        details = "; ".join(note for note in notes if note)
        return f"{self.kept} of {self.rows} prompts from column {self.column!r}" + (f" ({details})" if details else "")


def check_dataset(dataset: object) -> None:
    """Raise TypeError unless `dataset` is one split with random access."""
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        names = [str(name) for name in dataset]
        raise TypeError(
            f"expected one split, got a dataset of {len(names)} ({', '.join(names) or 'none'}): it is unknown which "
            "one has the prompts. Pass one split, e.g. dataset['train']."
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"Expected a datasets.Dataset, got {type(dataset).__name__}: prompts are shuffled and resumed by position. "
            "For a list of texts use PromptDataset.from_texts; for a stream, take a part of it with "
            "`datasets.Dataset.from_list(list(stream.take(n)))`."
        )


def find_prompt_column(dataset: datasets.Dataset, column: str | None) -> str:
    """Return the named column, or the first of "input_ids", "prompt", "query" that exists."""
    names = dataset.column_names
    if clash := _RESERVED_COLUMNS.intersection(names):
        raise ValueError(
            f"Column {min(clash)!r} has the name of a keyword that reward sources are called with. Rename the column."
        )
    candidates = _DEFAULT_COLUMNS if column is None else (column,)
    for name in candidates:
        if name in names and len(dataset):
            return name
    if not len(dataset):
        raise ValueError("The prompt dataset has no rows. Check the split and the filters before it.")
    raise ValueError(
        f"No column {' or '.join(map(repr, candidates))} in the prompt dataset; it has {', '.join(map(repr, names))}. "
        "Name the prompt column with `column=`."
    )


def rows_checksum(dataset: datasets.Dataset, rows: Sequence[int], columns: Sequence[str]) -> int:
    """CRC-32 of the given rows as they are written, in those of `columns` that exist."""
    checksum = 0
    for row in dataset.select_columns([name for name in columns if name in dataset.column_names]).select(rows):
        checksum = zlib.crc32(json.dumps(row, default=str).encode(), checksum)
    return checksum


def first_form(values: Sequence[Any], column: str, on_bad_row: OnBadRow) -> PromptForm:
    """The form of the first row that is not empty; with on_bad_row="skip", of the first that has one."""
    said = (value for value in values if value not in (None, [], ""))
    for value in said if on_bad_row == "skip" else ():
        with suppress(TypeError, ValueError):
            return prompt_form(parse_cell(value, column), column)
    return prompt_form(parse_cell(next(said, values[0]), column), column)


def prompt_form(value: object, column: str) -> PromptForm:
    """Classify a value of the prompt column; TypeError if it cannot be a prompt."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return "tokens"
    if isinstance(value, Mapping) or (isinstance(value, list) and all(isinstance(item, Mapping) for item in value)):
        return "conversation"
    raise TypeError(
        f"Column {column!r} must hold texts, token ids, or conversations (lists of {{'role', 'content'}}), "
        f"got {type(value).__name__} in the first row: {str(value)[:60]!r}."
    )


def encode_prompts(
    dataset: datasets.Dataset,
    column: str,
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
    on_bad_row: OnBadRow = "stop",
) -> Iterator[Sequence[int] | None]:
    """Yield the token ids of each row's prompt, given its `tools`; None for an unreadable row that is skipped."""
    if form == "conversation" and not tokenizer.chat_template:
        raise ValueError(
            f"Column {column!r} holds conversations, but the tokenizer of {tokenizer.name_or_path!r} has no chat "
            "template. Set `tokenizer.chat_template`, or turn the conversations into plain texts yourself."
        )
    read = partial(_read_prompt, column=column, form=form, tokenizer=tokenizer, options=chat_template_kwargs)
    chunk: list[Any] = []
    values = dataset[column]
    tools = dataset["tools"] if "tools" in dataset.column_names else [None] * len(values)
    for row, (value, schemas) in enumerate(zip(values, tools, strict=True)):
        try:
            chunk.append(read(value, schemas, row))
        except (TypeError, ValueError):
            if on_bad_row == "stop":
                raise
            chunk.append(None)
        if len(chunk) == _CHUNK_SIZE:
            yield from _encode_chunk(chunk, form, tokenizer)
            chunk = []
    yield from _encode_chunk(chunk, form, tokenizer)


def _encode_chunk(
    chunk: list[Any], form: PromptForm, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Sequence[int] | None]:
    """Token ids of prompts that are read; texts are tokenized together."""
    readable = [prompt for prompt in chunk if prompt is not None]
    if form == "text":
        readable = encode_texts(tokenizer, readable) if readable else []
    elif form == "conversation" and readable:  # whose template writes all special tokens itself
        readable = tokenizer(readable, add_special_tokens=False, verbose=False)["input_ids"]
    encoded = iter(readable)
    yield from (None if prompt is None else next(encoded) for prompt in chunk)


def _read_prompt(
    value: Any,
    tools: Any,
    row: int,
    *,
    column: str,
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None,
) -> Any:
    """Check a row's prompt and return it as token ids or as text, conversations rendered."""
    try:
        value = parse_cell(value, column)
        if value is None or (value != [] and prompt_form(value, column) != form):
            raise TypeError(f"Row {row} of column {column!r} holds {type(value).__name__}, but row 0 holds {form}.")
        if form == "conversation":
            messages = _answerable(read_text(value, column) if value else [], row, column)
            schemas = read_tools(tools, "tools")
            return render_chat(tokenizer, messages, tools=schemas, add_generation_prompt=True, options=options)
        if form == "text":
            return read_text(value, column)
    except UnreadableText as error:
        raise ValueError(f"Row {row} of column {column!r}: {error}") from error
    if value and not 0 <= min(value) <= max(value) < len(tokenizer):
        raise ValueError(
            f"Row {row} of column {column!r} has token ids from {min(value)} to {max(value)}, but the tokenizer knows "
            f"0 to {len(tokenizer) - 1}. Was it encoded with another tokenizer?"
        )
    return value


def read_conversation(value: object, column: str) -> list[dict[str, Any]]:
    """The messages of a prompt that `encode_prompts` has taken."""
    return as_messages(read_text(parse_cell(value, column), column), "user")


def _answerable(messages: Any, row: int, column: str) -> Any:
    if not messages or messages[-1]["role"] == "assistant":
        problem = "no turns" if not messages else "an assistant turn at its end"
        raise ValueError(
            f"The conversation in row {row} of column {column!r} has {problem}: there is nothing to answer. "
            "A prompt ends with the user's or the tool's turn; leave the answer out."
        )
    return messages


def fit_prompt(
    ids: Sequence[int], row: int, limit: int | None, truncation: Truncation, *, bos: int | None = None
) -> Sequence[int] | None:
    """Truncate a prompt to `limit` tokens, its BOS token `bos` kept; None if `truncation` drops it."""
    if limit is None or len(ids) <= limit:
        return ids
    if truncation == "error":
        raise ValueError(
            f"The prompt in row {row} has {len(ids)} tokens, max_prompt_tokens is {limit}. "
            "Raise the limit, or choose truncation 'keep_end', 'keep_start' or 'drop'."
        )
    if truncation == "drop":
        return None
    if truncation == "keep_start":
        return ids[:limit]
    return [*ids[:1], *ids[1 - limit :]] if limit > 1 and ids[0] == bos else ids[-limit:]
