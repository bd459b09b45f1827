"""What of the data is used, what is not, and what is held out: said, counted, and without leaks."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from reward_model import BadRow, RewardModel, preview
from reward_model import score as score_command
from reward_model.data.collecting import Collector
from reward_model.data.comparisons import parse_row
from reward_model.data.preparation import describe_split, load_comparisons, split_by_prompt
from reward_model.train import main
from tests.reward_model.conftest import preference_rows


def load(*rows: dict[str, Any], **options: Any) -> Any:
    return load_comparisons(Dataset.from_list(list(rows)), **options)


@pytest.mark.parametrize(
    ("question", "answer"),
    [("\n\nHuman: Film {}?\n\nAssistant:", " It was {}"), ("How was film {}? ", "It was {}"), ("Film {} was", " {}")],
    ids=["transcripts", "questions", "no end of a sentence"],
)
def test_texts_that_begin_alike_are_held_out_together(question: str, answer: str) -> None:
    """R9: without a prompt column, 120 of 120 held-out prompts were in training, too."""
    draw = random.Random(0)
    rows = []
    for number in range(600):
        film = question.format(number % 60)
        chosen, rejected = (f"{draw.choice(words)} {number}" for words in (["good", "fine"], ["bad", "dull"]))
        rows.append({"chosen": film + answer.format(chosen), "rejected": film + answer.format(rejected)})
    train, held_out = split_by_prompt(load(*rows).comparisons, fraction=0.2, seed=0)
    text = lambda comparison: f"{comparison.prompt}{comparison.completions[0]}"
    films = [{re.findall(r"[Ff]ilm (\d+)", text(comparison))[0] for comparison in side} for side in (train, held_out)]
    assert len(held_out) == 120
    assert len(films[1]) == 12
    assert not films[0] & films[1]
    assert "0 of their 12 prompts (0.0%) are in training, too" in describe_split(train, held_out)


def test_a_group_is_held_out_together_and_the_share_of_known_prompts_is_said() -> None:
    rows = [
        {"prompt": f"p{number % 5}", "chosen": f"a{number}", "rejected": f"b{number}", "film": number // 10}
        for number in range(100)
    ]
    train, held_out = split_by_prompt(load(*rows, group="film").comparisons, fraction=0.2, seed=0)
    assert len(held_out) == 20
    assert not {c.group for c in train} & {c.group for c in held_out}
    assert describe_split(train, held_out) == (
        "20 comparisons held out of 100, by group; 5 of their 5 prompts (100.0%) are in training, too"
    )
    with pytest.raises(
        ValueError, match=r"group names \['filme'\], which no row has; the rows have \['chosen', 'film'"
    ):
        load(*rows, group="filme")


@pytest.mark.parametrize("empty", [None, "", float("nan")], ids=str)
def test_rows_without_a_group_are_held_out_by_prompt(empty: object) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{number}", "chosen": "a", "rejected": "b", "film": empty} for number in range(90)
    ]
    rows += [row | {"prompt": f"q{number}", "film": 1.5} for number, row in enumerate(rows[:10])]
    for row in rows if empty == "" else []:
        row["film"] = str(row["film"])
    for seed in range(5):
        train, held_out = split_by_prompt(load(*rows, group="film").comparisons, fraction=0.2, seed=seed)
        assert 20 <= len(held_out) <= 29
        assert not {c.group for c in train if c.group} & {c.group for c in held_out}


@pytest.mark.parametrize("as_tree", [True, False], ids=["trees", "messages"])
def test_messages_of_a_tree_are_held_out_with_their_group(as_tree: bool) -> None:
    """The replies to the first and to the second question of a tree are two comparisons."""

    def message(key: str, role: str, rank: int | None, parent: str | None, *replies: Any) -> dict[str, Any]:
        named = {"message_id": key, "parent_id": parent, "text": f"text {key}", "role": role, "rank": rank}
        return named | {"replies": list(replies)}

    rows: list[dict[str, Any]] = []
    for name in map(str, range(20)):
        last = [message(f"{name}{end}", "assistant", rank, f"{name}d") for rank, end in enumerate("ef")]
        follow = message(f"{name}d", "prompter", None, f"{name}b", *last)
        answers = [
            message(f"{name}b", "assistant", 0, f"{name}a", follow),
            message(f"{name}c", "assistant", 1, f"{name}a"),
        ]
        tree = message(f"{name}a", "prompter", None, None, *answers)
        flat = [part | {"replies": None, "message_tree_id": name} for part in (tree, *answers, follow, *last)]
        rows += [{"prompt": tree, "message_tree_id": name}] if as_tree else flat
    collector = Collector({}, "stop", group="message_tree_id")
    collector.read(("row", row) for row in rows)
    train, held_out = split_by_prompt(collector.comparisons(seed=0, pair_rounds=1), fraction=0.2, seed=0)
    assert (len(train), len(held_out)) == (32, 8)
    assert not {c.group for c in train} & {c.group for c in held_out}


def test_several_ratings_of_one_answer_are_averaged() -> None:
    rate = lambda text, *labels: [{"prompt": "p", "completion": text, "label": label} for label in labels]
    (ranking,) = load(*rate("a", 5.0, 1.0, 1.0), *rate("b", 3.0)).comparisons
    best = ranking.completions[ranking.ranks.index(min(ranking.ranks))] if ranking.ranks else ranking.completions[0]
    assert best == "b", "the mean of a's ratings is 7/3"
    other = [row | {"prompt": "q"} for row in rate("a", 0.1, 0.1, 0.1) + rate("b", 0.1)]
    assert load(*rate("a", 5.0), *rate("b", 3.0), *other).report.undecided == 4


def test_labeled_texts_have_no_group() -> None:
    rows = [{"text": f"film {number}", "label": number, "film": number} for number in range(4)]
    with pytest.raises(ValueError, match="group='film' cannot hold out labeled texts"):
        load(*rows, group="film")


QUESTION, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", "How was it?"), ("assistant", "a"), ("assistant", "b"))
)
SYSTEM = {"role": "system", "content": "Be kind."}
ONCE = {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("row", "once"),
    [
        (
            {"prompt": "How was the film? ", "chosen": "How was the film? Good", "rejected": "How was the film? Bad"},
            {"prompt": "How was the film? ", "chosen": "Good", "rejected": "Bad"},
        ),
        (
            {"prompt": "How was it? ", "chosen": "\nHow was it?\nGood", "rejected": "How was it? Bad"},
            {"prompt": "How was it?", "chosen": "\nGood", "rejected": " Bad"},
        ),
        (
            {
                "prompt": "How?",
                "chosen": "\n\nHuman: How?\n\nAssistant: a",
                "rejected": "\n\nHuman: How?\n\nAssistant: b",
            },
            {"prompt": "\n\nHuman: How?\n\nAssistant:", "chosen": " a", "rejected": " b"},
        ),
        ({"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, ONCE),
        ({"prompt": "How was it?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, ONCE),
        ({"prompt": "How was it?", "chosen": [GOOD], "rejected": [BAD]}, ONCE),
        ({"prompt": [QUESTION], "chosen": "a", "rejected": "b"}, ONCE),
        (
            {"prompt": [QUESTION], "chosen": [SYSTEM, QUESTION, GOOD], "rejected": [SYSTEM, QUESTION, BAD]},
            {"prompt": [SYSTEM, QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        ),
        (
            {"prompt": [SYSTEM, QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            {"prompt": [SYSTEM, QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        ),
    ],
)
def test_a_prompt_that_the_completions_repeat_is_said_once(row: dict[str, Any], once: dict[str, Any]) -> None:
    """R10: it was doubled."""
    assert parse_row(row, "").key() == parse_row(once, "").key()


def test_an_answer_that_begins_with_a_short_prompts_word_keeps_it() -> None:
    row = {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Hello."}
    assert parse_row(row, "").completions == ("Hello! How are you?", "Hello.")


def test_a_prompt_that_is_no_part_of_the_conversations_is_a_bad_row() -> None:
    row = {"prompt": "And the book?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}
    with pytest.raises(BadRow, match=r"row 0: field 'prompt' is not part of the conversations.*--columns prompt="):
        parse_row(row, "row 0")
    (comparison,) = load(row, columns={"prompt": ""}).comparisons
    assert comparison.prompt == [QUESTION]


def test_labeled_answers_are_compared_within_their_prompt() -> None:
    """R16: the prompt was dropped, and answers to different questions were paired."""
    rows = [
        {"prompt": prompt, "text": text, "label": label, "source": "me"}
        for prompt, text, label in [
            ("a?", "yes", 1),
            ("b?", "no", 0),
            ("a?", "oh", 0),
            ("b?", "sure", 1),
            ("c?", "x", 1),
        ]
    ]
    loaded = load(*rows)
    assert [(c.prompt, c.completions, c.source) for c in loaded.comparisons] == [
        ("a?", ("yes", "oh"), "me"), ("b?", ("sure", "no"), "me")
    ]  # fmt: skip
    assert loaded.report.undecided == 1
    assert "1 undecided left out" in str(loaded.report)
    with pytest.raises(ValueError, match="No usable comparison in 2 rows: 0 were malformed, 2 prefer nothing"):
        load(rows[0], rows[1])


def test_a_column_that_no_row_has_is_refused_and_unused_ones_are_named() -> None:
    """R16: `--columns prompt=qestion` was accepted, and the prompt was empty."""
    row = {"question": "q", "chosen": "a", "rejected": "b", "annotator": 7, "note": None}
    with pytest.raises(ValueError, match=r"columns names \['qestion'\], which no row has; the rows have \['annotator'"):
        load(row, columns={"prompt": "qestion"})
    loaded = load(row)
    assert loaded.comparisons[0].prompt == "q"
    assert loaded.report.unused_columns == ("annotator",)


@pytest.mark.parametrize("name", ["user_prompt", "context", "history", "Input_Messages"])
def test_a_column_that_looks_like_a_lost_prompt_is_refused_until_it_is_mapped_or_left_out(name: str) -> None:
    """Prompts in columns of unknown names were lost: the pairs were learned without what was asked."""
    row = {name: "Who?", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=rf"columns \['{name}'\] look like prompts.*--columns prompt={name}"):
        load(row)
    assert load(row, columns={"prompt": name}).comparisons[0].prompt == "Who?"
    assert load(row, columns={name: ""}).comparisons[0].prompt == ""
    assert load(row | {"prompt": "p"}).report.unused_columns == (name,)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_message_is_said_once_and_earlier_turns_are_not_lost(column: str) -> None:
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
    pair = {column: "Be brief.", "chosen": "a", "rejected": "b"}
    assert load(pair | {"question": "Who?"}).comparisons[0].prompt == [system, asked]
    assert load(pair | {"messages": [system, asked]}).comparisons[0].prompt == [system, asked]
    whole = {side: [system, asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert load(pair | whole).comparisons[0].prompt == [system, asked]
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi!"}, asked]
    assert load(pair | {"prompt": "Who?", "messages": talk}).comparisons[0].prompt == [system, *talk]


@pytest.mark.parametrize("has_prompt", [True, False])
def test_a_table_says_the_system_message_before_messages_that_it_holds_as_text(has_prompt: bool) -> None:
    asked, said = [{"role": "user", "content": "Who?"}], {"role": "assistant", "content": "Ann."}
    answers = {"chosen": [said], "rejected": [{**said, "content": "Bob."}]}
    if not has_prompt:
        answers = {side: asked + messages for side, messages in answers.items()}
    cells = answers | ({"prompt": asked} if has_prompt else {})
    (found,) = load({"system": "Be brief.", **{name: json.dumps(cell) for name, cell in cells.items()}}).comparisons
    assert found.prompt == [{"role": "system", "content": "Be brief."}, *asked]


def test_a_table_may_hold_rated_conversations_and_prompts_in_conversations_as_text() -> None:
    asked = [{"role": "user", "content": "Who?"}]
    talks = [[*asked, {"role": "assistant", "content": name}] for name in ("Ann.", "Bob.")]
    rows: list[dict[str, Any]] = [{"messages": talk, "score": rating} for rating, talk in enumerate(talks)]
    rows.append({"messages": asked, "chosen": "Ann.", "rejected": "Bob."})
    cells = [{**row, "messages": json.dumps(row["messages"])} for row in rows]
    assert load(*cells[:2]).comparisons[0].completions == load(*rows[:2]).comparisons[0].completions
    assert load(cells[2]).comparisons[0].prompt == load(rows[2]).comparisons[0].prompt == asked


def test_a_column_can_be_left_out_and_a_list_in_preference_is_none_of_ours() -> None:
    """R26: Argilla's list-valued `preference` blocked the file."""
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "weight": "heavy", "preference": [0.2, 0.8]}
    with pytest.raises(BadRow, match="field 'weight' must be a finite number"):
        load(row)
    loaded = load(row, columns={"weight": ""})
    assert (loaded.comparisons[0].weight, loaded.comparisons[0].preference) == (1.0, 1.0)
    assert loaded.report.unused_columns == ("preference",)


