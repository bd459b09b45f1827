"""Train a reward model: load, encode, run trl's trainer, evaluate, normalize and save."""

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from reward_model.data.comparisons import Comparison, Row, as_comparisons
from reward_model.data.rows import OnBadRow
from reward_model.evaluation.scoring import fit_normalization, held_out_metrics, score_completions
from reward_model.models.adoption import can_be_padded
from reward_model.models.backbone import head_name, load_backbone, short_name
from reward_model.models.contract import Contract, TextRule, tokenizer_sha256
from reward_model.models.encoding import (
    ComparisonCollator,
    EncodedComparisons,
    encode_comparisons,
    fill_last_step,
    fingerprint,
)
from reward_model.models.model import RewardModel
from reward_model.models.text import prepare_tokenizer
from reward_model.training.arguments import (
    check_placement,
    check_schedule,
    follows_accuracy,
    lora_config,
    trainer_arguments,
)
from reward_model.training.config import RewardModelConfig
from reward_model.training.preference_trainer import PreferenceTrainer
from reward_model.training.resume import (
    TRAINING,
    EarlyStopping,
    SealCheckpoints,
    check_output,
    check_resumable,
    find_checkpoint,
    locked_training_folder,
    processes,
    run_identity,
    training_folder,
)
from reward_model.training.tracking import (
    RECORDS,
    MetricsFileCallback,
    ProgressBarCallback,
    tracker_callbacks,
    tracker_names,
)
from rlhf_ppo.chat.messages import Text
from rlhf_ppo.checkpoints import folders
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.trunk import learned_positions

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
        ValueError: Settings, model or data are unusable, or a checkpoint is not of this run; nothing has been written.
        ImportError: A tracker is not installed.
        FileExistsError: The output folder exists, or checkpoints of an interrupted run, and `overwrite` is off.
        FileNotFoundError: There is nothing to resume.
    """
    check_output(config)
    check_schedule(config)
    trackers = tracker_names(config.trackers)
    checkpoint = find_checkpoint(config) if config.resume else None
    train_rows, held_out = as_comparisons(train, "train"), as_comparisons(evaluation, "evaluation")
    model, tokenizer, missing = load_backbone(
        config.model,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    rule = _text_rule(config, tokenizer, model, train_rows)
    prepare_tokenizer(tokenizer, rule, source=config.model)
    disable_dropout(model)
    encoded = encode_comparisons(train_rows, tokenizer, rule, on_bad_row=on_bad_row)
    encoded_held_out = encode_comparisons(held_out, tokenizer, rule, on_bad_row=on_bad_row)
    bad_rows = [*encoded.bad_rows, *encoded_held_out.bad_rows]
    _check_decided(config, encoded_held_out)
    identity = run_identity(config, model, tokenizer, rule, encoded, encoded_held_out)
    if checkpoint is not None:
        check_resumable(checkpoint, identity)
        if checkpoint == Path(config.output_dir):  # it has finished
            saved = Contract.read(checkpoint)
            return RewardModelResult(path=checkpoint, metrics=saved.metrics, data=saved.data, bad_rows=bad_rows)
    contract = Contract(
        base=short_name(config.model),
        head=head_name(model),  # before adapters wrap it
        text=rule,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        data=_data_facts(encoded, encoded_held_out, data_report),
        versions={name: version(name) for name in ("torch", "transformers", "trl", "accelerate")},
    )
    with locked_training_folder(config, checkpoint) as folder:
        records = [MetricsFileCallback(folder), SealCheckpoints(identity)]
        if processes().is_main_process:
            records += tracker_callbacks(trackers, folder, checkpoint)
        trainer = _build_trainer(config, model, tokenizer, encoded, encoded_held_out, [*records, *callbacks], missing)
        _run(trainer, checkpoint)
        result = _finish(trainer, config, contract, identity, encoded_held_out.kept, reference_samples)
    return replace(result, data=contract.data, bad_rows=bad_rows)


def _text_rule(config: RewardModelConfig, tokenizer: Any, model: Any, rows: Sequence[Comparison]) -> TextRule:
    chats = any(not isinstance(row.completions[0], str) for row in rows)
    template = config.template if config.template != "auto" else "chat" if chats else "plain"
    eos = config.append_eos
    if eos is None:  # a chat template closes its turns itself
        eos = template == "plain" and tokenizer.eos_token_id is not None
    limit = learned_positions(model)
    return TextRule(template=template, append_eos=eos, max_length=min(config.max_length, limit or config.max_length))


def _build_trainer(
    config: RewardModelConfig,
    model: Any,
    tokenizer: Any,
    train: EncodedComparisons,
    evaluation: EncodedComparisons,
    callbacks: Sequence[TrainerCallback],
    missing: set[str],
) -> PreferenceTrainer:
    stop = [EarlyStopping(config.early_stop_patience)] if config.early_stop_patience else []
    peft_config = None
    if config.lora_rank:
        peft_config = lora_config(model, rank=config.lora_rank, alpha=config.lora_alpha, missing=missing)
    trainer = PreferenceTrainer(
        settings=config,
        has_ties=any(row.is_tie for row in train.kept),
        model=model,
        args=trainer_arguments(config, len(train.kept)),
        train_dataset=fill_last_step(train.dataset, config.batch_size),
        eval_dataset=evaluation.dataset,
        processing_class=tokenizer,
        data_collator=ComparisonCollator(pad_token_id=tokenizer.pad_token_id),
        callbacks=[*stop, *callbacks],
        peft_config=peft_config,
    )
    check_placement(trainer.accelerator)
    for callback in (ProgressCallback, PrinterCallback):  # one of them is set, and prints dicts
        trainer.remove_callback(callback)
    if config.progress:
        trainer.add_callback(ProgressBarCallback)
    return trainer


def _run(trainer: PreferenceTrainer, checkpoint: Path | None) -> None:
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not result.training_loss < float("inf"):
        raise ValueError(
            f"The training loss is {result.training_loss}: the weights are unusable and nothing was saved. Lower "
            "learning_rate or use precision='float32'."
        )


def _check_decided(config: RewardModelConfig, evaluation: EncodedComparisons) -> None:
    if follows_accuracy(config) and not any(comparison.is_decided for comparison in evaluation.kept):
        raise ValueError(
            f"early_stop_patience={config.early_stop_patience} and schedule={config.schedule} watch the held-out "
            f"accuracy, but none of the {len(evaluation.kept)} held-out comparisons is decided: all are ties or have a "
            "preference of 0.5. Hold out others, or set early_stop_patience=0 and another schedule."
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
    identity: dict[str, Any],
    held_out: Sequence[Comparison],
    reference_samples: Sequence[tuple[Text, Text]] | None,
) -> RewardModelResult:
    """Evaluate, normalize and save on the main process, atomically."""
    output = Path(config.output_dir)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if (forward := vars(trained).pop("_original_forward", None)) is not None:
        trained.forward = forward  # accelerate's computes in bfloat16; what is measured is what is saved
    metrics: dict[str, float] = {}
    if trainer.accelerator.is_main_process:
        if isinstance(trained, PeftModel) and config.merge_adapter:
            trained = trained.merge_and_unload()
        tokenizer: Any = trainer.processing_class
        limit = {} if can_be_padded(trained.eval(), tokenizer) else {"max_tokens": 1}  # as it will be loaded
        reward_model = RewardModel(trained, tokenizer, contract, **limit)
        scored = score_completions(reward_model, held_out)
        metrics = held_out_metrics(scored)
        raw, reference = scored.raw[0].tolist(), "evaluation"
        if reference_samples:
            prompts, responses = zip(*reference_samples, strict=True)
            raw, reference = reward_model.raw_scores(prompts, responses), "reference policy"
        contract = replace(contract, metrics=metrics, normalization=fit_normalization(raw, reference))
        _save(trained, trainer.processing_class, contract, identity, config)
        shutil.rmtree(training_folder(config), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return RewardModelResult(path=output, metrics=metrics or Contract.read(output).metrics)


def _save(model: Any, tokenizer: Any, contract: Contract, identity: dict[str, Any], config: RewardModelConfig) -> None:
    output = Path(config.output_dir)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    contract.write(partial)
    folders.write_json(partial / TRAINING, identity)
    for name in RECORDS:
        if (record := training_folder(config) / name).exists():
            shutil.move(record, partial / name)
    folders.replace_folder(partial, output)
