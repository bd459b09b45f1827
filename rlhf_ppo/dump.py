"""A folder with everything that an update needs which was refused: batch, rows, weights, settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ppo.algorithms import AlgorithmConfig
from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.finite import broken_parameters
from rlhf_ppo.updates.nonfinite import NonFiniteUpdateError

if TYPE_CHECKING:
    import rlhf_ppo.trainer

FORMAT = 1
FACTS, BATCH, MODEL = "dump.json", "batch.safetensors", "model"


@contextmanager
def dumping(trainer: "rlhf_ppo.trainer.PPOTrainer") -> Iterator[None]:
    """Inside, an update that gives up leaves a dump; the error names it. All processes enter together."""
    try:
        yield
    except NonFiniteUpdateError as error:
        folder = trainer.dump_dir
        if folder is None:
            said = "For a dump that can be replayed, set `PPOConfig.dump_dir`."
        else:
            path = write_dump(trainer, error, folder)
            said = f"Everything is in {path}; `python -m rlhf_ppo.replay {path}` computes it again."
        broken = broken_parameters(trainer.model)
        if broken:
            said = f"The step before has already broken {', '.join(broken[:3])}: go back to a checkpoint. {said}"
        raise NonFiniteUpdateError(
            f"{error} {said}", batch=error.batch, rows=error.rows, metrics=error.metrics
        ) from error


def write_dump(trainer: "rlhf_ppo.trainer.PPOTrainer", error: NonFiniteUpdateError, folder: Path) -> Path:
    """Write `folder/dump-N`; every process calls it, the main one writes. Whole or absent: aside, then renamed."""
    number = len(list(folder.glob("dump-*")))
    final, aside = folder / f"dump-{number}", folder / f".dump-{number}.partial"
    with trainer.whole_parameters():
        if trainer.accelerator.is_main_process:
            aside.mkdir(parents=True, exist_ok=True)
            trainer.model.save_pretrained(str(aside / MODEL))
            save_file(_tensors(error.batch), aside / BATCH)
            (aside / FACTS).write_text(json.dumps(_facts(trainer, error), indent=2), encoding="utf-8")
            aside.rename(final)
    trainer.accelerator.wait_for_everyone()
    return final


def read_batch(folder: Path) -> TrainBatch:
    """The batch of a dump, the rows of all processes."""
    found = load_file(folder / BATCH)
    ragged = {}
    for name in ("prompts", "responses"):
        tokens, lengths = found.pop(f"{name}.tokens"), found.pop(f"{name}.lengths")
        ragged[name] = list(tokens.split(lengths.tolist()))
    return TrainBatch(inputs=TokenInputs(**ragged), **found)


def algorithm_of(facts: dict[str, Any]) -> AlgorithmConfig:
    """The algorithm's configuration as it was."""
    kinds = {kind.__name__: kind for kind in get_args(AlgorithmConfig)}
    config: AlgorithmConfig = _rebuilt(kinds[facts["name"]], facts["settings"])
    return config


def _rebuilt(kind: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    return kind(
        **{
            item.name: _rebuilt(hints[item.name], values[item.name])
            if is_dataclass(hints[item.name])
            else values[item.name]
            for item in fields(kind)
        }
    )


def _tensors(batch: TrainBatch) -> dict[str, Tensor]:
    inputs: Any = batch.inputs
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    found = {name: value.detach().cpu().contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    for name in ("prompts", "responses"):
        rows = [row.cpu() for row in getattr(inputs, name)]
        found[f"{name}.tokens"] = torch.cat(rows)
        found[f"{name}.lengths"] = torch.tensor([len(row) for row in rows])
    return found


def _facts(trainer: "rlhf_ppo.trainer.PPOTrainer", error: NonFiniteUpdateError) -> dict[str, Any]:
    config = trainer.config
    return {
        "format": FORMAT,
        "message": str(error),
        "rows": error.rows.tolist(),
        "metrics": {name: repr(value) for name, value in error.metrics.items()},  # JSON has no nan
        "algorithm": {"name": type(trainer.algorithm_config).__name__, "settings": asdict(trainer.algorithm_config)},
        "update": trainer.algorithm.update.state_dict(),
        "minibatch": asdict(trainer._minibatch()),
        "scoring": {"temperature": config.temperature, "chunk_size": config.logits_chunk_size},
        "gradient_checkpointing": config.gradient_checkpointing,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "processes": trainer.accelerator.num_processes,
        "is_encoder_decoder": trainer.is_encoder_decoder,
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
    }
