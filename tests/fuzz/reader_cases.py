"""Fuzzed files of preference data: shapes of public sets, values of other kinds, damaged bytes, other encodings.

`python -m tests.fuzz.reader_cases --rows 20000` prints what became of the rows.
"""

import argparse
import copy
import csv
import gzip
import io
import json
import lzma
import random
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.table import pa as pyarrow

from reward_model.data.preparation import load_comparisons, split_by_prompt
from reward_model.models.contract import TextRule
from reward_model.models.encoding import split_encodable
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.fuzz.harness import HANG, PYTHONS_OWN_WORDS, Hang
from tests.reward_model.data.zoo import ZOO
from tests.support.tiny_models import tiny_tokenizer

ROWS_PER_FILE = 20
RULE = TextRule(template="chat", append_eos=False, max_length=1000)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and loop.index0 %}{{ raise_exception('late system') }}{% endif %}"
    "{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ '\\n' }}"
    "{% endfor %}"
)
OWN = [
    {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 0.5, "weight": 2.0, "tie": False, "source": "s"},
    {"prompt": "p", "completions": ["a", "b", "c"], "scores": [3, 1, 2]},
    {"text": "fine film", "label": 1},
    {"chosen": "Human: hi\n\nAssistant: yes", "rejected": "Human: hi\n\nAssistant: no"},
]
SHAPES = [*OWN, *(row for public in ZOO for row in public.rows)]


def junk(draw: random.Random, depth: int = 0) -> Any:
    """A value of any kind."""
    kinds = [
        lambda: draw.choice([None, True, False, float("nan"), float("inf"), -1, 0, 7, 1e308, 2.5, ""]),
        lambda: draw.choice(
            ["a", "ö 🙂", "\x00", "cut \ud83d", " ", '"', '"open', "a\nb", "a\tb", "x" * 500, "-", "1"]
        ),
        lambda: draw.choice(['[{"role": "user", "content": "x"}]', "[{'role': 'user'", '{"from": "gpt", "value": 1}']),
        lambda: [junk(draw, depth + 1) for _ in range(draw.randint(0, 3))] if depth < 4 else [],
        lambda: {draw.choice(_NAMES): junk(draw, depth + 1) for _ in range(draw.randint(0, 3))} if depth < 4 else {},
        lambda: [{"role": draw.choice(["user", "assistant", "", None, 3]), "content": junk(draw, depth + 1)}],
        lambda: [{"from": draw.choice(["human", "gpt", "x", None]), "value": junk(draw, depth + 1)}],
    ]
    return draw.choice(kinds)()


_NAMES = [
    "role", "content", "text", "type", "value", "rank", "from", "tool_calls", "function", "name", "arguments", "a",
]  # fmt: skip


def mutated(draw: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """A row with some fields gone, replaced, or taken from another shape."""
    row = copy.deepcopy(row)
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2, 4])):
        name = draw.choice(sorted(row) or ["prompt"])
        what = draw.randrange(5)
        if what == 0:
            row.pop(name, None)
        elif what == 1:
            row[name] = junk(draw)
        elif what == 2:
            row |= copy.deepcopy(draw.choice(SHAPES))
        elif what == 3:
            row[draw.choice(["prompt", "label", "tools", "system", "preference", "ranks", "chosen"])] = junk(draw)
        else:
            _change_inside(draw, row)
    return row