def test_a_record_named_question_is_no_prompt_and_labels_may_be_words_of_a_table(tmp_path: Path) -> None:
    loaded = load({"question": {"id": 1}, "chosen": "good film", "rejected": "bad film"})
    assert loaded.comparisons[0].prompt == ""
    assert loaded.report.unused_columns == ("question",)
    path = tmp_path / "kto.csv"
    path.write_text("prompt,completion,label\na?,yes,True\na?,no,False\n")
    (comparison,) = load_comparisons(str(path)).comparisons
    assert (comparison.prompt, comparison.completions) == ("a?", ("yes", "no"))


def test_a_settings_file_may_name_one_source_or_several(tmp_path: Path) -> None:
    rows = preference_rows(2)
    first, second = write_rows(tmp_path / "a.jsonl", rows[:1]), write_rows(tmp_path / "b.jsonl", rows[1:])
    for said, count in ((first, 1), (f"[{first}, {second}]", 2)):
        (tmp_path / "settings.yaml").write_text(f"data: {said}\n")
        assert len(preview.main(["--config", str(tmp_path / "settings.yaml")]).comparisons) == count


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_reads_several_sources_draws_comparisons_and_says_what_it_left_out(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R13: the first rows were taken, and pairs too long were dropped without a word; R24: only the last source."""
    rows = [row | {"prompt": f"Film {number}: ", "id": number} for number, row in enumerate(preference_rows(60))]
    for row in rows[::4]:
        row["chosen"] = "good " * 80
    first, second = write_rows(tmp_path / "a.jsonl", rows[:30]), write_rows(tmp_path / "b.jsonl", rows[30:])
    arguments = ["--data", first, "--data", second, "--model", str(tiny_base), "--output_dir", str(tmp_path / "out")]
    main([*arguments, "--max_length", "40", "--max_comparisons", "20", "--held_out", "0.2", "--no_progress"])
    said = capsys.readouterr().out
    assert "60 comparisons from 60 rows" in said
    assert "12 comparisons held out of 32, by prompt" in said
    assert "0 of their 12 prompts (0.0%) are in training, too" in said
    assert "columns id" in said
    facts = json.loads((tmp_path / "out" / "reward_model.json").read_text())["data"]
    assert facts["train"] + facts["train_too_long"] == 20
    long = (facts["train_too_long"], facts["evaluation_too_long"])
    assert f"{long[0]} training, {long[1]} held-out comparisons left out: they have a text of more than" in said
    train, _ = split_by_prompt(load_comparisons([first, second]).comparisons, fraction=0.2, seed=0)
    first_twenty = sum(len(str(c.completions[0])) > 300 for c in train[:20])
    assert 0 < facts["train_too_long"] < 20
    assert facts["train_too_long"] != first_twenty, "the first twenty have another number of long texts"


def test_a_known_prompt_in_a_held_out_source_is_said(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"prompt": f"Film {number}: "} for number, row in enumerate(preference_rows(30))]
    data, held_out = write_rows(tmp_path / "a.jsonl", rows[:20]), write_rows(tmp_path / "b.jsonl", rows[15:])
    arguments = ["--data", data, "--evaluation_data", held_out, "--model", str(tiny_base)]
    main([*arguments, "--output_dir", str(tmp_path / "out"), "--max_length", "40", "--no_progress"])
    assert "5 of their 15 prompts (33.3%) are in training, too" in capsys.readouterr().out


def test_half_a_character_in_a_row_that_is_set_aside_can_be_written(
    tiny_base: Path, trained_folder: Path, tmp_path: Path
) -> None:
    rows = [{**row, "prompt": f"Film {number}: "} for number, row in enumerate(preference_rows(20))]
    data = write_rows(
        tmp_path / "a.jsonl", [*rows, {**rows[0], "chosen": "cut \ud83d"}, {**rows[1], "source": "\ud83d"}]
    )
    arguments = ["--model", str(tiny_base), "--output_dir", str(tmp_path / "out"), "--max_length", "40"]
    main(["--data", data, *arguments, "--no_progress", "--on_bad_row", "skip"])
    aside = [json.loads(line) for line in (tmp_path / "out.bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in aside] == ["a.jsonl:21", "a.jsonl:22"]
    assert aside[0]["row"]["chosen"] == "cut \ud83d"
    data = write_rows(tmp_path / "b.jsonl", [{"response": "good", "note": "\ud83d"}])
    output = tmp_path / "scores.jsonl"
    score_command.main(["--model", str(trained_folder), "--data", data, "--output", str(output)])
    assert json.loads(output.read_text())["note"] == "\ud83d"


def test_scoring_maps_columns_skips_bad_rows_and_reads_tables(
    reward_model: RewardModel, trained_folder: Path, tmp_path: Path
) -> None:
    """R26: `score` had no --columns."""
    data = tmp_path / "answers.jsonl"
    data.write_text('{"q": "The movie was ", "a": "good"}\n{"q": "x", "a": 5}\n{"q": "The movie was ", "a": "bad"}\n')
    output = tmp_path / "scores.jsonl"
    arguments = ["--model", str(trained_folder), "--data", str(data), "--output", str(output)]
    columns = ["--columns", "prompt=q", "response=a"]
    with pytest.raises(BadRow, match=r"answers\.jsonl:2: field 'response' must be text"):
        score_command.main([*arguments, *columns])
    scores = score_command.main([*arguments, *columns, "--on_bad_row", "skip"])
    assert scores == reward_model(["The movie was "] * 2, ["good", "bad"])
    assert [json.loads(line)["a"] for line in output.read_text().splitlines()] == ["good", "bad"]
    (aside,) = (tmp_path / "scores.jsonl.bad_rows.jsonl").read_text().splitlines()
    assert json.loads(aside)["where"] == "answers.jsonl:2"
    with pytest.raises(ValueError, match=r"columns names \['anser'\], which no row has"):
        score_command.main([*arguments, "--columns", "prompt=q", "response=a", "tools=anser", "--on_bad_row", "skip"])
