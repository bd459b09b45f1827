"""Train a reward model from a preference dataset: `python -m reward_model.train --help`."""

import logging
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from reward_model.data.comparisons import Comparison
from reward_model.data.preparation import (
    LoadedComparisons,
    describe_split,
    load_comparisons,
    split_by_prompt,
    write_bad_rows,
)
from reward_model.data.rows import OnBadRow
from reward_model.evaluation.scoring import held_out_metrics, score_completions
from reward_model.models.encoding import split_encodable
from reward_model.models.ensemble import EnsembleRewardModel, save_ensemble
from reward_model.models.model import RewardModel
from reward_model.training.config import RewardModelConfig
from reward_model.training.resume import is_resumable, processes
from reward_model.training.trainer import RewardModelResult, train_reward_model
from reward_model.utils.commands import column_names, parse, run, table
from reward_model.utils.documented import documented

logger = logging.getLogger(__name__)


@documented
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out data."""

    data: list[str]
    """One or several .jsonl, .json, .csv, .tsv or .parquet files (also .gz, .zst, .bz2, .xz), folders, or hub names."""
    split: str = "train"
    """Which split of a folder or hub dataset to train on."""
    evaluation_data: list[str] = field(default_factory=list)
    """Held-out sources; none: a part of the data is held out by prompt, or by --group."""
    evaluation_split: str = "test"
    """Which split of the held-out folder or hub dataset."""
    held_out: float = 0.1
    """Share of the comparisons that is held out if there is no evaluation_data."""
    columns: list[str] = field(default_factory=list)
    """Names of the source's columns: ours=theirs, such as chosen=better rejected=worse; preference= leaves one out."""
    group: str | None = None
    """Column whose equal values are held out together; None: the prompt, or the beginning that both texts share."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """At a malformed row: stop with its location, or write it to a side file beside the output."""
    pair_rounds: int = 1
    """Maximum of pairs per labeled text (only for text, label data)."""
    max_comparisons: int = 0
    """Use only this many training comparisons, drawn at random within the seed; 0: all."""

    def __post_init__(self) -> None:
        for name, least in (("max_comparisons", 0), ("pair_rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}.")


@documented
@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """How many models to train."""

    ensemble: int = 1
    """Number of members, which differ in the seed of head and data order."""

    def __post_init__(self) -> None:
        if self.ensemble < 1:
            raise ValueError(f"ensemble must be >= 1, got {self.ensemble}.")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Load the data, train, print held-out metrics, and return the folder of the reward model."""
    data, config, ensemble = parse(
        (DataConfig, RewardModelConfig, EnsembleConfig),
        arguments,
        program="python -m reward_model.train",
        description="Train a reward model from preferences: pairs, rankings or labeled texts.",
    )
    loaded = _load(data, data.data, data.split, config.seed, group=data.group)
    train, bad_rows = loaded.comparisons, list(loaded.bad_rows)
    if data.evaluation_data:
        loaded_evaluation = _load(data, data.evaluation_data, data.evaluation_split, config.seed)
        evaluation = loaded_evaluation.comparisons
        bad_rows += loaded_evaluation.bad_rows
    else:
        train, evaluation = split_by_prompt(train, fraction=data.held_out, seed=config.seed)
    if 0 < data.max_comparisons < len(train):
        drawn = random.Random(config.seed).sample(range(len(train)), data.max_comparisons)
        train = [train[index] for index in sorted(drawn)]
    split = describe_split(train, evaluation)
    logger.info("%s. %s.", loaded.report, split)
    facts = loaded.report.as_dict()
    train_models = train_ensemble if ensemble.ensemble > 1 else _train_one
    result = train_models(config, ensemble.ensemble, train, evaluation, facts, data.on_bad_row)
    if processes().is_main_process:
        bad_rows += result.bad_rows
        if bad_rows:
            write_bad_rows(bad_rows, Path(f"{config.output_dir}.bad_rows.jsonl"))
        facts_of_data = {"data": str(loaded.report), "held out": split, **_left_out(loaded, result)}
        metrics = {name: f"{value:.4g}" for name, value in result.metrics.items()}
        print(table({"reward model": str(result.path), **facts_of_data, **metrics}))  # noqa: T201
    return result.path


