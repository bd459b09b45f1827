"""What people's exports look like: spreadsheets, annotation tools, lists in cells, labels in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from reward_model import BadRow
from reward_model import score as score_command
from reward_model.data.preparation import load_comparisons
from rlhf_ppo.chat.cells import parse_literal
from rlhf_ppo.chat.messages import read_messages


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL, or text as it is, and return the path."""

    def write(content: str | list[dict[str, Any]], name: str = "data.jsonl") -> str:
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def texts(source: str, **options: Any) -> list[tuple[Any, ...]]:
    """The completions of each comparison, best first."""
    return [comparison.completions for comparison in load_comparisons(source, **options).comparisons]


def test_a_benchmark_in_a_table_has_lists_and_counts_as_text(written: Callable[..., str]) -> None:
    header = "id,prompt,chosen,rejected,num_correct,num_incorrect,subset\n"
    table = header + '1,P,"[\'a\']","[""b"", ""c""]",1,2.0,Focus\n'
    (comparison,) = load_comparisons(written(table, "rb.csv")).comparisons
    assert comparison.completions == ("a", "b", "c") and comparison.ranks == (0, 1, 1)
    with pytest.raises(BadRow, match=r"field 'num_incorrect' is '2', but 'rejected' has 1 completions"):
        texts(written(header + "1,P,\"['a']\",\"['b' 'c']\",1,2,Focus\n", "numpy.csv"))


@pytest.mark.parametrize("text", ["['a' 'b']", "['a'\n 'b']", "[{'content': 'a' 'b'}]"])
def test_texts_that_numpy_wrote_without_commas_are_not_joined(text: str) -> None:
    """Python would read one text, 'ab'."""
    assert parse_literal(text) is None
    assert parse_literal("['it''s', \"a\" , 'b']".replace("''", " ")) == ["it s", "a", "b"]


def test_empty_lines_of_a_spreadsheet_are_no_rows(written: Callable[..., str]) -> None:
    report = load_comparisons(written("prompt;chosen;rejected\nQ;a;b\n;;\n;;\n", "sheet.csv")).report
    assert (report.rows, report.bad) == (1, 0)


def test_the_separator_is_the_one_that_splits_the_header(written: Callable[..., str]) -> None:
    source = written('prompt;"best, of two";rejected\nQ;a,1;b\n', "sheet.csv")
    assert texts(source, columns={"chosen": "best, of two"}) == [("a,1", "b")]


def test_records_that_nobody_annotated_are_undecided(written: Callable[..., str]) -> None:
    record = {"prompt": "Q", "response_1": "a", "response_2": "b"}
    rows = [record | {"preference.responses": None}, record | {"preference.responses": ["response_2"]}]
    loaded = load_comparisons(written(rows))
    assert (loaded.report.undecided, loaded.comparisons[0].completions) == (1, ("b", "a"))
    table = "prompt,response_1,response_2,preference.responses\nQ,a,b,\"['response_2']\"\n"
    assert texts(written(table, "argilla.csv")) == [("b", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"context": "Q", "response1": "a", "response2": "b", "overall_preference": None},
        {"prompt": "Q", "response_a": "a", "response_b": "b", "preference": ""},
        {"prompt": "Q", "completion": "a", "label": None},
        {"text": "a", "label": None},
        {"conversation_a": [{"role": "user", "content": "Q"}], "conversation_b": [], "winner": None},
    ],
)
def test_a_row_whose_verdict_is_empty_is_undecided(row: dict[str, Any], written: Callable[..., str]) -> None:
    loaded = load_comparisons(written([{"prompt": "Q", "chosen": "a", "rejected": "b"}, row]))
    assert (loaded.report.comparisons, loaded.report.undecided) == (1, 1)
    if "response1" in row:
        with pytest.raises(BadRow, match=r"of which \['response1'\] are empty"):
            texts(written([row | {"response1": None, "overall_preference": 1}]))


