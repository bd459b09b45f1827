"""Judges that took no part in training, and measures of how varied the generated texts are.

Two judges look at sentiment: VADER, a lexicon made by people (Hutto and Gilbert 2014), and a linear classifier trained
on reviews that the reward model never saw. Both mostly count words, so neither notices ungrammatical praise: read the
distinct n-grams, the repetition and the samples beside them. Every mean comes with its standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .reviews import Review, labeled_excerpts

GROUP_SIZE = 64
"""Texts over which distinct n-grams are counted: a ratio that falls with the number of texts needs a fixed one."""


@dataclass(frozen=True)
class Measurement:
    """A mean over texts or groups of texts."""

    mean: float
    """The mean; nan without any value."""
    stderr: float
    """Its standard error; nan with fewer than two values."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Measurement:
        """Mean and standard error (sample standard deviation over √n) of independent values."""
        if not values:
            return cls(math.nan, math.nan)
        stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), stderr)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.stderr:.3f}"


class VaderJudge:
    """VADER's compound score of each text, from -1 (negative) to 1 (positive); exactly 0 without any word it knows."""

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in texts]


class ReviewClassifier:
    """P(positive) by logistic regression on TF-IDF of words and word pairs.

    Training takes two seconds and no random number, so it is trained where it is needed rather than stored.
    """

    def __init__(self, vectorizer: TfidfVectorizer, classifier: LogisticRegression) -> None:
        self._vectorizer = vectorizer
        self._classifier = classifier

    @classmethod
    def train(
        cls, reviews: Sequence[Review], *, min_words: int = 20, max_words: int = 32, per_review: int = 6
    ) -> ReviewClassifier:
        """Learn from excerpts as long as the texts to be judged.

        Args:
            reviews: Reviews that nothing under judgment was trained on.
            min_words: Shortest excerpt.
            max_words: Longest excerpt.
            per_review: Excerpts of each review.

        Raises:
            ValueError: When the reviews do not contain both labels.
        """
        texts, labels = labeled_excerpts(reviews, min_words=min_words, max_words=max_words, per_review=per_review)
        if len(set(labels)) < 2:
            raise ValueError(
                f"The judge needs positive and negative reviews, got {len(reviews)} with the labels "
                f"{sorted(set(labels))}: there would be nothing to tell apart. Give reviews of both labels."
            )
        rare = 2 if len(texts) > 1000 else 1
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=rare, sublinear_tf=True, token_pattern=r"(?u)\b\w[\w']*"
        )
        features = vectorizer.fit_transform(texts)
        return cls(vectorizer, LogisticRegression(C=1.0, max_iter=1000).fit(features, labels))

    def __call__(self, texts: Sequence[str]) -> list[float]:
        if not texts:
            return []
        return [float(p) for p in self._classifier.predict_proba(self._vectorizer.transform(texts))[:, 1]]

    def accuracy(self, reviews: Sequence[Review], *, min_words: int = 20, max_words: int = 32) -> Measurement:
        """Share of openings of held-out reviews whose label it tells."""
        texts, labels = labeled_excerpts(reviews, min_words=min_words, max_words=max_words)
        return Measurement.of([float((p > 0.5) == (label == 1)) for p, label in zip(self(texts), labels, strict=True)])


def distinct_ngrams(texts: Sequence[str], n: int, *, group_size: int = GROUP_SIZE) -> Measurement:
    """Distinct-n (Li et al. 2016): different n-grams of words over all n-grams, in groups of `group_size` texts.

    About 0.9 for bigrams of human text; a policy that has collapsed to one phrase comes near 0. The last group is left
    out if it is smaller, unless it is the only one. Texts too short for an n-gram count nothing.
    """
    groups = [texts[i : i + group_size] for i in range(0, len(texts), group_size)]
    if len(groups) > 1 and len(groups[-1]) < group_size:
        groups.pop()
    ratios = []
    for group in groups:
        grams = [gram for text in group for gram in _ngrams(text, n)]
        if grams:
            ratios.append(len(set(grams)) / len(grams))
    return Measurement.of(ratios)


def repetition(texts: Sequence[str], n: int = 2) -> Measurement:
    """Share of a text's n-grams that it has used before: 0 = never repeats itself. Short texts are left out."""
    shares = []
    for text in texts:
        if grams := _ngrams(text, n):
            shares.append(1 - len(set(grams)) / len(grams))
    return Measurement.of(shares)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def evaluate_texts(
    prompts: Sequence[str],
    responses: Sequence[str],
    judges: Mapping[str, Callable[[Sequence[str]], Sequence[float]]],
) -> dict[str, Measurement]:
    """What the judges say of prompt and response together, and how varied the responses are by themselves.

    Args:
        prompts: One for each response.
        responses: Generated texts without their prompts, with the blank that they begin with.
        judges: Name → scores of full texts; the measurement bears the name `judge/<name>`.

    Raises:
        ValueError: When the numbers of prompts and responses differ.
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f"Every response needs its prompt, got {len(prompts)} prompts and {len(responses)} responses: the judges "
            "would read the wrong texts. Repeat the prompts that were answered more than once."
        )
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    measured = {f"judge/{name}": Measurement.of(list(judge(texts))) for name, judge in judges.items()}
    return measured | {
        "text/distinct_1": distinct_ngrams(responses, 1),
        "text/distinct_2": distinct_ngrams(responses, 2),
        "text/repetition": repetition(responses),
        "text/words": Measurement.of([float(len(response.split())) for response in responses]),
    }
