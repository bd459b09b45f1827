"""Load reward models, and combine several into one score."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.models.contract import CONTRACT_FILE, Contract, ContractError
from reward_model.models.model import RewardModel
from reward_model.models.text import Texts
from reward_model.utils.options import ModelOptions
from rlhf_ppo.checkpoints.folders import replace_folder


class EnsembleRewardModel:
    """Scores by the mean over members of their normalized scores, minus `caution` standard deviations over members.

    Every member is normalized to mean 0 and standard deviation 1 on its reference samples, so the scores are on one
    scale. A positive caution penalizes texts that the members disagree on (Coste et al. 2024, eq. 6), which is where
    a policy finds rewards that are not there.
    """

    def __init__(self, members: Sequence[RewardModel], *, caution: float = 0.0) -> None:
        """Combine `members`, each with its own tokenizer and contract.

        Raises:
            ValueError: Fewer than two members, or a negative caution.
        """
        if len(members) < 2:
            raise ValueError(f"An ensemble needs two or more members, got {len(members)}.")
        if caution < 0:
            raise ValueError(f"caution must be >= 0, got {caution}: below 0 it would reward disagreement.")
        self.members = list(members)
        self.caution = caution

    def __call__(
        self, prompts: Texts, responses: Texts, tools: Sequence[Any] | None = None, **_columns: Any
    ) -> list[float]:
        """One score per prompt-response text."""
        if not len(prompts) and not len(responses):
            return []
        return self.combine(torch.tensor(self.member_scores(prompts, responses, tools), dtype=torch.float64)).tolist()

    def combine(self, scores: Float[Tensor, "members samples"]) -> Float[Tensor, " samples"]:
        """Mean over members, minus `caution` standard deviations."""
        return scores.mean(dim=0) - self.caution * scores.std(dim=0)

    def member_scores(self, prompts: Texts, responses: Texts, tools: Sequence[Any] | None = None) -> list[list[float]]:
        """Normalized scores: a list of the samples for each member."""
        return [member(prompts, responses, tools) for member in self.members]


def first_member(model: RewardModel | EnsembleRewardModel) -> RewardModel:
    """The model itself, or the first member of an ensemble."""
    return model.members[0] if isinstance(model, EnsembleRewardModel) else model


def save_ensemble(members: Sequence[Path], output: Path, metrics: dict[str, float]) -> None:
    """Make a folder of the members, `member-0`, `member-1`, ..., with a contract of kind `ensemble`.

    Args:
        members: Folders of trained reward models. They stay; the files of the copies are links to them where the file
            system has links.
        output: The folder to make, atomically; an earlier one is removed when the new one is in its place.
    """
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = tuple(f"member-{index}" for index in range(len(members)))
    first = Contract.read(members[0])
    for name, member in zip(names, members, strict=True):
        shutil.copytree(member, partial / name, copy_function=_link_or_copy)
    replace(first, kind="ensemble", members=names, metrics=metrics).write(partial)
    replace_folder(partial, output)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load_model(options: ModelOptions, *, caution: float = 0.0) -> RewardModel | EnsembleRewardModel:
    """Load the reward model that a command's options name; errors as of `load_reward_model`."""
    trust = options.trust_remote_code
    return load_reward_model(options.model, caution=caution, label=options.label, trust_remote_code=trust)


def load_reward_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    caution: float = 0.0,
    max_tokens: int = 16_384,
    label: str | int | None = None,
    trust_remote_code: bool = False,
) -> RewardModel | EnsembleRewardModel:
    """Load a reward model or an ensemble from a folder, or another maker's reward model.

    Args:
        path: The folder, or a hub name.
        device: Device of the weights; None: the first GPU if there is one.
        caution: Standard deviations over the members that an ensemble's score is lowered by.
        max_tokens: Maximum of padded tokens per forward pass.
        label: As in `RewardModel.from_pretrained`.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ContractError: As `RewardModel.from_pretrained`; also when caution is asked of a single model.
    """
    folder = Path(path)
    options: dict[str, Any] = {"device": device, "max_tokens": max_tokens, "trust_remote_code": trust_remote_code}
    contract = Contract.read(folder) if (folder / CONTRACT_FILE).is_file() else None
    if contract is None or contract.kind == "single":
        if caution:
            raise ContractError(f"{path}: field kind is 'single', so caution={caution} has nothing to compare.")
        return RewardModel.from_pretrained(path, label=label, **options)
    if label is not None:
        raise ContractError(f"{path} is an ensemble, whose contract names its logits: leave label={label!r} out.")
    members = [RewardModel.from_pretrained(folder / name, **options) for name in contract.members]
    return EnsembleRewardModel(members, caution=caution)
