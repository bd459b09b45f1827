"""Review parts: cleaned, disjoint, balanced, and the same whatever the order of the rows. No network."""

from pathlib import Path

import pytest

from sentiment.reviews import (
    Review,
    clean_review,
    labeled_excerpts,
    load_reviews,
    preference_pairs,
    prompt_texts,
    sentence_starts,
    split_reviews,
)


def toy_reviews(count: int = 100) -> list[Review]:
    words = ("great", "lovely", "moving"), ("awful", "boring", "weak")
    return [
        Review(
            f"Film number {i} is {words[1 - i % 2][i % 3]}. I say so after scene {i * 7}. "
            f"It has {i % 11} actors and {'a fine' if i % 2 else 'no'} end that one may remember for a long time.",
            i % 2,
        )
        for i in range(count)
    ]


def test_line_breaks_and_white_space_become_single_blanks() -> None:
    assert clean_review(" A <br /><br />good<BR>film.\n\tYes. ") == "A good film. Yes."


def test_a_csv_file_is_read_cleaned_and_freed_of_duplicates(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text('text,label\n"A good<br />film, really",1\n"a GOOD film, really",1\n"Bad\nfilm",0\n"  ",0\n')
    assert load_reviews(str(file)) == [Review("A good film, really", 1), Review("Bad film", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "review,label\ngood,1\n",
            r"need the columns `text` and `label`; row 0 has no text, only \['label', 'review'\]",
        ),
        ("text,label\ngood,positive\n", r"must be 0 \(negative\) or 1 \(positive\); row 0 has 'positive'"),
    ],
)
def test_a_csv_file_of_another_form_is_refused_by_row(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_reviews(str(file))


def test_a_missing_file_and_an_unknown_dataset_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file of reviews at .*Give a CSV file"):
        load_reviews(str(tmp_path / "absent.csv"))
    with pytest.raises(ValueError, match=r"`nobody/nothing` could not be loaded .* stanfordnlp/imdb"):
        load_reviews("nobody/nothing")


def test_the_parts_share_no_review_are_balanced_and_use_every_review() -> None:
    reviews = toy_reviews(200)
    parts = vars(split_reviews(reviews))
    texts = [review.text for part in parts.values() for review in part]
    assert sorted(texts) == sorted(review.text for review in reviews)
    assert {name: len(part) for name, part in parts.items()} == {
        "language_model": 112, "reward_model": 40, "judge": 24, "prompts": 16, "evaluation": 8,
    }  # fmt: skip
    assert all(2 * sum(review.label for review in part) == len(part) for part in parts.values())


def test_the_split_does_not_depend_on_the_order_of_the_rows() -> None:
    assert split_reviews(toy_reviews()) == split_reviews(toy_reviews()[::-1])


def test_too_few_reviews_for_five_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="5 reviews with label 0 are too few"):
        split_reviews(toy_reviews(10))


def test_prompts_are_openings_once_each_and_never_an_excluded_one() -> None:
    reviews = toy_reviews(50)
    prompts = prompt_texts(reviews, min_words=3, max_words=6)
    assert len(set(prompts)) == len(prompts)
    assert {len(prompt.split()) for prompt in prompts} == {3, 4, 5, 6}
    assert all(any(review.text.startswith(prompt + " ") for review in reviews) for prompt in prompts)
    assert prompt_texts(reviews, min_words=3, max_words=6, exclude=prompts[:10]) == prompts[10:]


def test_a_review_no_longer_than_its_prompt_gives_none() -> None:
    assert prompt_texts([Review("Good film.", 1)], min_words=2, max_words=2) == []


def test_sentence_starts_leave_room_for_an_excerpt() -> None:
    assert sentence_starts("One two. Three four five! Six?", min_words=1) == [0, 2, 5]
    assert sentence_starts("One two. Three four five! Six?", min_words=4) == [0, 2]
    assert sentence_starts("Short.", min_words=4) == [0]


def test_excerpts_begin_with_the_opening_and_keep_their_reviews_label() -> None:
    reviews = toy_reviews(6)
    texts, labels = labeled_excerpts(reviews, min_words=4, max_words=6, per_review=2)
    assert labels == [review.label for review in reviews for _ in range(2)]
    assert all(review.text.startswith(text) for review, text in zip(reviews, texts[::2], strict=True))
    assert {len(text.split()) for text in texts} <= {4, 5, 6}


def test_pairs_prefer_the_positive_review_and_have_equal_lengths() -> None:
    reviews = toy_reviews(20)
    pairs = preference_pairs(reviews, min_words=5, max_words=8, per_review=2)
    of_label = {label: " | ".join(review.text for review in reviews if review.label == label) for label in (0, 1)}
    assert len(pairs) == 20
    for pair in pairs:
        assert pair["chosen"] in of_label[1] and pair["rejected"] in of_label[0]
        assert len(pair["chosen"].split()) == len(pair["rejected"].split()) <= 8
