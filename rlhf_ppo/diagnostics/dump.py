"""A folder with everything that an update needs which was refused: batch, rows, weights, settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ppo.algorithms import AlgorithmConfig
from rlhf_ppo.algorithms import config as algorithm_settings
from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.learner.finite_checks import broken_parameters
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.updates.nonfinite import NonFiniteUpdateError

FORMAT = 1
FACTS, BATCH, MODEL = "dump.json", "batch.safetensors", "model"


@contextmanager
def dump_on_failure(learner: PPOLearner) -> Iterator[None]:
    """Inside, an update that gives up leaves a dump; the error names it. All processes enter together."""
    try:
        yield
    except NonFiniteUpdateError as error:
        folder = learner.dump_dir
        if folder is None:
            said = "For a dump that can be replayed, set `PPOConfig.dump_dir`."
        else:
            path = write_dump(learner, error, folder)
            said = f"Everything is in {path}; `python -m rlhf_ppo.replay {path}` computes it again."
        broken = broken_parameters(learner.model)
        if broken:
            said = f"The step before has already broken {', '.join(broken[:3])}: go back to a checkpoint. {said}"
        raise NonFiniteUpdateError(
            f"{error} {said}", batch=error.batch, rows=error.rows, metrics=error.metrics
        ) from error


def write_dump(learner: PPOLearner, error: NonFiniteUpdateError, folder: Path) -> Path:
    """Write `folder/dump-N`; every process calls it, the main one writes. Whole or absent: aside, then renamed."""
    number = len(list(folder.glob("dump-*")))
    final, aside = folder / f"dump-{number}", folder / f".dump-{number}.partial"
    with learner.gathered_state_dict() as state:
        if learner.accelerator.is_main_process:
            aside.mkdir(parents=True, exist_ok=True)
            learner.model.save_pretrained(str(aside / MODEL), state_dict=state)
            save_file(_tensors(error.batch), aside / BATCH)
            (aside / FACTS).write_text(json.dumps(_facts(learner, error), indent=2), encoding="utf-8")
            aside.rename(final)
    learner.accelerator.wait_for_everyone()
    return final


def read_batch(folder: Path) -> TrainBatch:
    """The batch of a dump, the rows of all processes."""
    found: dict[str, Any] = load_file(folder / BATCH)
    found |= json.loads((folder / FACTS).read_text(encoding="utf-8"))["batch"]
    ragged = {}
    for name in ("prompts", "responses"):
        tokens, lengths = found.pop(f"{name}.tokens"), found.pop(f"{name}.lengths")
        ragged[name] = list(tokens.split(lengths.tolist()))
    return TrainBatch(inputs=TokenInputs(**ragged), **found)


def dumped_algorithm(facts: dict[str, Any]) -> AlgorithmConfig:
    """The algorithm's configuration as it was."""
    found: AlgorithmConfig = _decoded(facts)
    return found


def _encoded(value: Any) -> Any:
    if not is_dataclass(value):
        return value
    settings = {item.name: _encoded(getattr(value, item.name)) for item in fields(value)}
    return {"kind": type(value).__name__, "settings": settings}


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = vars(algorithm_settings)[value["kind"]]
    return kind(**{name: _decoded(setting) for name, setting in value["settings"].items()})


def _tensors(batch: TrainBatch) -> dict[str, Tensor]:
    inputs: Any = batch.inputs
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    found = {name: value.detach().cpu().contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    for name in ("prompts", "responses"):
        rows = [row.cpu() for row in getattr(inputs, name)]
        found[f"{name}.tokens"] = torch.cat(rows)
        found[f"{name}.lengths"] = torch.tensor([len(row) for row in rows])
    return found


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
        "algorithm": _encoded(learner.algorithm_config),
        "update": learner.algorithm.update.state_dict(),
        "minibatch": asdict(learner.config.minibatch()),
        "scoring": {"temperature": config.temperature, "chunk_size": config.logits_chunk_size},
        "gradient_checkpointing": config.gradient_checkpointing,
        "mixed_precision": learner.accelerator.mixed_precision,
        "processes": learner.accelerator.num_processes,
        "is_encoder_decoder": learner.is_encoder_decoder,
        "dtype": str(next(learner.model.parameters()).dtype).removeprefix("torch."),
    }
