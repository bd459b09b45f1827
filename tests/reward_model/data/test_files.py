"""Files as people have them: marks, encodings, compressions, quotes, folders; each is read or refused by name."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.table import pa as pyarrow

from reward_model import BadRow, RewardModel
from reward_model import score as score_command
from reward_model.data.preparation import load_comparisons
from reward_model.data.sources import DataError, read_rows

ROWS = [{"prompt": f"Film {n}: ", "chosen": f"schön {n}", "rejected": f"fad {n} 🙂"} for n in range(4)]
EXPECTED = [(row["prompt"], (row["chosen"], row["rejected"])) for row in ROWS]


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> str:
    return "".join(separator.join(map(str, values)) + "\r\n" for values in [rows[0], *(row.values() for row in rows)])


TEXTS = {
    "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "json": json.dumps(ROWS, ensure_ascii=False),
    "csv": as_csv(ROWS),
    "tsv": as_csv(ROWS, "\t"),
}


def read(path: Path) -> list[Any]:
    return [(c.prompt, c.completions) for c in load_comparisons(str(path)).comparisons]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read_and_is_no_part_of_the_first_name(kind: str, encoding: str, tmp_path: Path) -> None:
    """R3: with Excel's mark, the column `prompt` was lost, and four rows became one."""
    path = tmp_path / f"data.{kind}"
    path.write_bytes(TEXTS[kind].encode(encoding))
    assert read(path) == EXPECTED


