"""The command `python -m reward_model.train`, which trains a reward model from preference data."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_model.training.config import RewardModelConfig
from reward_model.utils.commands import parse, run, table
from reward_model.utils.options import DataOptions
from rlhf_ppo.utils.field_types import check_fields

if TYPE_CHECKING:
    from reward_model.data.preparation import LoadedComparisons
    from reward_model.training.trainer import RewardModelResult

logger = logging.getLogger(__name__)

FURTHER = (
    "evaluation_split", "pair_rounds", "append_eos", "schedule_arguments", "weight_decay", "max_grad_norm", "packing",
    "fast_products", "tie_strength", "margin_scale", "lora_alpha", "merge_adapter", "progress", "log_every",
    "trust_remote_code", "label_smoothing", "centering", "encoding", "micro_batch_size",
)  # fmt: skip
EXAMPLES = """  rlhf-ppo reward train --data pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/rm
  rlhf-ppo reward train --config reward.yaml --learning_rate 1e-4 --output_dir runs/faster"""


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataOptions):
    """Training and held-out data."""

    evaluation_data: list[str] = field(default_factory=list)
    """Held-out sources; none: a part of the data is held out by prompt, or by --group."""
    evaluation_split: str = "test"
    """Which split of the held-out folder or hub dataset."""
    held_out: float = 0.1
    """Share of the comparisons to hold out, without evaluation_data."""
    group: str | None = None
    """Column whose equal values are held out together; None: the prompt, or the beginning that both texts share."""
    pair_rounds: int = 1
    """Maximum of pairs per labeled text (only for text, label data)."""
    max_comparisons: int = 0
    """Draw this many training comparisons at random; 0 uses all."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("max_comparisons", 0), ("pair_rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """How many models to train."""

    ensemble: int = 1
    """Number of models, which differ in the seed; their mean score is used."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ensemble < 1:
            raise ValueError(f"ensemble must be >= 1, got {self.ensemble}.")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Load the data, train, print held-out metrics, and return the folder of the reward model."""
    data, config, ensemble = parse(
        (DataConfig, RewardModelConfig, EnsembleConfig),
        arguments,
        program="python -m reward_model.train",
        description="Train a reward model from preferences: pairs, rankings or labeled texts.",
        examples=EXAMPLES,
        further=FURTHER,
    )
    return _train(data, config, ensemble.ensemble).path


def _train(data: DataConfig, config: RewardModelConfig, members: int) -> "RewardModelResult":
    # torch comes with these
    from reward_model.data.preparation import describe_split, load_data, split_by_prompt, write_bad_rows
    from reward_model.training.ensemble import train_ensemble
    from reward_model.training.resume import processes
    from reward_model.training.trainer import train_reward_model

    options: dict[str, Any] = {"seed": config.seed, "pair_rounds": data.pair_rounds}
    loaded = load_data(data, **options, group=data.group)
    train, bad_rows = loaded.comparisons, list(loaded.bad_rows)
    if data.evaluation_data:
        held_out = replace(data, data=data.evaluation_data, split=data.evaluation_split)
        loaded_evaluation = load_data(held_out, **options)
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
    if members > 1:
        result = train_ensemble(config, members, train, evaluation, facts, data.on_bad_row)
    else:
        rows: dict[str, Any] = {"train": train, "evaluation": evaluation, "on_bad_row": data.on_bad_row}
        result = train_reward_model(config, **rows, data_report=facts)
    if processes().is_main_process:
        bad_rows += result.bad_rows
        if bad_rows:
            write_bad_rows(bad_rows, Path(f"{config.output_dir}.bad_rows.jsonl"))
        facts_of_data = {"data": str(loaded.report), "held out": split, **_left_out(loaded, result)}
        metrics = {name: f"{value:.4g}" for name, value in result.metrics.items()}
        print(table({"reward model": str(result.path), **facts_of_data, **metrics}))  # noqa: T201
    return result


def _left_out(loaded: "LoadedComparisons", result: "RewardModelResult") -> dict[str, str]:
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


if __name__ == "__main__":
    run(main)
