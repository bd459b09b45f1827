"""Train a reward model: load, encode, run trl's trainer, evaluate on held-out comparisons, normalize, save."""

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from trl.trainer.reward_config import RewardConfig

from reward_model.backbone import disable_dropout, head_name, load_backbone, longest_input, short_name
from reward_model.config import RewardModelConfig
from reward_model.contract import Contract, TextRule, tokenizer_sha256
from reward_model.data import Comparison, Row, as_comparisons
from reward_model.encoding import (
    ComparisonCollator,
    EncodedComparisons,
    encode_comparisons,
    fill_last_step,
    fingerprint,
)
from reward_model.model import RewardModel
from reward_model.preference_trainer import PreferenceTrainer
from reward_model.progress import ProgressBarCallback
from reward_model.rows import OnBadRow
from reward_model.scoring import fit_normalization, held_out_metrics, score_completions
from reward_model.text import Text, prepare_tokenizer
from rlhf_ppo.distributed.shutdown import wait_for_gloo_threads
from rlhf_ppo.utils.installed import parameter_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardModelResult:
    """A trained reward model: its folder and the held-out metrics."""

    path: Path
    metrics: dict[str, float]
    data: dict[str, Any] = field(default_factory=dict)
    """Counts of the data, as in the contract."""
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    """Comparisons that could not be encoded and were skipped: location, reason, content."""


