"""Judges that took no part in training, and measures of how varied the generated texts are.

Two judges look at sentiment: VADER, a lexicon made by people (Hutto and Gilbert 2014), and a linear classifier trained
on reviews that the reward model never saw. Both mostly count words, so neither notices ungrammatical praise: read the
distinct n-grams, the repetition and the samples beside them. Every mean comes with its standard error.
"""

import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_ppo.batch import join_columns
from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.loop.run_folder import Estimates, RunFolder, Sample
from rlhf_ppo.report import write_report
from rlhf_ppo.rollout.prompts import PromptDataset

from .assets import fingerprint
from .command_line import CHUNKS_FOLDER, IRRELEVANT_SETTINGS, is_main_process
from .reviews import Review, ReviewParts, labeled_excerpts, prompt_texts

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
    def of(cls, values: Sequence[float]) -> "Measurement":
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
    ) -> "ReviewClassifier":
        """Learn from excerpts as long as the texts to be judged.

        Args:
            reviews: Reviews that nothing under judgment was trained on.
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

    def accuracy(self, reviews: Sequence[Review], *, min_words: int = 20, max_words: int = 32) -> "Measurement":
        """Share of openings of held-out reviews whose label it tells."""
        texts, labels = labeled_excerpts(reviews, min_words=min_words, max_words=max_words)
        return Measurement.of([float((p > 0.5) == (label == 1)) for p, label in zip(self(texts), labels, strict=True)])


def distinct_ngrams(texts: Sequence[str], n: int, *, group_size: int = GROUP_SIZE) -> "Measurement":
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


def repetition(texts: Sequence[str], n: int = 2) -> "Measurement":
    """Share of a text's n-grams that it has used before: 0 = never repeats itself. Short texts are left out."""
    shares = []
    for text in texts:
        if grams := _ngrams(text, n):
            shares.append(1 - len(set(grams)) / len(grams))
    return Measurement.of(shares)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


CHUNKS = 20
"""Per evaluation: a killed one repeats at most one chunk, 5 %."""


class ResumableEvaluation:
    """Evaluate held-out prompts chunk by chunk, each with a seed of its own; load the chunks that are saved already.

    Several processes, which would have to agree on what is saved, evaluate in one go and save nothing.

    Args:
        run: Run folder that holds the chunks; chunks of other settings are not loaded.
        evaluate: `PPOTrainer.evaluate`.
        settings: Its keyword arguments.
    """

    def __init__(self, run: RunFolder, evaluate: Callable[..., Evaluation], **settings: Any) -> None:
        self.run, self.evaluate, self.settings = run, evaluate, settings

    def __call__(self, when: str, prompts: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Evaluate all prompts; `when` tells the evaluations of one run apart."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return self.evaluate(prompts, **self.settings)
        size = math.ceil(len(prompts) / CHUNKS)
        run_settings = {name: value for name, value in self.run.config().items() if name not in IRRELEVANT_SETTINGS}
        key = fingerprint(when, run_settings)
        evaluations = []
        for number, start in enumerate(range(0, len(prompts), size)):
            name = f"{CHUNKS_FOLDER}/{key}-{number}.json"
            path = self.run.path / name
            if not path.is_file():
                chunk = prompts.batch(range(start, min(start + size, len(prompts))))
                columns = {"input_ids": [ids.tolist() for ids in chunk.input_ids], **chunk.columns}
                dataset = PromptDataset(Dataset.from_dict(columns), tokenizer)
                self.run.write_text(name, json.dumps(asdict(self.evaluate(dataset, seed=number, **self.settings))))
            evaluations.append(Evaluation(**json.loads(path.read_text(encoding="utf-8"))))
        return concatenate(evaluations)


def concatenate(chunks: list[Evaluation]) -> Evaluation:
    """One evaluation of the prompts of all chunks, in their order."""
    return Evaluation(**join_columns(chunks, ("prompts", "responses", "measures")))


def remove_chunks(run: RunFolder) -> None:
    """Remove the saved chunks of a finished run."""
    shutil.rmtree(run.path / CHUNKS_FOLDER, ignore_errors=True)


def load_judges(parts: ReviewParts) -> tuple[dict[str, Callable[..., list[float]]], str]:
    """VADER and a classifier trained on disjoint reviews; neither takes part in training. And a line about them."""
    classifier = ReviewClassifier.train(parts.judge)
    line = f"second classifier: accuracy {classifier.accuracy(parts.evaluation)} on held-out excerpts"
    return {"vader": of_samples(VaderJudge()), "classifier": of_samples(classifier)}, line


def of_samples(judge: Callable[[Sequence[str]], list[float]]) -> Callable[..., list[float]]:
    """A judge of texts as one of prompts and responses."""

    def source(prompts: Sequence[str], responses: Sequence[str], **_columns: Any) -> list[float]:
        return judge([prompt + response for prompt, response in zip(prompts, responses, strict=True)])

    return source


def prompt_datasets(
    parts: ReviewParts, tokenizer: PreTrainedTokenizerBase, *, held_out: int
) -> tuple[PromptDataset, PromptDataset]:
    """Prompts to train on and `held_out` prompts to evaluate on: first words of reviews that nothing else has seen."""
    evaluation = prompt_texts(parts.evaluation)[:held_out]
    training = prompt_texts(parts.prompts, exclude=evaluation)
    if len(evaluation) < held_out or not training:
        raise ValueError(
            f"the reviews give {len(evaluation)} held-out and {len(training)} training prompts, {held_out} held-out "
            "ones were asked for: lower --eval-prompts or give more reviews"
        )
    first, second = (PromptDataset(Dataset.from_dict({"prompt": texts}), tokenizer) for texts in (training, evaluation))
    return first, second


def estimates(found: Evaluation) -> Estimates:
    """Mean and standard error of every measure, with distinct-n, repetition and perplexity."""
    table = {name: (value["mean"], value["stderr"]) for name, value in found.summary().items()}
    nll, error = table.pop("reference_nll")
    table["perplexity"] = (math.exp(nll), math.exp(nll) * error)
    for name, measured in {
        "distinct_1": distinct_ngrams(found.responses, 1),
        "distinct_2": distinct_ngrams(found.responses, 2),
        "repetition": repetition(found.responses),
    }.items():
        table[name] = (measured.mean, measured.stderr)
    return table


def describe(found: Evaluation) -> str:
    """One line of the measures that matter."""
    table = estimates(found)
    names = ("score", "vader", "classifier", "kl", "distinct_2", "perplexity")
    return "  ".join(f"{name} {table[name][0]:.3f} ± {table[name][1]:.3f}" for name in names)


def write_run(folder: RunFolder, before: Evaluation, after: Evaluation, *, title: str) -> Path:
    """Write evaluation, samples and report from the main process; returns the path of the report on every process."""
    if not is_main_process():
        return folder.path / "report.html"
    folder.write_evaluation(before=estimates(before), after=estimates(after))
    remove_chunks(folder)
    shown = ("score", "vader", "classifier", "kl")
    folder.write_samples(
        Sample(
            prompt=prompt,
            before=before.responses[row],
            after=after.responses[row],
            before_scores={name: before.measures[name][row] for name in shown},
            after_scores={name: after.measures[name][row] for name in shown},
        )
        for row, prompt in enumerate(after.prompts)
    )
    return write_report(folder.path, title=title)
