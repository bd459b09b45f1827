"""Dump an update that failed on numbers that are not finite: batch, rows, weights, settings, for `rlhf_ppo.replay`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ppo import algorithms as algorithm_settings
from rlhf_ppo.algorithms import AlgorithmConfig
from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.learner.finite_checks import nonfinite_parameters
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.rollout.kl_placement import loss_kl_estimator
from rlhf_ppo.updates.nonfinite import NonFiniteUpdateError

FORMAT = 1
FACTS, BATCH, MODEL = "dump.json", "batch.safetensors", "model"


@contextmanager
def dump_on_failure(learner: PPOLearner) -> Iterator[None]:
    """Context manager: while active, an update that fails writes a dump, which the error names. All processes enter."""
    try:
        yield
    except NonFiniteUpdateError as error:
        folder = learner.dump_dir
        if folder is None:
            hint = "For a dump that can be replayed, set `PPOConfig.dump_dir`."
        else:
            path = write_dump(learner, error, folder)
            hint = f"Everything is in {path}; `python -m rlhf_ppo.replay {path}` repeats the update."
        broken = nonfinite_parameters(learner.model)
        if broken:
            hint = f"{', '.join(broken[:3])} were not finite before this step: go back to a checkpoint. {hint}"
        raise NonFiniteUpdateError(
            f"{error} {hint}", batch=error.batch, rows=error.rows, metrics=error.metrics
        ) from error


def write_dump(learner: PPOLearner, error: NonFiniteUpdateError, folder: Path) -> Path:
    """Write `folder/dump-N` atomically and return its path. Every process calls it; the main one writes."""
    number = len(list(folder.glob("dump-*")))
    final, partial = folder / f"dump-{number}", folder / f".dump-{number}.partial"
    learner.save_weights(partial / MODEL)
    if learner.accelerator.is_main_process:
        save_file(_tensors(error.batch), partial / BATCH)
        (partial / FACTS).write_text(json.dumps(_facts(learner, error), indent=2), encoding="utf-8")
        partial.rename(final)
    learner.accelerator.wait_for_everyone()
    return final


def read_facts(folder: Path) -> dict[str, Any]:
    """Settings, rows and metrics of a dumped update; a ValueError if there is no dump or it is of another format."""
    path = folder / FACTS
    if not path.is_file():
        raise ValueError(
            f"expected a dump, got {folder} without {FACTS}: there is nothing to replay. Give the folder that the "
            "error message named."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got something else ({error}): the dump is damaged.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found_format = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected a dump of format {FORMAT}, got {found_format!r}: use the version that wrote it.")
    for part, is_missing in _not_in_a_dump(record).items():
        if is_missing:
            raise ValueError(
                f"expected an update that a dump holds as a whole, got one with {part}: {folder} has the batch and the "
                "weights, but not that part, so the step would be recomputed without it. Look at them by hand."
            )
    return record


def _not_in_a_dump(record: dict[str, Any]) -> dict[str, bool]:
    return {
        "the KL to a reference model over the whole vocabulary": record.get("reference_kl") == "full",
        "the exact KL to the policy before the update": record["algorithm"]["settings"].get("exact", False),
    }


def read_batch(folder: Path) -> TrainBatch:
    """Read the batch of a dump, with the rows of all processes."""
    values: dict[str, Any] = load_file(folder / BATCH)
    values |= json.loads((folder / FACTS).read_text(encoding="utf-8"))["batch"]
    ragged = {}
    for name in ("prompts", "responses"):
        tokens, lengths = values.pop(f"{name}.tokens"), values.pop(f"{name}.lengths")
        ragged[name] = list(tokens.split(lengths.tolist()))
    return TrainBatch(inputs=TokenInputs(**ragged), **values)


def dumped_algorithm(facts: dict[str, Any]) -> AlgorithmConfig:
    """Rebuild the configuration of the algorithm from the dumped dictionary."""
    config: AlgorithmConfig = _decode_config(facts)
    return config


def _encode_config(value: Any) -> Any:
    if not is_dataclass(value):
        return value
    settings = {item.name: _encode_config(getattr(value, item.name)) for item in fields(value)}
    return {"kind": type(value).__name__, "settings": settings}


def _decode_config(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = vars(algorithm_settings)[value["kind"]]
    return kind(**{name: _decode_config(setting) for name, setting in value["settings"].items()})


def _tensors(batch: TrainBatch) -> dict[str, Tensor]:
    inputs: Any = batch.inputs
    tensors = batch.map_tensors(lambda value: value.detach().cpu().contiguous())
    for name in ("prompts", "responses"):
        rows = [row.cpu() for row in getattr(inputs, name)]
        tensors[f"{name}.tokens"] = torch.cat(rows)
        tensors[f"{name}.lengths"] = torch.tensor([len(row) for row in rows])
    return tensors


def _facts(learner: PPOLearner, error: NonFiniteUpdateError) -> dict[str, Any]:
    config = learner.config
    return {
        "format": FORMAT,
        "message": str(error),
        "rows": error.rows.tolist(),
        "batch": {
            item.name: value
            for item in fields(error.batch)
            if isinstance(value := getattr(error.batch, item.name), int | float)
        },
        "metrics": {name: repr(value) for name, value in error.metrics.items()},  # JSON has no nan
        "algorithm": _encode_config(learner.algorithm_config),
        "update": learner.algorithm.update.state_dict(),
        "reference_kl": loss_kl_estimator(config.kl_penalty, config.kl_placement),
        "minibatch": asdict(learner.config.minibatch()),
        "scoring": {"temperature": config.temperature, "chunk_size": config.logits_chunk_size},
        "gradient_checkpointing": config.gradient_checkpointing,
        "mixed_precision": learner.accelerator.mixed_precision,
        "processes": learner.accelerator.num_processes,
        "is_encoder_decoder": learner.is_encoder_decoder,
        "dtype": str(next(learner.model.parameters()).dtype).removeprefix("torch."),
    }
