"""Make preference pairs from labeled texts: a text of a higher label is preferred to one of a lower label."""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from reward_model.data.comparisons import Comparison
from reward_model.data.rows import BadRow, read_number


def pairs_from_labels(
    texts: Sequence[str], labels: Sequence[float], *, seed: int, rounds: int = 1, source: str = ""
) -> list[Comparison]:
    """Make pairs of texts with different labels; in each round no text is used twice.

    The texts are shuffled and sorted by label, and text i is paired with text i + M, where M is the size of the largest
    class or half of all, whichever is larger: then the labels differ, and no text is used twice. Balanced labels use
    every text.

    Args:
        texts: The labeled texts.
        labels: Numbers, high is better.
        seed: Seed of the shuffling.
        rounds: Maximum of pairs per text, each with another partner.
        source: Value of `Comparison.source` of every pair.

    Raises:
        ValueError: Fewer than two different labels, or unequal numbers of texts and labels.
    """
    if len(texts) != len(labels):
        raise ValueError(f"Each text needs a label, got {len(texts)} texts and {len(labels)} labels.")
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"Pairs need texts of at least two different labels, got {dict(counts)}.")
    offset = max(*counts.values(), (len(texts) + 1) // 2)
    generator = random.Random(seed)
    pairs: dict[tuple[str, str], Comparison] = {}
    for _ in range(rounds):
        order = list(range(len(texts)))
        generator.shuffle(order)
        order.sort(key=lambda index: labels[index])
        drawn = [
            Comparison(prompt="", completions=(texts[better], texts[worse]), source=source)
            for worse, better in zip(order, order[offset:], strict=False)
        ]
        generator.shuffle(drawn)
        pairs |= {(str(pair.completions[0]), str(pair.completions[1])): pair for pair in drawn}
    return [pair for pair in pairs.values() if pair.completions[0] != pair.completions[1]]


def excerpt(text: str, *, max_words: int, min_words: int | None = None, generator: random.Random | None = None) -> str:
    """An excerpt of at most `max_words` consecutive words, with single spaces.

    Args:
        text: The whole text.
        max_words: Upper bound.
        min_words: With a generator, the length is random between this and `max_words`; None: always `max_words`.
        generator: Chooses the start of the excerpt; None: the beginning of the text.
    """
    words = text.split()
    length = max_words
    if generator is not None and min_words is not None:
        length = generator.randint(min_words, max_words)
    start = generator.randint(0, max(0, len(words) - length)) if generator is not None else 0
    return " ".join(words[start : start + length])


_GOOD = "positive", "pos", "good", "true", "yes", "y", "desirable", "chosen", "like", "thumbs up", "👍"
_BAD = "negative", "neg", "bad", "false", "no", "n", "undesirable", "rejected", "dislike", "thumbs down", "👎"
_STARS = re.compile(r"(\d+) stars?")
_WORDS = dict.fromkeys(_GOOD, 1.0) | dict.fromkeys(_BAD, 0.0)


def label_number(label: Any, where: str) -> float:
    """Convert a label to a number; booleans and words such as positive/negative become 1 and 0."""
    if isinstance(label, str) and (word := label.strip().lower().replace("_", " ")) in _WORDS:
        return _WORDS[word]
    if isinstance(label, str) and (stars := _STARS.fullmatch(label.strip().lower())):
        return float(stars[1])
    number = float(label) if isinstance(label, bool) else read_number(label)
    if not math.isfinite(number):
        raise BadRow(f"{where}: field 'label' must be a number, true/false or positive/negative, got {label!r:.40}.")
    return number
