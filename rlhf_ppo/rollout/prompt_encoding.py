"""Encode the prompt column of a dataset as token ids: find it, check it, tokenize and truncate."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_end", "keep_start", "drop", "error"]
PromptForm = Literal["tokens", "text", "conversation"]

_DEFAULT_COLUMNS = ("input_ids", "prompt", "query")
_RESERVED_COLUMNS = frozenset({"prompts", "responses"})
_CHUNK_SIZE = 1024


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


def prompt_form(value: object, column: str) -> PromptForm:
    """Classify a value of the prompt column; TypeError if it cannot be a prompt."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return "tokens"
    if isinstance(value, list) and all(isinstance(item, Mapping) and "role" in item for item in value):
        return "conversation"
    raise TypeError(
        f"Column {column!r} must hold texts, token ids, or conversations (lists of {{'role', 'content'}}), "
        f"got {type(value).__name__} in the first row: {str(value)[:60]!r}."
    )


def encode_prompts(
    values: Sequence[Any],
    column: str,
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Iterator[Sequence[int]]:
    """Yield the token ids of each row; texts are tokenized in chunks."""
    if form == "conversation" and not tokenizer.chat_template:
        raise ValueError(
            f"Column {column!r} holds conversations, but the tokenizer of {tokenizer.name_or_path!r} has no chat "
            "template. Set `tokenizer.chat_template`, or turn the conversations into plain texts yourself."
        )
    vocab_size = len(tokenizer)
    for start in range(0, len(values), _CHUNK_SIZE):
        chunk = list(values[start : start + _CHUNK_SIZE])
        for row, value in enumerate(chunk, start):
            _check_prompt(value, row, column, form, vocab_size)
        if form == "tokens":
            yield from chunk
            continue
        if form == "conversation":
            options = dict(chat_template_kwargs or {})
            chunk = [
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
                for turns in chunk
            ]
        # A chat template writes the special tokens itself; a second BOS was never in the training data.
        encoded = tokenizer(chunk, add_special_tokens=form == "text", verbose=False)
        yield from encoded["input_ids"]


def _check_prompt(value: Any, row: int, column: str, form: PromptForm, vocab_size: int) -> None:
    if value is None or (value != [] and prompt_form(value, column) != form):
        raise TypeError(f"Row {row} of column {column!r} holds {type(value).__name__}, but row 0 holds {form}.")
    if form == "tokens" and value and not 0 <= min(value) <= max(value) < vocab_size:
        raise ValueError(
            f"Row {row} of column {column!r} has token ids from {min(value)} to {max(value)}, but the tokenizer knows "
            f"0 to {vocab_size - 1}. Was it encoded with another tokenizer?"
        )
    if form == "conversation" and (not value or value[-1]["role"] == "assistant"):
        problem = "no turns" if not value else "an assistant turn at its end"
        raise ValueError(
            f"The conversation in row {row} of column {column!r} has {problem}: there is nothing to answer. "
            "A prompt ends with the user's or the tool's turn; leave the answer out."
        )


def fit_prompt(ids: Sequence[int], row: int, limit: int | None, truncation: Truncation) -> Sequence[int] | None:
    """Truncate a prompt to `limit` tokens; None if `truncation` drops it."""
    if limit is None or len(ids) <= limit:
        return ids
    if truncation == "error":
        raise ValueError(
            f"The prompt in row {row} has {len(ids)} tokens, max_prompt_tokens is {limit}. "
            "Raise the limit, or choose truncation 'keep_end', 'keep_start' or 'drop'."
        )
    if truncation == "drop":
        return None
    return ids[-limit:] if truncation == "keep_end" else ids[:limit]