def _left_out(loaded: LoadedComparisons, result: RewardModelResult) -> dict[str, str]:
    """What was left out of the data, for the table at the end."""
    sides = {"training": "train", "held-out": "evaluation"}
    long = {side: result.data.get(f"{name}_too_long", 0) for side, name in sides.items()}
    lines = {}
    if loaded.report.unused_columns:
        lines["not used"] = "columns " + ", ".join(loaded.report.unused_columns)
    if any(long.values()):
        counts = ", ".join(f"{count} {side}" for side, count in long.items())
        lines["too long"] = f"{counts} comparisons left out: they have a text of more than max_length tokens"
    if result.bad_rows:
        lines["bad rows"] = f"{len(result.bad_rows)} more could not be encoded and were set aside"
    return lines


def train_ensemble(
    config: RewardModelConfig,
    members: int,
    train: Sequence[Comparison],
    evaluation: Sequence[Comparison],
    facts: dict[str, Any],
    on_bad_row: OnBadRow = "stop",
) -> RewardModelResult:
    """Train `members` models with successive seeds, and save them as one ensemble.

    Raises:
        ValueError: Fewer than two members.
        FileExistsError: The output folder or that of the members exists, and `overwrite` and `resume` are off.
    """
    if members < 2:
        raise ValueError(f"An ensemble needs two or more members, got {members}.")
    output, state = Path(config.output_dir), processes()
    parts = output.with_name(output.name + ".members")
    if output.exists() and not (config.overwrite or (config.resume and parts.exists())):
        raise FileExistsError(f"The folder {output} exists. Choose another output_dir, or set overwrite=True.")
    if parts.exists() and not (config.overwrite or config.resume):
        raise FileExistsError(
            f"{parts} holds members of an interrupted run: starting again would delete them. Set resume=True to "
            "continue, overwrite=True to start again, or choose another output_dir."
        )
    state.wait_for_everyone()  # before the first process makes a folder
    results = []
    for index in range(members):
        member = replace(config, seed=config.seed + index, output_dir=str(parts / str(index)))
        if config.resume and not is_resumable(member):  # it has not begun
            member = replace(member, resume=False, overwrite=True)
        results.append(_train_one(member, 1, train, evaluation, facts, on_bad_row))
    folders = [result.path for result in results]
    metrics: dict[str, float] = {}
    if state.is_main_process:
        ensemble = EnsembleRewardModel([RewardModel.from_pretrained(folder) for folder in folders])
        first = ensemble.members[0]
        held_out, _ = split_encodable(evaluation, first.tokenizer, first.contract.text, on_bad_row=on_bad_row)
        metrics = held_out_metrics(score_completions(ensemble, held_out))
        save_ensemble(folders, output, metrics)
        shutil.rmtree(parts, ignore_errors=True)
    state.wait_for_everyone()
    return replace(results[0], path=output, metrics=metrics)


def _train_one(
    config: RewardModelConfig,
    _members: int,
    train: Sequence[Comparison],
    evaluation: Sequence[Comparison],
    facts: dict[str, Any],
    on_bad_row: OnBadRow,
) -> RewardModelResult:
    return train_reward_model(config, train=train, evaluation=evaluation, data_report=facts, on_bad_row=on_bad_row)


def _load(data: DataConfig, source: list[str], split: str, seed: int, *, group: str | None = None) -> LoadedComparisons:
    return load_comparisons(
        source,
        split=split,
        columns=column_names(data.columns),
        on_bad_row=data.on_bad_row,
        seed=seed,
        pair_rounds=data.pair_rounds,
        group=group,
    )


if __name__ == "__main__":
    run(main)
