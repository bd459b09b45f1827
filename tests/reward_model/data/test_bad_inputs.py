"""Malformed inputs: each ends in one clear line naming the place, and nothing is half-written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from reward_model.data.preparation import load_comparisons
from reward_model.train import main
from reward_model.utils.commands import run
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

GOOD_ROW = {"prompt": "The movie was ", "chosen": "good", "rejected": "bad"}
CHAT_ROW = {
    "prompt": [{"role": "user", "content": "How was it?"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def jsonl(*rows: Any) -> Callable[[Path], str]:
    """Writes two good rows and then `rows` into data.jsonl, so that the first bad line is number 3."""

    def write(folder: Path) -> str:
        good = [GOOD_ROW | {"prompt": f"Film {index}: "} for index in range(2)]
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in [*good, *rows])
        (folder / "data.jsonl").write_text(text)
        return str(folder / "data.jsonl")

    return write


def raw(name: str, content: bytes) -> Callable[[Path], str]:
    """Writes a file as it is."""

    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def changed(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in (GOOD_ROW | fields).items() if value is not ...}


RANKED = {"prompt": "p", "completions": ["a", "b", "c"]}

BAD_DATA: list[tuple[str, Callable[[Path], str], str]] = [
    ("missing column", jsonl(changed(rejected=...)), "data.jsonl:3: field 'rejected' is missing"),
    ("null field", jsonl(changed(chosen=None)), "data.jsonl:3: field 'chosen' is empty; the row has"),
    ("empty chosen", jsonl(changed(chosen="  ")), "data.jsonl:3: field 'chosen' is empty"),
    ("identical pair", jsonl(changed(rejected="good")), "data.jsonl:3: fields 'chosen' and 'rejected' are identical"),
    ("chosen is a number", jsonl(changed(chosen=5)), "data.jsonl:3: field 'chosen' must be text"),
    ("prompt is a number", jsonl(changed(prompt=5)), "data.jsonl:3: field 'prompt' must be text"),
    ("NaN margin", jsonl(changed(margin=float("nan"))), "data.jsonl:3: field 'margin' must be a finite number"),
    ("margin in words", jsonl(changed(margin="large")), "data.jsonl:3: field 'margin' must be a finite number"),
    ("negative weight", jsonl(changed(weight=-1)), "data.jsonl:3: field 'weight' must be >= 0"),
    ("preference of 1.5", jsonl(changed(preference=1.5)), "data.jsonl:3: field 'preference' must be in [0.0, 1.0]"),
    ("tie in words", jsonl(changed(tie="maybe")), "data.jsonl:3: field 'tie' must be true or false"),
    ("source is a list", jsonl(changed(source=["a"])), "data.jsonl:3: field 'source' must be text"),
    ("text against messages", jsonl(CHAT_ROW | {"rejected": "bad"}), "data.jsonl:3: field 'rejected' must be of"),
    ("message without role", jsonl(CHAT_ROW | {"chosen": [{"content": "x"}]}), "data.jsonl:3: field chosen[0] must"),
    ("no messages", jsonl(CHAT_ROW | {"chosen": []}), "data.jsonl:3: field 'chosen' is an empty list"),
    ("message without text", jsonl(CHAT_ROW | {"chosen": [{"role": "assistant", "content": None}]}), "data.jsonl:3"),
    ("truncated JSONL", jsonl('{"prompt": "a", "chosen": "goo'), "data.jsonl:3: not a JSON object"),
    ("a bare number", jsonl("17\n"), "data.jsonl:3: expected an object"),
    ("two million characters", jsonl(changed(chosen="x " * 1_000_000)), "data.jsonl:3: field 'chosen' has 2,000,000"),
    ("binary in a text", jsonl(changed(chosen="a\x00b")), "data.jsonl:3: field 'chosen' holds a zero byte"),
    ("one completion", jsonl(RANKED | {"completions": ["a"]}), "data.jsonl:3: field 'completions' must be a list"),
    ("completions without ranks", jsonl(RANKED), "data.jsonl:3: field 'completions' needs 'ranks'"),
    ("too few scores", jsonl(RANKED | {"scores": [1, 2]}), "data.jsonl:3: field 'completions' needs 'ranks'"),
    ("equal ranks", jsonl(RANKED | {"ranks": [1, 1, 1]}), "data.jsonl:3: field 'ranks' ranks all 3"),
    ("infinite score", jsonl(RANKED | {"scores": [1, 2, float("inf")]}), "data.jsonl:3: field 'scores[2]'"),
    ("same completion twice", jsonl(RANKED | {"completions": ["a", "a"], "ranks": [1, 2]}), "same completion twice"),
    ("label in words", jsonl({"text": "x", "label": "splendid"}), "data.jsonl:3: field 'label' must be a number"),
    ("label without text", jsonl({"text": "", "label": 1}), "data.jsonl:3: field 'text' must be text"),
    ("binary file", raw("data.jsonl", b"\x89PNG\r\n" * 100), "data.jsonl:1: not UTF-8 text"),
    ("empty file", raw("data.jsonl", b""), "holds no rows"),
    ("JSON object", raw("data.json", b'{"chosen": "a"}'), "must hold a JSON list"),
    ("broken JSON", raw("data.json", b'[{"chosen": '), "data.json: not valid JSON"),
    ("ragged CSV", raw("data.csv", b"prompt,chosen,rejected\na,b\n"), "data.csv:2: the line has more or fewer fields"),
    ("CSV with a word as weight", raw("d.csv", b"chosen,rejected,weight\na,b,x\n"), "d.csv:2: field 'weight' must be"),
    ("no Parquet", raw("data.parquet", b"PAR1 but not really"), "data.parquet cannot be read as Parquet"),
    ("unknown kind of file", raw("data.xml", b"<a/>"), "unknown kind of file '.xml'"),
    ("no such file", lambda folder: str(folder / "gone.jsonl"), "There is no file"),
    ("no such folder", lambda folder: str(folder / "gone"), "could not be loaded"),
    ("one summary", jsonl({"info": {"post": "x"}, "summaries": [], "choice": 0}), "'summaries' must hold two"),
    ("one label only", raw("d.jsonl", b'{"text": "a", "label": 1}\n'), "two different labels"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "message"), [case[1:] for case in BAD_DATA], ids=[case[0] for case in BAD_DATA])
def test_malformed_data_ends_in_one_line(
    write: Callable[[Path], str], message: str, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    error = error_of(["--data", source, "--model", str(tiny_base), "--output_dir", str(tmp_path / "out")], capsys)
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on its last and only line of stderr."""
    with pytest.raises(SystemExit) as ended:
        run(main, arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and len(error) < 600
    return error


def plain_rows(tmp_path: Path, rows: int = 20, **fields: Any) -> str:
    data = [GOOD_ROW | {"prompt": f"Film {index}: "} | fields for index in range(rows)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(tmp_path / "data.jsonl")


BAD_SETTINGS: list[tuple[str, list[str], str]] = [
    ("unknown model", ["--model", "no-such-model"], "The model 'no-such-model' could not be loaded"),
    ("model is a file", ["--model", __file__], "there is no model folder"),
    ("unknown flag", ["--modle", "x"], "--modle"),
    ("negative epochs", ["--epochs", "-1"], "epochs must be > 0"),
    ("epochs in words", ["--epochs", "many"], "invalid float value: 'many'"),
    ("smoothing of 0.7", ["--label_smoothing", "0.7"], "label_smoothing must be < 0.5"),
    ("unknown template", ["--template", "odd"], "invalid choice: 'odd'"),
    ("held out everything", ["--held_out", "1.0"], "held-out fraction must be in (0, 1)"),
    ("uneven micro-batch", ["--batch_size", "10", "--micro_batch_size", "4"], "cannot be divided evenly"),
    ("patience without evaluations", ["--early_stop_patience", "2"], "Set evaluations to 5 or more"),
    ("unknown column", ["--columns", "winning=chosen"], "columns maps unknown names ['winning']"),
    ("columns without =", ["--columns", "chosen"], "--columns takes ours=theirs"),
    ("everything too long", ["--max_length", "2"], "max_length=2 tokens"),
    ("resume without checkpoint", ["--resume"], "holds no checkpoint"),
    ("no configuration file", ["--config", "gone.yaml"], "there is no file gone.yaml"),
    ("ensemble of none", ["--ensemble", "0"], "ensemble must be >= 1"),
]


@pytest.mark.parametrize(("flags", "message"), [case[1:] for case in BAD_SETTINGS], ids=[c[0] for c in BAD_SETTINGS])
def test_wrong_settings_end_in_one_line(
    flags: list[str], message: str, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = plain_rows(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--data", source, "--model", str(tiny_base), "--output_dir", str(tmp_path / "out"), *flags]
    assert message in error_of(arguments, capsys)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def test_a_chat_without_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    tiny_gpt2().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    rows = [CHAT_ROW | {"prompt": [{"role": "user", "content": f"Film {index}?"}]} for index in range(20)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data", str(tmp_path / "chat.jsonl"), "--model", str(base), "--output_dir", str(tmp_path / "out")]
    assert "has no chat template" in error_of(arguments, capsys)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_exists_is_kept(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    arguments = ["--data", plain_rows(tmp_path), "--model", str(tiny_base), "--output_dir", str(output)]
    assert "exists" in error_of(arguments, capsys)
    assert (output / "precious").read_text() == "mine"


def test_bad_rows_are_set_aside_on_request_with_place_and_reason(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(plain_rows(tmp_path))
    source.write_text(source.read_text() + '{"prompt": "cut o\n' + json.dumps(changed(chosen="")) + "\n")
    output = tmp_path / "out"
    flags = ["--on_bad_row", "skip", "--learning_rate", "1e-3", "--max_length", "64", "--no_progress"]
    main(["--data", str(source), "--model", str(tiny_base), "--output_dir", str(output), *flags])
    assert "2 malformed skipped" in capsys.readouterr().out
    aside = [json.loads(line) for line in (tmp_path / "out.bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in aside] == ["data.jsonl:21", "data.jsonl:22"]
    assert "field 'chosen' is empty" in aside[1]["error"] and aside[1]["row"]["rejected"] == "bad"
    assert json.loads((output / "reward_model.json").read_text())["data"]["bad"] == 2


def test_a_dataset_object_names_the_row() -> None:
    data = Dataset.from_list([GOOD_ROW, GOOD_ROW | {"chosen": "bad"}])
    with pytest.raises(ValueError, match="row 1: fields 'chosen' and 'rejected' are identical"):
        load_comparisons(data)