def test_a_second_column_of_ratings_may_be_empty(written: Callable[..., str]) -> None:
    rows = [{"prompt": "Q", "completion": text, "label": text == "a", "score": None} for text in "ab"]
    assert texts(written(rows)) == [("a", "b")]


def test_conversations_may_be_stored_as_one_list_for_each_field(written: Callable[..., str]) -> None:
    """As `datasets` stores a `Sequence` of messages; without a word, `conversations` was not read."""
    rows = [
        {
            "conversations": {"from": ["human"], "value": ["Q"]},
            "chosen": {"role": ["assistant"], "content": ["a"]},
            "rejected": {"role": ["assistant"], "content": ["b"]},
        }
    ]
    (comparison,) = load_comparisons(written(rows)).comparisons
    assert comparison.prompt == [{"role": "user", "content": "Q"}]
    assert comparison.completions[0] == [{"role": "assistant", "content": "a"}]


def test_turns_without_roles_are_no_benchmark(written: Callable[..., str]) -> None:
    """They were ranked as four completions of nothing."""
    with pytest.raises(BadRow, match=r"field chosen\[0\] must be a message"):
        texts(written([{"chosen": ["Q?", "a"], "rejected": ["Why?", "b"]}]))


def test_neither_is_a_tie(written: Callable[..., str]) -> None:
    rows = [{"prompt": "Q", "response_a": "a", "response_b": "b", "winner": "Neither"}]
    assert load_comparisons(written(rows)).comparisons[0].is_tie


@pytest.mark.parametrize("encoding", ["base64", "rot13"])
def test_a_codec_that_makes_no_text_is_no_encoding(encoding: str, written: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=f"encoding='{encoding}' is unknown"):
        texts(written([{"chosen": "a", "rejected": "b"}]), encoding=encoding)


@pytest.mark.parametrize("labels", [("Y", "n"), ("thumbs_up", "thumbs_down"), ("👍", "👎"), ("like", "dislike")])
def test_labels_may_be_words(labels: tuple[str, str], written: Callable[..., str]) -> None:
    rows = [{"prompt": "Q", "completion": text, "label": label} for text, label in zip("ab", labels, strict=True)]
    assert texts(written(rows)) == [("a", "b")]


@pytest.mark.parametrize(
    ("names", "better"),
    [(["neg", "pos"], "one"), (["positive", "negative"], "zero"), (["5 stars", "1 star"], "zero"), (["0", "1"], "one")],
)
def test_class_labels_are_read_by_their_names_whatever_their_order(
    names: list[str], better: str, tmp_path: Path
) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": ["zero", "one", "unlabeled"], "label": [0, 1, -1]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    for source in (Dataset.from_dict(rows, features=features), str(tmp_path / "train.parquet")):
        loaded = load_comparisons(source)
        assert loaded.report.undecided == 1
        assert [pair.completions[0] for pair in loaded.comparisons] == [better]


def test_classes_without_an_order_are_no_labels_and_may_be_verdicts() -> None:
    moods = Features({"text": Value("string"), "label": ClassLabel(names=["joy", "anger"])})
    with pytest.raises(BadRow, match=r"'label' must be a number.*got 'joy'"):
        load_comparisons(Dataset.from_dict({"text": ["zero", "one"], "label": [0, 1]}, features=moods))
    texts = {"prompt": "q", "response_a": "A", "response_b": "B"}
    verdict = ClassLabel(names=["tie", "model_b", "model_a"])
    features = Features({name: Value("string") for name in texts} | {"winner": verdict})
    rows = [texts | {"prompt": f"q{number}", "winner": number} for number in (0, 1, 2)]
    ranks = [pair.ranks for pair in load_comparisons(Dataset.from_list(rows, features=features)).comparisons]
    firsts = [pair.completions[0] for pair in load_comparisons(Dataset.from_list(rows, features=features)).comparisons]
    assert (ranks, firsts[1:]) == ([(0, 0), (0, 1), (0, 1)], ["B", "A"])


