"""Find, check and seal the checkpoints of a training run."""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainerCallback

from reward_model.models.contract import TextRule, tokenizer_sha256
from reward_model.models.encoding import EncodedComparisons, fingerprint
from reward_model.training.config import RewardModelConfig
from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.folders import CheckpointError
from rlhf_ppo.checkpoints.lock import HOLDER_FILE, LOCK_FILE, lock_run_folder
from rlhf_ppo.distributed.shutdown import wait_for_gloo_threads
from rlhf_ppo.loop.run_folder import METRICS
from rlhf_ppo.models.fingerprint import weights_fingerprint

logger = logging.getLogger(__name__)

TRAINING = "training.json"
"""Settings and fingerprints of the run, in the folder of the finished model."""
_FIXED = ("seed", "batch_size", "lora_rank", "lora_alpha")
"""Settings without which the position in the data or the weights of a checkpoint mean something else."""
_IGNORED = (
    "model", "output_dir", "overwrite", "resume", "checkpoints", "trackers", "progress", "log_every",
    "micro_batch_size", "packing", "fast_products", "gradient_checkpointing", "trust_remote_code", "merge_adapter",
    "attn_implementation",
)  # fmt: skip
"""Settings that change no weight. The model is compared by its weights."""


def processes() -> PartialState:
    """The processes of this run; without `cpu=True`, accelerate would count only one under torchrun without GPUs."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes > 1:
        wait_for_gloo_threads()
    return state


def training_folder(config: RewardModelConfig) -> Path:
    """Folder of the checkpoints and metrics during training; removed when it has succeeded."""
    output = Path(config.output_dir)
    return output.with_name(output.name + ".training")


def is_resumable(config: RewardModelConfig) -> bool:
    """Whether a run with this output folder has written checkpoints, or has finished."""
    return bool(folders.list_checkpoints(training_folder(config))) or (Path(config.output_dir) / TRAINING).is_file()


def check_output(config: RewardModelConfig) -> None:
    """Raise a FileExistsError if training would replace a model or an interrupted run's checkpoints unasked."""
    output, training = Path(config.output_dir), training_folder(config)
    folders.recover_replaced_folder(output)
    if config.overwrite or config.resume:
        return
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"The folder {output} exists. Choose another output_dir, or set overwrite=True.")
    if checkpoints := folders.list_checkpoints(training):
        raise FileExistsError(
            f"{training} holds {len(checkpoints)} checkpoint(s) of an interrupted run, up to {checkpoints[-1].name}: "
            "starting again would delete them. Set resume=True to continue, overwrite=True to start again, or choose "
            "another output_dir."
        )


def find_checkpoint(config: RewardModelConfig) -> Path:
    """The newest intact checkpoint, or the finished model; chosen by the main process. Names damaged ones.

    Raises:
        FileNotFoundError: There is none.
        CheckpointError: All are damaged.
    """
    choice: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            choice = [_newest_intact(config), None]
        except CheckpointError as error:
            choice = [None, str(error)]
    path, problem = broadcast_object_list(choice)
    if problem is not None:
        raise CheckpointError(problem)
    if path is None:
        folder = training_folder(config)
        raise FileNotFoundError(f"resume=True, but {folder} holds no checkpoint. Start without resume.")
    return Path(path)


def _newest_intact(config: RewardModelConfig) -> Path | None:
    folder, output = training_folder(config), Path(config.output_dir)
    newest = folders.latest_checkpoint(folder)
    for path in folder.glob("checkpoint-*[0-9]"):
        if not (path / folders.MANIFEST).exists():
            logger.warning("%s is left out: it was not written to its end.", path.name)
    return output if newest is None and (output / TRAINING).is_file() else newest


