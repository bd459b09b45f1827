"""Formats, splits and pairs: what is read is what was written, and nothing leaks or vanishes."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from reward_model import Comparison, excerpt, pairs_from_labels
from reward_model.data.comparisons import parse_row
from reward_model.data.preparation import load_comparisons, split_by_prompt

ROWS = [
    {"prompt": f"Film {index}: ", "chosen": f"good {index}", "rejected": f"bad {index}", "margin": 0.5, "weight": 2.0}
    for index in range(6)
]


def write(folder: Path, kind: str) -> str:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    elif kind == "saved":
        Dataset.from_list(ROWS).save_to_disk(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "saved"])
def test_every_kind_of_file_gives_the_same_comparisons(kind: str, tmp_path: Path) -> None:
    expected = [parse_row(row, "") for row in ROWS]
    found = load_comparisons(write(tmp_path, kind)).comparisons
    assert [(c.key(), c.margin, c.weight) for c in found] == [(c.key(), c.margin, c.weight) for c in expected]


def test_a_conversation_without_prompt_is_split_after_the_messages_that_both_share() -> None:
    question, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "?"), ("assistant", "a"), ("assistant", "b"))
    )
    implicit = parse_row({"chosen": [question, good], "rejected": [question, bad]}, "")
    explicit = parse_row({"prompt": [question], "chosen": [good], "rejected": [bad]}, "")
    assert implicit.key() == explicit.key()


def test_scores_and_ranks_say_the_same() -> None:
    completions = ["b", "a", "c", "d"]
    by_score = parse_row({"completions": completions, "scores": [2, 9.5, 2, -1]}, "")
    by_rank = parse_row({"completions": completions, "ranks": [2, 1, 2, 3]}, "")
    assert by_score.key() == by_rank.key()
    assert by_score.completions == ("a", "b", "c", "d") and by_score.ranks == (0, 1, 1, 2)


def test_columns_are_renamed() -> None:
    rows = [{"question": "q", "better": "a", "worse": "b", "chosen": None}]
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (comparison,) = load_comparisons(Dataset.from_list(rows), columns=columns).comparisons
    assert comparison.prompt == "q" and comparison.completions == ("a", "b")


def test_duplicates_are_dropped_and_contradictions_counted() -> None:
    rows = [ROWS[0], ROWS[0], ROWS[1], ROWS[1] | {"chosen": ROWS[1]["rejected"], "rejected": ROWS[1]["chosen"]}]
    report = load_comparisons(Dataset.from_list(rows)).report
    assert (report.rows, report.duplicates, report.contradictions, report.comparisons) == (4, 1, 2, 3)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), min_size=12, max_size=60), st.integers(0, 9))
def test_no_prompt_stands_on_both_sides_of_a_split(pairs: list[tuple[int, int]], seed: int) -> None:
    comparisons = [Comparison(prompt=f"p{p}", completions=(f"a{n}", f"b{c}")) for n, (p, c) in enumerate(pairs)]
    if len({p for p, _ in pairs}) < 3:
        return
    try:
        train, held_out = split_by_prompt(comparisons, fraction=0.3, seed=seed)
    except ValueError:  # one prompt holds nearly everything
        return
    assert not {c.prompt for c in train} & {c.prompt for c in held_out}
    assert len(train) + len(held_out) == len(comparisons) and train and held_out


def test_without_prompts_no_completion_stands_on_both_sides_of_a_split() -> None:
    draw = random.Random(0)
    rows = [(f"t{draw.randint(0, 400)}", f"t{draw.randint(401, 800)}") for _ in range(150)]
    comparisons = [Comparison(prompt="", completions=row) for row in rows]
    train, held_out = split_by_prompt(comparisons, fraction=0.2, seed=1)
    texts = [{text for c in side for text in c.completions} for side in (train, held_out)]
    assert not texts[0] & texts[1]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.integers(0, 5))
def test_pairs_prefer_the_higher_label_and_use_no_text_twice(labels: list[int], seed: int) -> None:
    if len(set(labels)) < 2:
        return
    texts = [f"text {index}" for index in range(len(labels))]
    pairs = pairs_from_labels(texts, labels, seed=seed)
    label_of: dict[Any, int] = dict(zip(texts, labels, strict=True))
    assert all(label_of[pair.completions[0]] > label_of[pair.completions[1]] for pair in pairs)
    used = [text for pair in pairs for text in pair.completions]
    assert len(used) == len(set(used))
    largest = max(labels.count(label) for label in labels)
    assert len(pairs) == min(len(labels) - largest, len(labels) // 2), "as many pairs as there can be"


def test_balanced_labels_use_every_text_and_rounds_draw_new_partners() -> None:
    texts, labels = [str(i) for i in range(20)], [0, 1] * 10
    assert len(pairs_from_labels(texts, labels, seed=0)) == 10
    assert len(pairs_from_labels(texts, labels, seed=0, rounds=3)) > 20
    assert pairs_from_labels(texts, labels, seed=0) == pairs_from_labels(texts, labels, seed=0)


def test_excerpts_have_at_most_so_many_words() -> None:
    text = "one  two three\nfour five"
    assert excerpt(text, max_words=3) == "one two three"
    assert excerpt(text, max_words=9) == "one two three four five"
    drawn = {excerpt(text, max_words=3, min_words=2, generator=random.Random(seed)) for seed in range(30)}
    assert all(2 <= len(words.split()) <= 3 and words in " ".join(text.split()) for words in drawn) and len(drawn) > 3


@pytest.mark.parametrize("verdict", ["b", "model_b", "[[B]]", "B>A", "B>>A", "Response B", "B is slightly better"])
@pytest.mark.parametrize("ends", ["ab", "12"])
def test_a_verdict_names_an_answer_by_its_letter_in_many_ways(verdict: str, ends: str) -> None:
    row = {"prompt": "p", f"response_{ends[0]}": "x", f"response_{ends[1]}": "y", "verdict": verdict}
    assert parse_row(row, "row 0").completions == ("y", "x")
