"""Encode texts without a second BOS where a chat template has written one, and decode what a model has sampled."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 8
"""Tokens of a prompt that are decoded before its response."""
_UNKNOWN = IndexError, KeyError, OverflowError, TypeError, ValueError
"""What tokenizers raise at an id that is none of their tokens."""


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with the tokenizer's special tokens.

    A text that begins with the special token that the tokenizer puts first (BOS) has been rendered by a chat template:
    it keeps its own, because a second one was never in the training data.
    """
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    twice = [
        n for n, ids in enumerate(rows) if len(ids) > 1 and ids[0] == ids[1] and ids[0] in tokenizer.all_special_ids
    ]
    bare = tokenizer([texts[n] for n in twice], add_special_tokens=False, verbose=False)["input_ids"] if twice else []
    for row, ids in zip(twice, bare, strict=True):
        if rows[row][1 : 1 + len(ids)] == ids:
            rows[row] = rows[row][1:]
    return rows


def decode_tokens(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """The text of tokens; those that the tokenizer does not know have none.

    Models have more embeddings than their tokenizers have tokens, and may sample the others. Fast tokenizers leave
    them out, tokenizers in Python raise.
    """
    try:
        return str(tokenizer.decode(ids, **options))
    except _UNKNOWN:
        return str(tokenizer.decode([token for token in ids if _is_known(tokenizer, token)], **options))


def _is_known(tokenizer: Any, token: int) -> bool:
    try:
        tokenizer.decode([token])
    except _UNKNOWN:
        return False
    return True


def continued_text(tokenizer: Any, prompt: Sequence[int], response: Sequence[int]) -> str:
    """The text that a response adds to its prompt, without special tokens.

    Decoders of SentencePiece (Llama 2, Mistral, Phi 3) drop the space that a text begins with. Behind a prompt, this
    space divides two words.
    """
    before = prompt[-_CONTEXT:]
    alone, start, both = (
        decode_tokens(tokenizer, ids, skip_special_tokens=True) for ids in (response, before, [*before, *response])
    )
    continued = both.removeprefix(start)
    return continued if both.startswith(start) and continued.endswith(alone) else alone


def whole_characters(text: str) -> str:
    """The text with U+FFFD for half a character (a lone surrogate), which no tokenizer encodes.

    A policy that calls a tool with half an emoji hears it back.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
