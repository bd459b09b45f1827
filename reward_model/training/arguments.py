"""Convert the settings to trl's `RewardConfig` and PEFT's `LoraConfig`, and check the learning-rate schedule early."""

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, TaskType
from torch import nn
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.pytorch_utils import Conv1D
from trl.trainer.reward_config import RewardConfig

from reward_model.models.backbone import head_name
from reward_model.training.config import RewardModelConfig
from reward_model.training.resume import processes, training_folder
from rlhf_ppo.models.precision import has_bfloat16
from rlhf_ppo.utils.installed import accepts_argument, parameter_name

_FOLLOW_ACCURACY = ("reduce_lr_on_plateau", "greedy")
"""Schedules that take a metric at each evaluation instead of a step: the held-out accuracy."""


def follows_accuracy(config: RewardModelConfig) -> bool:
    """Whether training reads the held-out accuracy: to stop early, or in its schedule."""
    return config.early_stop_patience > 0 or config.schedule in _FOLLOW_ACCURACY


def schedule_arguments(config: RewardModelConfig) -> dict[str, Any]:
    """`["num_cycles=2"]` as `{"num_cycles": 2}`; values are JSON or else text; a ValueError for other entries."""
    found: dict[str, Any] = {"mode": "max"} if config.schedule in _FOLLOW_ACCURACY else {}
    for entry in config.schedule_arguments:
        name, equals, value = entry.partition("=")
        if not (name and equals):
            raise ValueError(f"schedule_arguments takes name=value, such as num_cycles=2, got {entry!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def check_schedule(config: RewardModelConfig) -> None:
    """Build the schedule of the settings once, so that its ValueError comes before training."""
    builders: dict[str, Any] = {name.value: build for name, build in TYPE_TO_SCHEDULER_FUNCTION.items()}
    if config.schedule not in builders:
        raise ValueError(f"schedule must be of {', '.join(sorted(builders))}, got {config.schedule!r}.")
    if config.schedule in _FOLLOW_ACCURACY and config.evaluations < 2:
        raise ValueError(
            f"schedule={config.schedule} follows the held-out accuracy, but evaluations={config.evaluations}: the rate "
            "would never change. Set evaluations to 5 or more."
        )
    arguments = schedule_arguments(config)
    try:
        unknown = [name for name in arguments if not accepts_argument(builders[config.schedule], name)]
        if unknown and config.schedule not in _FOLLOW_ACCURACY:  # those take any
            raise ValueError(f"it takes no {', '.join(unknown)}")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
        get_scheduler(
            config.schedule,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=1_000_000,
            scheduler_specific_kwargs=arguments,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"schedule={config.schedule} cannot be built with schedule_arguments={config.schedule_arguments}: {error}. "
            "The arguments are those of transformers' function of this name."
        ) from error


def trainer_arguments(config: RewardModelConfig, rows: int) -> RewardConfig:
    """Convert the settings to trl's `RewardConfig`."""
    micro, accumulation = config.accumulation(processes().num_processes)
    bf16 = has_bfloat16()
    recompute = parameter_name(RewardConfig, "activation_checkpointing", "gradient_checkpointing")  # transformers 5.23
    versioned: dict[str, Any] = {recompute: config.gradient_checkpointing}
    return RewardConfig(
        output_dir=str(training_folder(config)),
        run_name=training_folder(config).stem,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        lr_scheduler_kwargs=schedule_arguments(config),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16 if config.precision == "auto" else config.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        max_length=None,  # encode_comparisons has filtered and counted
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        disable_tqdm=not config.progress,
        report_to="none",  # training.tracking has made the callbacks
        dataloader_pin_memory=torch.cuda.is_available(),
        **_step_counts(config, rows),
        **versioned,
    )


def check_placement(accelerator: Accelerator) -> None:
    """Raise a ValueError if every process would hold a part of each weight: the first one measures and saves alone."""
    engine = accelerator.state.deepspeed_plugin
    has_zero3 = engine is not None and engine.zero_stage == 3
    if has_zero3 or accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            f"expected whole weights on each process, got {'ZeRO-3' if has_zero3 else 'FSDP'}: after training, the "
            "first process measures and saves the reward model alone, and would wait for the others' parts forever. "
            "Launch with recipes/launch/ddp.yaml; lora_rank, gradient_checkpointing and smaller micro-batches save "
            "memory."
        )


def lora_config(model: Any, *, rank: int, alpha: int, missing: Iterable[str] = ()) -> LoraConfig:
    """LoRA configuration: adapters on the backbone's linear layers; what is above it is fully trained and saved.

    Args:
        alpha: Their scale is alpha / rank.
        missing: Weights that the base's files lack, such as a pooler's. Their layers are fully trained and saved, too.
    """
    head = head_name(model).removesuffix(".weight").split(".")[0]
    # DistilBERT's `pre_classifier` is as new as the head, and PEFT takes it for one by the end of its name.
    above = [name for name, part in model.named_children() if isinstance(part, nn.Linear)]
    layers = sorted({name.rpartition(".")[0] for name in missing})
    new = [name for name in layers if name.split(".")[0] != head and not list(model.get_submodule(name).children())]
    saved = list(dict.fromkeys([head, *above, *new]))
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights are transposed
        modules_to_save=saved,
        exclude_modules=[name for name in saved if name != head] or None,  # PEFT leaves out the head by itself
    )


def _step_counts(config: RewardModelConfig, rows: int) -> dict[str, Any]:
    """Steps of the warm-up, and between two evaluations, checkpoints and logs."""
    steps = max(1, math.ceil(-(-rows // config.batch_size) * config.epochs))
    warmup = int(config.warmup * steps)
    evaluate = max(1, steps // config.evaluations) if config.evaluations > 1 else None
    save = max(1, steps // config.checkpoints) if config.checkpoints else None
    if config.early_stop_patience:
        save = evaluate
    return {
        "warmup_steps": warmup and warmup + 1,  # PreferenceTrainer's schedule is one step ahead
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": evaluate,
        "save_strategy": "steps" if save else "no",
        "save_steps": save or 500,
        "save_total_limit": 3 if config.early_stop_patience else 2,  # the newest two, and the best
        "load_best_model_at_end": config.early_stop_patience > 0,
        "metric_for_best_model": "accuracy" if follows_accuracy(config) else None,
        "logging_steps": config.log_every,
    }
