"""Prompt datasets and preference data of every shape, and files of both that somebody has cut or scribbled on."""

import json
from pathlib import Path
from typing import Any

import datasets
from hypothesis import strategies as st

from reward_model.data.comparisons import BadRow, as_comparisons, parse_row
from reward_model.data.sources import read_rows
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.fuzz.harness import Target
from tests.support.tiny_models import tiny_tokenizer

texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "The movie", "<eos>", "<pad>", "\ud800".encode("utf-8", "ignore").decode(), "\x00"]),
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "", None, 3]),
        "content": texts | st.none() | st.integers(),
        "x": texts,
    },
)
cells = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 400), st.floats(), texts, texts,
    st.lists(st.integers(-2, 330), max_size=4),
    st.lists(turns, max_size=3), st.lists(st.none() | texts, max_size=2),
    st.dictionaries(texts, st.integers(), max_size=2),
    st.lists(st.floats(), max_size=2), st.lists(st.lists(st.integers(), max_size=2), max_size=2),
)  # fmt: skip
columns = st.sampled_from(["prompt", "query", "input_ids", "text", "prompts", "responses", "label", ""])
fields = st.sampled_from([
    "prompt", "chosen", "rejected", "margin", "weight", "preference", "tie", "source", "completions",
    "ranks", "scores", "text", "label",
])  # fmt: skip
rows = st.dictionaries(fields, cells, max_size=5)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Any, dict[str, Any]]:
    """(what, content, arguments)."""
    what = draw(st.sampled_from(["prompts", "prompts", "prompts", "wrong", "pairs", "pairs", "pairs", "file"]))
    if what == "prompts":
        height = draw(st.integers(0, 3))
        kind = draw(
            st.sampled_from(
                [texts, st.lists(st.integers(-1, 330), max_size=4), st.lists(turns, min_size=1, max_size=3), cells]
            )
        )
        table = draw(st.dictionaries(columns, st.lists(kind, min_size=height, max_size=height), min_size=1, max_size=2))
        if draw(st.booleans()):
            table = {"prompt": draw(st.lists(kind, min_size=height, max_size=height)), **table}
        options = draw(st.fixed_dictionaries({}, optional={
            "column": st.sampled_from([None, "prompt", "text", "x"]),
            "max_prompt_tokens": st.sampled_from([None, 1, 3, 0, -1]),
            "truncation": st.sampled_from(["keep_end", "keep_start", "drop", "error", "x"]),
        }))  # fmt: skip
        return what, table, options
    if what == "wrong":
        return what, draw(cells), {}
    if what == "pairs":
        return what, draw(st.lists(rows | cells, max_size=3)), {}
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ""]))
    text = "\n".join(json.dumps(row) for row in draw(st.lists(rows, max_size=3))).encode()
    if suffix in (".csv", ".tsv"):
        text = "\n".join(
            ",".join(map(str, row))
            for row in [["prompt", "chosen", "rejected"], *draw(st.lists(st.lists(texts, max_size=4), max_size=3))]
        ).encode("utf-8", "replace")
    cut = draw(st.integers(0, len(text)))
    return (
        what,
        draw(
            st.sampled_from([text, text[:cut], text[:cut] + draw(st.binary(max_size=4)), draw(st.binary(max_size=20))])
        ),
        {"suffix": suffix},
    )


def target(folder: Path) -> Target:
    """`PromptDataset`, `parse_row`, and the readers of files."""
    plain, chat = tiny_tokenizer(), tiny_tokenizer(chat=True)

    def attempt(case: tuple[str, Any, dict[str, Any]]) -> None:
        what, content, options = case
        match what:
            case "prompts":
                try:
                    table = datasets.Dataset.from_dict(content)
                except Exception as error:  # pyarrow's own refusal comes before ours
                    raise ValueError("the columns are no table: refused by datasets") from error
                for tokenizer in (plain, chat):
                    prompts = PromptDataset(table, tokenizer, **options)
                    batch = prompts.batch(list(range(len(prompts))))
                    assert all(len(ids) for ids in batch.input_ids)
            case "wrong":
                PromptDataset(content, plain)
            case "pairs":
                as_comparisons(content, "data")
            case "file":
                path = folder / f"data{options['suffix']}"
                path.write_bytes(content)
                for where, row in read_rows(str(path)):
                    if isinstance(row, BadRow):
                        raise row
                    parse_row(row, where)

    return Target(cases=cases(), attempt=attempt)