def _change_inside(draw: random.Random, value: Any) -> None:
    """Replace something inside a nested value."""
    while isinstance(value, dict | list) and value:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or draw.random() < 0.3:
            value[key] = junk(draw)
            return
        value = value[key]


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _table(rows: list[dict[str, Any]], separator: str) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, delimiter=separator)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def written(draw: random.Random, rows: list[dict[str, Any]], folder: Path) -> tuple[Path, bool]:
    """A file of the rows in some format, encoding and compression, and whether its bytes are as they should be."""
    kind = draw.choice(["jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "parquet"])
    path = folder / f"data.{kind}"
    if kind == "parquet":
        try:
            Dataset.from_list(rows).to_parquet(str(path))
            content = path.read_bytes()
        except Exception:  # rows of one schema only, says pyarrow
            kind, path = "jsonl", folder / "data.jsonl"
    if kind != "parquet":
        lines = "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows)
        text = {"jsonl": lines, "json": json.dumps(rows)}.get(kind) or _table(rows, "\t" if kind == "tsv" else ",")
        encoding = draw.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-8-sig", "utf-16", "latin-1", "utf-16-le"])
        content = text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
        clean = encoding in ("utf-8", "utf-8-sig")
    else:
        clean = True
    if draw.random() < 0.2:
        content, clean = _damaged(draw, content), False
    if kind != "parquet" and draw.random() < 0.3:
        packers = {"gz": gzip.compress, "xz": lzma.compress}
        packers["zst"] = lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)
        name = draw.choice(sorted(packers))
        content = packers[name](content)
        path = path.with_name(f"{path.name}.{name}")
        if draw.random() < 0.2:
            content, clean = _damaged(draw, content), False
    path.write_bytes(content)
    return path, clean


def _damaged(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    return draw.choice([
        content[:at], content[:at] + bytes(draw.randrange(256) for _ in range(4)) + content[at:],
        content[:at] + b'"' + content[at:], content[at:], b"", content[:at] + b"\n" + content[at:],
    ])  # fmt: skip


def attempt(
    draw: random.Random, rows: list[dict[str, Any]], folder: Path, counts: Counter[str], tokenizer: Any
) -> None:
    """Load a fuzzed file, skip its bad rows, and count each row once; then split, encode and read as prompts."""
    path, clean = written(draw, rows, folder)
    try:
        loaded = load_comparisons(str(path), on_bad_row="skip", group=draw.choice([None, None, "source"]))
    except ValueError as error:
        check_words(str(error))
        counts["refused with the file"] += len(rows)
        return
    report = loaded.report
    if clean:
        is_table = {".csv", ".tsv"} & set(path.suffixes)  # whose empty lines are no rows
        count = sum(any(map(_cell, row.values())) for row in rows) if is_table else len(rows)
        assert report.rows == count, f"{report.rows} of {count} rows were seen"
    assert report.bad == len(loaded.bad_rows)
    counts["read"] += report.rows - report.bad - report.undecided
    counts["undecided"] += report.undecided
    counts["skipped"] += report.bad
    counts["gone with damaged bytes"] += len(rows) - report.rows
    counts["comparisons"] += report.comparisons
    for bad_row in loaded.bad_rows:
        check_words(bad_row["error"])
        assert bad_row["where"]
    kept, bad_rows = split_encodable(loaded.comparisons, tokenizer, RULE, on_bad_row="skip")
    assert len(kept) + len(bad_rows) == report.comparisons
    counts["skipped by the template"] += len(bad_rows)
    try:
        split_by_prompt(kept, fraction=0.3, seed=0)
    except ValueError as error:
        check_words(str(error))
    try:
        dataset = Dataset.from_list([{"prompt": row.get("prompt"), "tools": row.get("tools")} for row in rows])
    except Exception:  # as above
        return
    try:
        prompts = PromptDataset(dataset, tokenizer, on_bad_row="skip").report
        counts["prompts"] += prompts.kept
        assert prompts.kept + prompts.unreadable + prompts.empty == len(rows)
    except (ValueError, TypeError) as error:
        check_words(str(error))


def check_words(message: str) -> None:
    """A refusal is in our words."""
    assert not PYTHONS_OWN_WORDS.search(message), message
    assert len(message) > 20, message


def run(rows: int, seed: int) -> Counter[str]:
    """Fuzz `rows` rows; anything but a count is raised with the file's number."""
    counts: Counter[str] = Counter()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    previous = signal.signal(signal.SIGALRM, _hang)
    try:
        for number in range(-(-rows // ROWS_PER_FILE)):
            draw = random.Random(f"{seed} {number}")
            shapes = [draw.choice(SHAPES) for _ in range(draw.choice([1, 1, 2, 4]))]
            fuzzed = [mutated(draw, draw.choice(shapes)) for _ in range(min(ROWS_PER_FILE, rows - counts["rows"]))]
            counts["rows"] += len(fuzzed)
            signal.setitimer(signal.ITIMER_REAL, HANG)
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    attempt(draw, fuzzed, Path(folder), counts, tokenizer)
                except Exception as error:
                    raise AssertionError(f"file {number} of seed {seed}: {traceback.format_exc()[-1500:]}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return counts


def _hang(*_: object) -> None:
    raise Hang(f"no end within {HANG:g} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    wishes = parser.parse_args()
    for name, count in run(wishes.rows, wishes.seed).items():
        print(f"{count:7,}  {name}")
