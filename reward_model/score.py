"""The command `python -m reward_model.score`, which scores texts with a reward model."""

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_model.data.layouts.base import CONVERSATION_NAMES, is_unanswered, prompt_columns
from reward_model.data.layouts.rated import ANSWER_NAMES
from reward_model.data.rows import (
    BadRow,
    check_mapping,
    checked_row,
    json_line,
    rename_columns,
    set_aside,
    with_lower_names,
)
from reward_model.utils.commands import column_names, model_as_option, parse, run
from reward_model.utils.options import DataOptions, ModelOptions
from rlhf_ppo.chat.cells import parse_cell
from rlhf_ppo.chat.messages import read_text, read_tools

logger = logging.getLogger(__name__)

EXAMPLES = """  rlhf-ppo reward score runs/my_reward --data answers.jsonl > scores.jsonl
  rlhf-ppo reward score runs/my_reward --data a.csv --columns prompt=question response=reply"""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ModelOptions, DataOptions):
    """Reward model, data to score and output file."""

    data: list[str]
    """Rows with `response` (and `prompt`, `tools`) or `messages`; files, folders or hub names, as for training."""
    output: str = "-"
    """JSONL file for the rows with their `score`; - is standard output. Rows that are left out go beside it."""
    caution: float = 0.0
    """Standard deviations over its members to subtract from an ensemble's score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(Path(self.output).absolute() == Path(name).absolute() for name in self.data):
            raise ValueError(
                f"output={self.output} is also the data: its rows would be overwritten. Name another file."
            )


@dataclass(frozen=True)
class _Sample:
    """A row, and what is scored of it."""

    row: dict[str, Any]
    prompt: Any
    response: Any
    tools: Any


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Score every row and write it with its score."""
    (config,) = parse(
        (ScoreConfig,),
        model_as_option(arguments),
        program="python -m reward_model.score",
        description="Score prompt-response texts with a trained reward model.",
        examples=EXAMPLES,
    )
    from reward_model.data.preparation import write_bad_rows  # torch comes with these
    from reward_model.models.ensemble import first_member, load_model

    model = load_model(config, caution=config.caution)
    samples, bad_rows = _read(config, first_member(model))
    target = Path("scores" if config.output == "-" else config.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    if bad_rows:
        write_bad_rows(bad_rows, target.with_name(f"{target.name}.bad_rows.jsonl"))
        logger.warning("%d of %d rows cannot be read and get no score.", len(bad_rows), len(bad_rows) + len(samples))
    if not samples:
        raise ValueError(f"None of the {len(bad_rows)} rows can be read. The first one: {bad_rows[0]['error']}")
    scores: list[float] = model(
        [sample.prompt for sample in samples],
        [sample.response for sample in samples],
        tools=[sample.tools for sample in samples],
    )
    with ExitStack() as stack:
        file = sys.stdout if config.output == "-" else stack.enter_context(target.open("w", encoding="utf-8"))
        for sample, score in zip(samples, scores, strict=True):
            file.write(json_line(sample.row | {"score": score}))
    return scores


def _read(config: ScoreConfig, model: Any) -> tuple[list[_Sample], list[dict[str, Any]]]:
    """The samples, and the rows that were set aside.

    Raises:
        BadRow: A row cannot be read, with on_bad_row="stop".
        ValueError: A mapped column is in no row.
    """
    from reward_model.data.sources import read_rows

    columns = column_names(config.columns)
    samples, bad_rows, seen = [], [], set()
    for where, row in read_rows(config.data, split=config.split, encoding=config.encoding):
        try:
            fields = checked_row(row, where)
            seen |= set(fields)
            samples.append(_sample(fields, rename_columns(fields, columns), model, where))
        except BadRow as error:
            bad_rows.append(set_aside(error, where, None if row is error else row, config.on_bad_row))
    if seen:
        check_mapping(columns, seen)
    return samples, bad_rows


def _sample(original: Mapping[str, Any], row: Mapping[str, Any], model: Any, where: str) -> _Sample:
    """What is scored of a row: prompt and response, or a whole conversation."""
    from reward_model.models.text import encode

    name = next((name for name in ANSWER_NAMES if row.get(name) is not None), None)
    prompt, _ = prompt_columns(row)
    if name is None:
        name = next((name for name in CONVERSATION_NAMES if row.get(name) and not is_unanswered(row[name])), None)
        prompt = None
    if name is None and (lower := with_lower_names(row)) is not None:
        return _sample(original, lower, model, where)
    if name is None:
        raise BadRow(
            f"{where}: field 'response' is missing; the row has {sorted(map(str, row))}. Map another name with "
            "--columns response=NAME."
        )
    try:
        prompt = "" if prompt is None else read_text(parse_cell(prompt, "prompt"), "prompt")
        response = read_text(parse_cell(row[name], name), name)
        tools = read_tools(row.get("tools"), "tools")
        encode(model.tokenizer, model.contract.text, prompt, response, truncate=True, tools=tools)
    except ValueError as error:
        raise BadRow(f"{where}: {error}") from error
    return _Sample(dict(original), prompt, response, tools)


if __name__ == "__main__":
    run(main, alone=True)