def run_identity(
    config: RewardModelConfig,
    model: Any,
    tokenizer: Any,
    rule: TextRule,
    train: EncodedComparisons,
    evaluation: EncodedComparisons,
) -> dict[str, Any]:
    """Settings of a run, and fingerprints of its data, texts and starting weights; before training and adapters."""
    settings = {name: value for name, value in asdict(config).items() if name not in _IGNORED}
    return {
        "settings": json.loads(json.dumps(settings)),
        "model": {"weights": weights_fingerprint(model.named_parameters()), "tokenizer": tokenizer_sha256(tokenizer)},
        "texts": asdict(rule),
        "train": fingerprint(train.kept),
        "evaluation": fingerprint(evaluation.kept),
    }


def check_resumable(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise a CheckpointError for a checkpoint of other data, model or order, or a finished run of other settings.

    A warning names the other settings that differ from those of the checkpoint.
    """
    file = checkpoint / folders.STATE
    saved = folders.read_json(file if file.is_file() else checkpoint / TRAINING)
    before, now = saved["settings"], identity["settings"]
    changed = {
        name: f"{name}={now[name]!r} (was {before.get(name)!r})" for name in now if now[name] != before.get(name)
    }
    if fixed := [text for name, text in changed.items() if name in _FIXED]:
        raise CheckpointError(
            f"{checkpoint.name} was written with other settings: {', '.join(fixed)}. The run could not continue at its "
            "place in the data, with its weights. Resume with the settings of the first run, or set overwrite=True "
            "instead of resume=True to start again."
        )
    parts = {
        "train": "training comparisons", "evaluation": "held-out comparisons", "model": "a model",
        "texts": "a template, end-of-text rule or max_length",
    }  # fmt: skip
    for part, what in parts.items():
        if saved[part] != identity[part]:
            raise CheckpointError(
                f"{checkpoint.name} was written with {what} other than this run has: what it learned and what it was "
                "measured on would be mixed with something else. Resume with the data and model of the first run, or "
                "set overwrite=True instead of resume=True to start again."
            )
    if changed and not file.is_file():
        raise CheckpointError(
            f"{checkpoint} is a finished run with other settings: {', '.join(changed.values())}. It is not trained "
            "again. Resume with the settings of the first run, set overwrite=True instead of resume=True to start "
            "again, or choose another output_dir."
        )
    if changed:
        warnings.warn(
            f"{checkpoint.name} was written with other settings: {', '.join(changed.values())}. The run uses the new "
            "ones, except for learning_rate and weight_decay, which are those of the saved optimizer.",
            stacklevel=3,
        )


class EarlyStopping(EarlyStoppingCallback):
    """The early stopping of transformers, which a resumed run continues with the count of its checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Read the count that the checkpoint holds; the patience is that of the settings."""
        super().on_train_begin(args, state, control, **options)  # type: ignore[no-untyped-call]
        callbacks = state.stateful_callbacks  # of a checkpoint without early stopping: none
        saved = callbacks.setdefault(type(self).__name__, callbacks.pop("EarlyStoppingCallback", self.state()))
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class SealCheckpoints(TrainerCallback):
    """Adds the identity of the run and a manifest with checksums to each checkpoint that the trainer has written."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint once every process has written its part."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folders.write_json(checkpoint / folders.STATE, self.identity | {"step": state.global_step})
            folders.write_manifest(checkpoint)


@contextmanager
def locked_training_folder(config: RewardModelConfig, checkpoint: Path | None) -> Iterator[Path]:
    """Make and lock the folder of the training, and empty it of what the run does not continue.

    Later checkpoints than the resumed one are unfinished or damaged; transformers would count them as the newest. A run
    that fails leaves its checkpoints and metrics, or no folder at all.

    Args:
        checkpoint: The one that is resumed; None: a new run.
    """
    folder, state = training_folder(config), processes()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _clear(folder, checkpoint)
        state.wait_for_everyone()
        try:
            yield folder
        except BaseException:
            if state.is_main_process and not (folders.list_checkpoints(folder) or (folder / METRICS).is_file()):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _clear(folder: Path, checkpoint: Path | None) -> None:
    for path in folder.iterdir():
        is_ours = path.name in (LOCK_FILE, HOLDER_FILE)
        if checkpoint is not None:
            is_ours |= not path.name.startswith("checkpoint-") or _step(path) <= _step(checkpoint)
        if not is_ours:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