def test_files_that_were_put_together_may_keep_their_marks(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    first, *others = TEXTS["jsonl"].splitlines(keepends=True)
    path.write_bytes(first.encode("utf-8-sig") + "".join(others).encode("utf-8-sig"))
    assert read(path) == EXPECTED


def test_scoring_reads_a_byte_order_mark_as_training_does(
    reward_model: RewardModel, trained_folder: Path, tmp_path: Path
) -> None:
    """R3."""
    path = tmp_path / "data.csv"
    path.write_bytes("prompt,response\nThe movie was ,good\n".encode("utf-8-sig"))
    scores = score_command.main(["--model", str(trained_folder), "--data", str(path), "--output", str(tmp_path / "o")])
    assert scores == reward_model(["The movie was "], ["good"])


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_are_read_and_damaged_ones_refused(kind: str, compression: str, tmp_path: Path) -> None:
    plain = TEXTS[kind].encode()
    if compression == "zst":
        packed = pyarrow.compress(plain, codec="zstd", asbytes=True)
    else:
        packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[compression](plain)
    path = tmp_path / f"data.{kind}.{compression}"
    path.write_bytes(packed)
    assert read(path) == EXPECTED
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"data\.\w+\.\w+ cannot be read to its end: .*damaged or cut off"):
        read(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_a_line_in_latin_1_is_a_bad_row_that_names_the_encoding(kind: str, tmp_path: Path) -> None:
    lines = TEXTS[kind].encode().splitlines(keepends=True)
    lines[2] = lines[2].decode().replace("🙂", "").encode("latin-1")
    path = tmp_path / f"data.{kind}"
    path.write_bytes(b"".join(lines))
    with pytest.raises(BadRow, match=rf"data\.{kind}:3: not UTF-8 text \(byte 0xf6.*looks like Latin-1.*iconv"):
        load_comparisons(str(path))
    report = load_comparisons(str(path), on_bad_row="skip").report
    assert (report.rows, report.bad, report.comparisons) == (4, 1, 3)


def test_encodings_that_do_not_say_so_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(TEXTS["json"].encode("latin-1", "replace"))
    with pytest.raises(DataError, match=r"data\.json: not UTF-8 text .*Latin-1"):
        read(path)
    path.write_bytes(TEXTS["json"].encode("utf-16-le"))
    with pytest.raises(DataError, match=r"looks like UTF-16LE without.*--encoding utf-16le; or convert it: iconv"):
        read(path)


CHINESE = [{"prompt": f"中文 {n}：", "chosen": f"很好 {n}", "rejected": f"一般 {n}"} for n in range(4)]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16-le", "utf-16-be", "big5"])
def test_another_encoding_is_read_if_it_is_named_and_refused_with_this_remedy_otherwise(
    kind: str, encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / f"data.{kind}"
    texts = {"jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHINESE), "csv": as_csv(CHINESE)}
    texts |= {"json": json.dumps(CHINESE, ensure_ascii=False), "tsv": as_csv(CHINESE, "\t")}
    path.write_bytes(texts[kind].encode(encoding))
    with pytest.raises((BadRow, DataError), match="--encoding"):
        load_comparisons(str(path))
    found = load_comparisons(str(path), encoding=encoding).comparisons
    assert [(c.prompt, c.completions) for c in found] == [(r["prompt"], (r["chosen"], r["rejected"])) for r in CHINESE]


def test_an_encoding_that_a_file_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(TEXTS["jsonl"].encode())
    with pytest.raises(DataError, match="encoding='klingon' is unknown"):
        load_comparisons(str(path), encoding="klingon")
    with pytest.raises(BadRow, match=r"data\.jsonl:1: not ascii text \(byte 0xc3.*--encoding"):
        load_comparisons(str(path), encoding="ascii")
    path.write_bytes(TEXTS["jsonl"].encode("utf-16-le") + b"\x00\xd8\n\x00")  # half of a character
    with pytest.raises(DataError, match="encoding=utf-16-le, but it holds bytes that are none"):
        load_comparisons(str(path), encoding="utf-16-le")
    path.write_bytes(TEXTS["jsonl"].encode("utf-8-sig"))
    assert len(load_comparisons(str(path), encoding="utf-8").comparisons) == 4, "the mark is no part of the text"
    with pytest.raises(DataError, match="byte order mark of utf-8-sig, but encoding=gbk: its texts would be garbled"):
        load_comparisons(str(path), encoding="gbk")
    table = tmp_path / "data.parquet"
    Dataset.from_list(ROWS).to_parquet(table)
    for source in (str(table), Dataset.from_list(ROWS)):
        with pytest.raises(DataError, match=r"encoding=gbk is for text files"):
            load_comparisons(source, encoding="gbk")


@pytest.mark.parametrize(("suffix", "separator"), [("tsv", "\t"), ("csv", ",")])
def test_a_quote_that_is_not_closed_costs_its_own_row_and_swallows_no_other(
    suffix: str, separator: str, tmp_path: Path
) -> None:
    """R15: a quote in a TSV made one text of 30 rows."""
    rows = [{"prompt": f"Film {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(60)]
    rows[10]["chosen"] = '"so good'
    rows[40]["rejected"] = 'the end"'
    path = tmp_path / f"data.{suffix}"
    path.write_text(as_csv(rows, separator))
    with pytest.raises(
        BadRow, match=rf"data\.{suffix}:12: the quote that opens in this line takes in 30 more lines, 29 of"
    ):
        load_comparisons(str(path))
    report = load_comparisons(str(path), on_bad_row="skip").report
    assert (report.rows, report.bad, report.comparisons) == (60, 1, 59)
    rows[40]["rejected"] = "bad 40"
    path.write_text(as_csv(rows, separator))
    with pytest.raises(BadRow, match="is not closed: it would take in 49 more lines"):
        load_comparisons(str(path))
    rows[10]["chosen"] = '"so" good'
    path.write_text(as_csv(rows, separator))
    with pytest.raises(BadRow, match="goes on after its closing quote"):
        load_comparisons(str(path))


def test_quoted_fields_may_hold_separators_quotes_and_lines(tmp_path: Path) -> None:
    text = 'One,\n"two",\nthree, four\n\nand five'
    path = tmp_path / "data.csv"
    quoted = text.replace('"', '""')
    path.write_text(f'prompt,chosen,rejected\n"{quoted}",good,bad\nFilm,"a ""b"" c",d\n')
    assert read(path) == [(text, ("good", "bad")), ("Film", ('a "b" c', "d"))]


def test_a_table_may_be_separated_by_semicolons_and_hold_numbers_lists_and_conversations(tmp_path: Path) -> None:
    """R15: conversations in cells trained as plain text."""
    path = tmp_path / "data.csv"
    path.write_text("prompt;chosen;rejected;margin;tie\nFilm: ;good;bad;0.5;false\n")
    (comparison,) = load_comparisons(str(path)).comparisons
    assert (comparison.completions, comparison.margin, comparison.is_tie) == (("good", "bad"), 0.5, False)
    path.write_text('prompt;completions;scores\nFilm: ;"[""good"", ""bad""]";"[2, 1]"\n')
    (comparison,) = load_comparisons(str(path)).comparisons
    assert comparison.completions == ("good", "bad")
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "It's"}]
    for write in (json.dumps, str):
        rows = [{"chosen": write(turns), "rejected": write([turns[0], {"role": "assistant", "content": "Not"}])}]
        path.write_text(
            "chosen;rejected\n" + ";".join('"' + text.replace('"', '""') + '"' for text in rows[0].values())
        )
        (comparison,) = load_comparisons(str(path)).comparisons
        assert comparison.prompt == turns[:1]
        assert comparison.completions[0] == turns[1:]


def test_json_lines_in_a_file_named_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(TEXTS["jsonl"])
    assert read(path) == EXPECTED


def test_lines_that_json_cannot_hold_in_python_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("[" * 100_000 + "\n" + '{"chosen": ' + "1" * 5000 + "}\n" + TEXTS["jsonl"])
    report = load_comparisons(str(path), on_bad_row="skip").report
    assert (report.rows, report.bad, report.comparisons) == (6, 2, 4)


def test_a_table_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,chosen,chosen\na,b,c\n")
    with pytest.raises(DataError, match=r"names \['chosen'\] more than once"):
        list(read_rows(str(path)))


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    """R24: `--data A --data B` used B alone."""
    for number, row in enumerate(ROWS):
        (tmp_path / f"part{number}.jsonl").write_text(json.dumps(row) + "\n")
    paths = [str(tmp_path / f"part{number}.jsonl") for number in range(4)]
    assert [(c.prompt, c.completions) for c in load_comparisons(paths).comparisons] == EXPECTED
    assert [where for where, _ in read_rows(paths)] == [f"part{number}.jsonl:1" for number in range(4)]


def test_the_files_of_a_folder_may_have_different_columns_and_a_bad_row_costs_itself_alone(tmp_path: Path) -> None:
    """R24: a folder in which one file has `margin` could not be loaded, without a cause."""
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0] | {"margin": 2.0}) + "\n")
    (tmp_path / "b.csv").write_text(as_csv(ROWS[1:2]))
    (tmp_path / "more").mkdir()
    Dataset.from_list(ROWS[2:3]).to_parquet(str(tmp_path / "more" / "c.parquet"))
    (tmp_path / "more" / "test-00000-of-00001.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    (tmp_path / "d.jsonl").write_text('{"chosen": "cut o')
    (tmp_path / "README.md").write_text("Four files.")
    loaded = load_comparisons(str(tmp_path), on_bad_row="skip")
    assert [(c.prompt, c.completions, c.margin) for c in loaded.comparisons] == [
        (*EXPECTED[0], 2.0), (*EXPECTED[1], 0.0), (*EXPECTED[2], 0.0)
    ]  # fmt: skip
    assert [row["where"] for row in loaded.bad_rows] == ["d.jsonl:1"]
    assert len(load_comparisons(str(tmp_path), split="test").comparisons) == 1
    with pytest.raises(DataError, match=r"no such split, only \['test', 'train'\]"):
        load_comparisons(str(tmp_path), split="validation")


def test_a_lone_surrogate_is_a_bad_row(tmp_path: Path) -> None:
    """R14: it ended in "TextEncodeInput must be Union[...]", without a row, also with skip."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p", "chosen": "cut \\ud83d", "rejected": "b"}\n' + TEXTS["jsonl"])
    with pytest.raises(BadRow, match=r"data\.jsonl:1: field 'chosen' holds '\\ud83d' at character 4"):
        load_comparisons(str(path))
    assert load_comparisons(str(path), on_bad_row="skip").report.comparisons == 4


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.zip", "PK", "unknown kind of file '.zip'.* Unpack it"),
        ("data.xlsx", "PK", "unknown kind of file '.xlsx'.* Save the sheet as CSV"),
        ("data.txt", "a\tb", "unknown kind of file '.txt'.* Rename it by what it holds: .tsv"),
        ("data.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "object with one such list.*a list of their own"),
        (
            "data.json",
            '{"chosen": {"role": "user", "content": "x"}, "rejected": {"role": "user", "content": "x"}}',
            "got dict",
        ),
        ("data.jsonl", "// by hand\n", "JSON has no comments"),
        ("data.jsonl", json.dumps(ROWS[0]) + ",\n", "no comma after the last item"),
        ("data.jsonl", json.dumps(ROWS, indent=1), "belongs in a file that ends in .json"),
        ("data.jsonl", json.dumps(ROWS), "A list of rows belongs in a file that ends in .json"),
        ("data.csv", 'prompt;chosen;rejected;margin\na;b;c;"1,250"\n', "'margin' must be a finite number, got '1,250'"),
        ("data.csv", "prompt,response_a,response_b,preference\na,b,c,0.2\n", "'preference' must name one of"),
        ("data.csv", "prompt,response_a,response_b,winner\na,b,c,1\n", "'winner' must name one of"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_remedy(name: str, content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises((BadRow, DataError), match=reason):
        load_comparisons(str(path))


@pytest.mark.parametrize(
    "text",
    ["sep=;\nprompt;chosen;rejected\na;b;c\n", "prompt|chosen|rejected\na|b|c\n", "Prompt, Chosen ,REJECTED\na,b,c\n"],
    ids=["Excel's first line", "bars", "capitals"],
)
def test_tables_as_spreadsheets_write_them_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    assert read(path) == [("a", ("b", "c"))] and not load_comparisons(str(path)).report.unused_columns


def test_a_split_of_a_single_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(TEXTS["jsonl"], encoding="utf-8")
    with pytest.raises(DataError, match="a file is read as a whole"):
        load_comparisons(str(path), split="validation")
