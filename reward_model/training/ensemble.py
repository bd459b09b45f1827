"""Train the members of an ensemble one after the other, and save them as one reward model."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reward_model.data.comparisons import Comparison
from reward_model.data.rows import OnBadRow
from reward_model.evaluation.scoring import held_out_metrics, score_completions
from reward_model.models.contract import CONTRACT_FILE, Contract
from reward_model.models.encoding import split_encodable
from reward_model.models.ensemble import EnsembleRewardModel, save_ensemble
from reward_model.models.model import RewardModel
from reward_model.training.config import RewardModelConfig
from reward_model.training.resume import is_resumable, processes
from reward_model.training.trainer import RewardModelResult, train_reward_model
from rlhf_ppo.checkpoints.folders import recover_replaced_folder


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
    recover_replaced_folder(output)
    parts = output.with_name(output.name + ".members")
    has_finished = config.resume and not parts.exists() and (output / CONTRACT_FILE).is_file()
    folders = [output / f"member-{i}" if has_finished else parts / str(i) for i in range(members)]
    if has_finished and len(Contract.read(output).members) != members:
        raise ValueError(
            f"resume=True, but {output} is a finished model of {len(Contract.read(output).members)} members, got "
            f"members={members}. Give the same number, choose another output_dir, or set overwrite=True."
        )
    if output.exists() and not (config.overwrite or has_finished or (config.resume and parts.exists())):
        raise FileExistsError(f"The folder {output} exists. Choose another output_dir, or set overwrite=True.")
    if parts.exists() and not (config.overwrite or config.resume):
        raise FileExistsError(
            f"{parts} holds members of an interrupted run: starting again would delete them. Set resume=True to "
            "continue, overwrite=True to start again, or choose another output_dir."
        )
    state.wait_for_everyone()  # before the first process makes a folder
    data: dict[str, Any] = {"train": train, "evaluation": evaluation, "data_report": facts, "on_bad_row": on_bad_row}
    results = []
    for index, folder in enumerate(folders):
        member = replace(config, seed=config.seed + index, output_dir=str(folder))
        if config.resume and not is_resumable(member):  # it has not begun
            member = replace(member, resume=False, overwrite=True)
        results.append(train_reward_model(member, **data))
    if has_finished:
        return replace(results[0], path=output, metrics=Contract.read(output).metrics)
    metrics: dict[str, float] = {}
    if state.is_main_process:
        trust = config.trust_remote_code
        ensemble = EnsembleRewardModel([RewardModel.from_pretrained(path, trust_remote_code=trust) for path in folders])
        first = ensemble.members[0]
        held_out, _ = split_encodable(evaluation, first.tokenizer, first.contract.text, on_bad_row=on_bad_row)
        metrics = held_out_metrics(score_completions(ensemble, held_out))
        save_ensemble(folders, output, metrics)
        shutil.rmtree(parts, ignore_errors=True)
    state.wait_for_everyone()
    return replace(results[0], path=output, metrics=metrics)