def test_an_answer_without_a_score_is_left_out_of_the_ranking(written: Callable[..., str]) -> None:
    answers = [{"response": "a", "overall_score": "2"}, {"response": "b", "overall_score": None}]
    rows = [{"instruction": "Q", "completions": [*answers, {"response": "c", "overall_score": 5}]}]
    assert texts(written(rows)) == [("c", "a")]


def test_roles_are_those_of_chat_templates() -> None:
    spoken = [
        ("human", "user"),
        ("gpt", "assistant"),
        ("User", "user"),
        ("ASSISTANT ", "assistant"),
        ("ipython", "ipython"),
    ]
    for given, role in spoken:
        assert read_messages([{"role": given, "content": "x"}], "chosen")[0]["role"] == role


def test_a_missing_field_says_which_columns_are_empty(written: Callable[..., str]) -> None:
    with pytest.raises(BadRow, match=r"field 'rejected' is empty; the row has .*, of which \['rejected'\] are empty"):
        texts(written([{"prompt": "Q", "chosen": "a", "rejected": None}]))
    with pytest.raises(ValueError, match=r"1 were malformed.* The first malformed one: data.jsonl:1: field 'rejected'"):
        texts(written([{"prompt": "Q", "chosen": "a", "rejected": None}]), on_bad_row="skip")


def test_a_column_that_no_row_has_cannot_be_left_out(written: Callable[..., str]) -> None:
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "preference": None}]
    assert texts(written(rows), columns={"preference": ""}) == [("a", "b")]
    with pytest.raises(ValueError, match=r"columns names \['preferense'\], which no row has"):
        texts(written(rows), columns={"preferense": ""})


def test_columns_that_are_mapped_in_another_file_are_used(written: Callable[..., str]) -> None:
    ours = written([{"prompt": "Q", "chosen": "a", "rejected": "b"}], "ours.jsonl")
    theirs = written([{"ask": "R", "best": "a", "worst": "b"}], "theirs.jsonl")
    columns = {"prompt": "ask", "chosen": "best", "rejected": "worst"}
    assert load_comparisons([ours, theirs], columns=columns).report.unused_columns == ()


def test_scores_are_written_where_they_may_be(
    trained_folder: Path, tmp_path: Path, written: Callable[..., str]
) -> None:
    """A header as spreadsheets write it, a folder that is not there yet, the data itself, and no readable row."""
    data = written("Prompt;Response\nIt was ;good\n;\n", "answers.csv")
    arguments = [str(trained_folder), "--data", data, "--output"]
    assert len(score_command.main([*arguments, str(tmp_path / "new" / "scores.jsonl")])) == 1
    assert json.loads((tmp_path / "new" / "scores.jsonl").read_text())["Response"] == "good"
    with pytest.raises(ValueError, match="is also the data"):
        score_command.main([*arguments, data])
    nothing = written([{"prompt": 1, "response": 2}])
    arguments = [str(trained_folder), "--data", nothing, "--on_bad_row", "skip", "--output", str(tmp_path / "o")]
    with pytest.raises(ValueError, match=r"None of the 1 rows can be read\. The first one: data.jsonl:1: field"):
        score_command.main(arguments)
    assert (tmp_path / "o.bad_rows.jsonl").is_file()


def test_tools_of_rated_answers_are_kept_and_tell_questions_apart(written: Callable[..., str]) -> None:
    question = [{"role": "user", "content": "What is the weather?"}]
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("weather", "search")]
    answers = [[{"role": "assistant", "content": text}] for text in ("sunny", "no idea")]
    rows = [
        {"prompt": question, "completion": answer, "label": index == 0, "tools": schemas}
        for schemas in tools
        for index, answer in enumerate(answers)
    ]
    comparisons = load_comparisons(written(rows)).comparisons
    assert [list(comparison.tools) for comparison in comparisons] == tools