def train_reward_model(
    config: RewardModelConfig,
    *,
    train: Iterable[Row | Comparison],
    evaluation: Iterable[Row | Comparison],
    reference_samples: Sequence[tuple[Text, Text]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    data_report: dict[str, Any] | None = None,
    on_bad_row: OnBadRow = "stop",
) -> RewardModelResult:
    """Train, evaluate, normalize and save a reward model.

    Args:
        config: The settings.
        train: A `datasets.Dataset` or rows in a format of `reward_model.data`, or comparisons.
        evaluation: Held-out comparisons, in the same formats.
        reference_samples: Prompt-response pairs of the reference policy, whose scores are normalized to mean 0 and
            standard deviation 1; None: the held-out completions.
        callbacks: Callbacks of transformers.Trainer.
        data_report: Counts from loading the data, saved in the contract.
        on_bad_row: Whether a comparison that the chat template refuses raises or is set aside, in `bad_rows`.

    Returns:
        The folder and the held-out metrics.

    Raises:
        ValueError: Settings, model or data are unusable; nothing has been written then.
        FileExistsError: The output folder exists and `overwrite` is off.
    """
    output = Path(config.output_dir)
    if output.exists() and any(output.iterdir()) and not (config.overwrite or config.resume):
        raise FileExistsError(f"The folder {output} exists. Choose another output_dir, or set overwrite=True.")
    checkpoint = _checkpoint(config)
    train_rows, held_out = as_comparisons(train, "train"), as_comparisons(evaluation, "evaluation")
    model, tokenizer = load_backbone(config.model, seed=config.seed, trust_remote_code=config.trust_remote_code)
    rule = _text_rule(config, tokenizer, model, train_rows)
    prepare_tokenizer(tokenizer, rule, source=config.model)
    disable_dropout(model)
    head = head_name(model)  # before adapters wrap it
    encoded = encode_comparisons(train_rows, tokenizer, rule, on_bad_row=on_bad_row)
    encoded_held_out = encode_comparisons(held_out, tokenizer, rule, on_bad_row=on_bad_row)
    try:
        trainer = _build_trainer(config, model, tokenizer, encoded, encoded_held_out, callbacks)
        _run(trainer, checkpoint)
    except BaseException:
        with suppress(OSError):
            training_folder(config).rmdir()  # stays if it holds checkpoints
        raise
    contract = Contract(
        base=short_name(config.model),
        head=head,
        text=rule,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        data=_data_facts(encoded, encoded_held_out, data_report),
        versions={name: version(name) for name in ("torch", "transformers", "trl", "accelerate")},
    )
    result = _finish(trainer, config, contract, encoded_held_out.kept, reference_samples)
    return replace(result, data=contract.data, bad_rows=[*encoded.bad_rows, *encoded_held_out.bad_rows])


def _text_rule(config: RewardModelConfig, tokenizer: Any, model: Any, rows: Sequence[Comparison]) -> TextRule:
    chats = any(not isinstance(row.completions[0], str) for row in rows)
    template = config.template if config.template != "auto" else "chat" if chats else "plain"
    eos = config.append_eos
    if eos is None:  # a chat template closes its turns itself
        eos = template == "plain" and tokenizer.eos_token_id is not None
    limit = longest_input(model)
    return TextRule(template=template, append_eos=eos, max_length=min(config.max_length, limit or config.max_length))


def _build_trainer(
    config: RewardModelConfig,
    model: Any,
    tokenizer: Any,
    train: EncodedComparisons,
    evaluation: EncodedComparisons,
    callbacks: Sequence[TrainerCallback],
) -> PreferenceTrainer:
    stop = [EarlyStoppingCallback(config.early_stop_patience)] if config.early_stop_patience else []
    peft_config = None
    if config.lora_rank:
        from reward_model.lora import lora_config

        peft_config = lora_config(model, rank=config.lora_rank, alpha=config.lora_alpha)
    trainer = PreferenceTrainer(
        settings=config,
        has_ties=any(row.is_tie for row in train.kept),
        model=model,
        args=_arguments(config, len(train.kept)),
        train_dataset=fill_last_step(train.dataset, config.batch_size),
        eval_dataset=evaluation.dataset,
        processing_class=tokenizer,
        data_collator=ComparisonCollator(pad_token_id=tokenizer.pad_token_id),
        callbacks=[*stop, *callbacks],
        peft_config=peft_config,
    )
    for callback in (ProgressCallback, PrinterCallback):  # one of them is set, and prints dicts
        trainer.remove_callback(callback)
    if config.progress:
        trainer.add_callback(ProgressBarCallback)
    return trainer


def _arguments(config: RewardModelConfig, rows: int) -> RewardConfig:
    """Convert the settings to trl's `RewardConfig`."""
    micro, accumulation = config.accumulation(processes().num_processes)
    steps = max(1, int(-(-rows // config.batch_size) * config.epochs))
    evaluate = max(1, steps // config.evaluations) if config.evaluations > 1 else None
    save = max(1, steps // config.checkpoints) if config.checkpoints else None
    if config.early_stop_patience:
        save = evaluate
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    recompute = parameter_name(RewardConfig, "activation_checkpointing", "gradient_checkpointing")  # transformers 5.23
    versioned: dict[str, Any] = {recompute: config.gradient_checkpointing}
    return RewardConfig(
        output_dir=str(training_folder(config)),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=int(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16 if config.precision == "auto" else config.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        max_length=None,  # encode_comparisons has filtered and counted
        remove_unused_columns=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=evaluate,
        save_strategy="steps" if save else "no",
        save_steps=save or 500,
        save_total_limit=2,
        load_best_model_at_end=config.early_stop_patience > 0,
        metric_for_best_model="accuracy",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=not config.progress,
        report_to=[name.strip() for name in config.trackers.split(",")],
        dataloader_pin_memory=torch.cuda.is_available(),
        **versioned,
    )


def processes() -> PartialState:
    """The processes of this run; without `cpu=True`, accelerate would count only one under torchrun without GPUs."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes > 1:
        wait_for_gloo_threads()
    return state


def training_folder(config: RewardModelConfig) -> Path:
    """Folder of the checkpoints during training; removed when it has succeeded."""
    output = Path(config.output_dir)
    return output.with_name(output.name + ".training")


def newest_checkpoint(config: RewardModelConfig) -> Path | None:
    """The newest whole checkpoint of an interrupted run; the trainer writes its state last."""
    found = {int(path.name.rpartition("-")[2]): path for path in training_folder(config).glob("checkpoint-*[0-9]")}
    return next((found[step] for step in sorted(found, reverse=True) if _is_whole(found[step])), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _checkpoint(config: RewardModelConfig) -> str | None:
    if not config.resume:
        return None
    checkpoint = newest_checkpoint(config)
    if checkpoint is None:
        folder = training_folder(config)
        raise FileNotFoundError(f"resume=True, but {folder} holds no checkpoint. Start without resume.")
    return str(checkpoint)


def _run(trainer: PreferenceTrainer, checkpoint: str | None) -> None:
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if not result.training_loss < float("inf"):
        raise ValueError(
            f"The training loss is {result.training_loss}: the weights are unusable and nothing was saved. Lower "
            "learning_rate or use precision='float32'."
        )


def _data_facts(
    train: EncodedComparisons, evaluation: EncodedComparisons, report: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint(train.kept),
        "train": len(train.kept),
        "train_too_long": train.too_long,
        "train_not_encodable": len(train.bad_rows),
        "evaluation": len(evaluation.kept),
        "evaluation_too_long": evaluation.too_long,
        "evaluation_not_encodable": len(evaluation.bad_rows),
        **(report or {}),
    }


def _finish(
    trainer: PreferenceTrainer,
    config: RewardModelConfig,
    contract: Contract,
    held_out: Sequence[Comparison],
    reference_samples: Sequence[tuple[Text, Text]] | None,
) -> RewardModelResult:
    """Evaluate, normalize and save on the main process, atomically."""
    output = Path(config.output_dir)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    metrics: dict[str, float] = {}
    if trainer.accelerator.is_main_process:
        from reward_model.lora import plain_model

        classifier, saved = plain_model(trained, merge=config.merge_adapter)
        reward_model = RewardModel(classifier, trainer.processing_class, contract)
        scored = score_completions(reward_model, held_out)
        metrics = held_out_metrics(scored)
        raw, reference = scored.raw[0].tolist(), "evaluation"
        if reference_samples:
            prompts, responses = zip(*reference_samples, strict=True)
            raw, reference = reward_model.raw_scores(prompts, responses), "reference policy"
        contract = replace(contract, metrics=metrics, normalization=fit_normalization(raw, reference))
        _save(saved, trainer.processing_class, contract, output)
        shutil.rmtree(training_folder(config), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return RewardModelResult(path=output, metrics=metrics or Contract.read(output).metrics)


def _save(model: Any, tokenizer: Any, contract: Contract, output: Path) -> None:
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    contract.write(partial)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
