"""Judges and measures of variety, on texts small enough to count by hand. No network."""

import math

import pytest

from sentiment.evaluation import Measurement, ReviewClassifier, VaderJudge, distinct_ngrams, repetition
from sentiment.reviews import Review

GOOD = [Review(f"A lovely, great and moving film, number {i}.", 1) for i in range(20)]
BAD = [Review(f"A boring, awful and weak film, number {i}.", 0) for i in range(20)]


def test_the_standard_error_is_the_sample_deviation_over_the_root_of_n() -> None:
    """1, 2, 3, 4: squared deviations add up to 5, so s = √(5/3) and the standard error is √(5/3)/2."""
    measured = Measurement.of([1.0, 2.0, 3.0, 4.0])
    assert measured.mean == 2.5 and measured.stderr == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(Measurement.of([1.0]).stderr) and math.isnan(Measurement.of([]).mean)


def test_vader_ranks_praise_over_nothing_over_blame() -> None:
    praise, nothing, blame = VaderJudge()(["A wonderful film.", "The of and.", "A terrible film."])
    assert praise > 0.3 and nothing == 0.0 and blame < -0.3


def test_the_classifier_tells_held_out_praise_from_blame_and_repeats_itself() -> None:
    train, held_out = GOOD[:15] + BAD[:15], GOOD[15:] + BAD[15:]
    judge = ReviewClassifier.train(train, min_words=4, max_words=8)
    assert judge.accuracy(held_out, min_words=4, max_words=8).mean == 1.0
    texts = ["A lovely film", "An awful film"]
    assert judge(texts) == ReviewClassifier.train(train, min_words=4, max_words=8)(texts)
    assert judge(texts)[0] > 0.5 > judge(texts)[1]
    assert judge([]) == []


def test_a_classifier_needs_both_labels() -> None:
    with pytest.raises(ValueError, match=r"needs positive and negative reviews, got 20 with the labels \[1\]"):
        ReviewClassifier.train(GOOD)


def test_distinct_bigrams_by_hand() -> None:
    """`a b c` and `a b d` hold the bigrams ab, bc, ab, bd: three different ones of four."""
    assert distinct_ngrams(["a b c", "A B d"], 2).mean == 0.75
    assert math.isnan(distinct_ngrams(["a"], 2).mean)


def test_distinct_ngrams_do_not_fall_with_the_number_of_texts() -> None:
    """One group's value again, however often the group is repeated; an incomplete last group is left out."""
    group = ["a b c", "a b d"]
    assert distinct_ngrams(group * 5 + ["x y z"], 2, group_size=2) == Measurement(0.75, 0.0)


def test_repetition_is_the_share_of_bigrams_a_text_has_used_before() -> None:
    """`great film great film great`: gf, fg, gf, fg, two different of four."""
    assert repetition(["great film great film great", "a b c"]).mean == pytest.approx(0.25)
