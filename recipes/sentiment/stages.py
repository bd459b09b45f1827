"""The stages of the sentiment recipe around PPO: settings by model, reward model, judges, evaluation, run folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.checkpoints.folders import list_checkpoints
from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.loop.run_folder import Estimates, RunFolder, Sample
from rlhf_ppo.report import write_report
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.utils.redaction import redacted

from .algorithms import CHOICES as CHOICES
from .algorithms import AlgorithmName as AlgorithmName
from .command_line import Phases as Phases
from .command_line import ending as ending
from .command_line import is_main_process
from .command_line import run as run
from .judges import ReviewClassifier, VaderJudge, distinct_ngrams, repetition
from .language_models import SMALL_GPT2, SMOLLM2_135M, load_language_model
from .published import PresetName as PresetName
from .published import adam_settings as adam_settings
from .published import flags
from .published import further as further
from .published import published_run as published_run
from .resumable_evaluation import CHUNKS_FOLDER, IRRELEVANT_SETTINGS, remove_chunks
from .resumable_evaluation import ResumableEvaluation as ResumableEvaluation
from .reviews import ReviewParts, prompt_texts
from .rewards import TRAIN_REWARD_MODEL as TRAIN_REWARD_MODEL
from .rewards import check_reward_source as check_reward_source
from .rewards import reward_source as reward_source


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What suits a model; the command line overrides each."""

    iterations: int
    batch_size: int
    mini_batch_size: int
    learning_rate: float
    kl_coef: float
    kl_target: float
    kl_horizon: float = 2000.0
    ppo_epochs: int = 2
    vf_coef: float = 0.5
    score_clip: float = 3.0
    lora_rank: int = 0
    bfloat16: bool = False
    group_size: int = 1

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "mini_batch_size", "ppo_epochs", "group_size"):
            at_least(self, **{name: 1})
        for name in ("learning_rate", "kl_target", "kl_horizon", "score_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        at_least(self, kl_coef=0, vf_coef=0, lora_rank=0)
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of mini_batch_size {self.mini_batch_size}: a rest would "
                "be dropped. Choose --batch-size and --mini-batch-size that divide"
            )


def at_least(settings: object, **least: float) -> None:
    """Refuse settings that are below these.

    Raises:
        ValueError: Naming the first one.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")


def preset(model: str) -> Preset:
    """Settings for an embedded model; for any other those of the classic sentiment example."""
    if model == SMALL_GPT2:
        return Preset(
            iterations=50, batch_size=128, mini_batch_size=32, learning_rate=3e-4, kl_coef=0.06, kl_target=11.0
        )
    if model == SMOLLM2_135M:
        return Preset(
            iterations=40, batch_size=64, mini_batch_size=16, learning_rate=4e-4, kl_coef=0.04, kl_target=14.0,
            lora_rank=16, bfloat16=True,
        )  # fmt: skip
    return Preset(
        iterations=100,
        batch_size=128,
        mini_batch_size=128,
        learning_rate=1.41e-5,
        kl_coef=0.2,
        kl_target=6.0,
        kl_horizon=10_000.0,
        ppo_epochs=4,
    )


def chosen(model: str, wishes: Any, algorithm: AlgorithmName = "ppo-clip") -> Preset:
    """The preset of `model`, what algorithm and `--preset` change in it, and the wishes: fields that are not None."""
    known = replace(preset(model), **CHOICES[algorithm].changes | flags(getattr(wishes, "preset", None)))
    named = {item.name: getattr(wishes, item.name) for item in fields(Preset)}
    return replace(known, **{name: value for name, value in named.items() if value is not None})


def open_run_folder(path: str, settings: dict[str, Any], *, fresh: bool) -> RunFolder:
    """The run folder with its `config.json`.

    Raises:
        ValueError: If it cannot be made, or holds a run of other settings, which a resumed run would be mixed with.
    """
    try:
        folder = RunFolder.create(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be a run folder ({error.strerror}): choose another --output-dir") from error
    if not fresh:
        _refuse_other_settings(folder, settings)
    if is_main_process():
        if fresh:
            for old in folder.path.glob("checkpoint-*"):
                shutil.rmtree(old)
            shutil.rmtree(folder.path / CHUNKS_FOLDER, ignore_errors=True)
            folder.resume_from(0)
        folder.write_config(settings)
    return folder


def _refuse_other_settings(folder: RunFolder, settings: dict[str, Any]) -> None:
    relevant = settings.keys() - IRRELEVANT_SETTINGS
    known = {name: value for name, value in folder.config().items() if name in relevant}
    changed = {name: value for name, value in known.items() if value != redacted(settings[name], name)}
    if changed and list_checkpoints(folder.path):
        was = ", ".join(f"{name}={value!r} (now {settings[name]!r})" for name, value in changed.items())
        raise ValueError(
            f"{folder.path} holds a run with {was}: choose another --output-dir, or --fresh to begin again"
        )


def precision(algorithm: AlgorithmName = "ppo-clip") -> dict[str, str]:
    """bfloat16 arithmetic where the processor computes in it, for `Accelerator`; weights stay in their own type."""
    if CHOICES[algorithm].in_float32:
        return {}
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool(torch.cpu._is_avx512_bf16_supported())
    return {"mixed_precision": "bf16"} if fast else {}


def load_policy(
    name: str, chosen: Preset, quantization: BitsAndBytesConfig | None = None
) -> tuple[AutoModelForCausalLMWithValueHead, PreTrainedTokenizerBase]:
    """The policy with its value head at zero, under LoRA adapters if asked for, and its tokenizer."""
    dtype = torch.bfloat16 if chosen.bfloat16 else torch.float32
    model, tokenizer = load_language_model(name, dtype=dtype, quantization=quantization)
    adapters = None
    if rank := chosen.lora_rank:
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=adapters)
    torch.nn.init.zeros_(policy.v_head.summary.weight)  # V = 0 until something is known (Ziegler et al. 2019)
    torch.nn.init.zeros_(policy.v_head.summary.bias)
    return policy, tokenizer


def judges(parts: ReviewParts) -> tuple[dict[str, Callable[..., list[float]]], str]:
    """VADER and a classifier trained on disjoint reviews; neither takes part in training. And a line about them."""
    vader, classifier = VaderJudge(), ReviewClassifier.train(parts.judge)

    def of_texts(judge: Callable[[Sequence[str]], list[float]]) -> Callable[..., list[float]]:
        def source(prompts: Sequence[str], responses: Sequence[str], **_columns: Any) -> list[float]:
            return judge([prompt + response for prompt, response in zip(prompts, responses, strict=True)])

        return source

    line = f"second classifier: accuracy {classifier.accuracy(parts.evaluation)} on held-out excerpts"
    return {"vader": of_texts(vader), "classifier": of_texts(classifier)}, line


def prompt_sets(
    parts: ReviewParts, tokenizer: PreTrainedTokenizerBase, *, held_out: int
) -> tuple[PromptDataset, PromptDataset]:
    """Prompts to train on and `held_out` prompts to evaluate on: first words of reviews that nothing else has seen."""
    evaluation = prompt_texts(parts.evaluation)[:held_out]
    training = prompt_texts(parts.prompts, exclude=evaluation)
    if len(evaluation) < held_out or not training:
        raise ValueError(
            f"the reviews give {len(evaluation)} held-out and {len(training)} training prompts, {held_out} held-out "
            "ones were asked for: lower --eval-prompts or give more reviews"
        )
    first, second = (PromptDataset(Dataset.from_dict({"prompt": texts}), tokenizer) for texts in (training, evaluation))
    return first, second


def estimates(found: Evaluation) -> Estimates:
    """Mean and standard error of every measure, with distinct-n, repetition and perplexity."""
    table = {name: (value["mean"], value["stderr"]) for name, value in found.summary().items()}
    nll, error = table.pop("reference_nll")
    table["perplexity"] = (math.exp(nll), math.exp(nll) * error)
    for name, measured in {
        "distinct_1": distinct_ngrams(found.responses, 1),
        "distinct_2": distinct_ngrams(found.responses, 2),
        "repetition": repetition(found.responses),
    }.items():
        table[name] = (measured.mean, measured.stderr)
    return table


def write_run(folder: RunFolder, before: Evaluation, after: Evaluation, *, title: str) -> Path:
    """Write evaluation, samples and report from the main process; returns the path of the report on every process."""
    if not is_main_process():
        return folder.path / "report.html"
    folder.write_evaluation(before=estimates(before), after=estimates(after))
    remove_chunks(folder)
    shown = ("score", "vader", "classifier", "kl")
    folder.write_samples(
        Sample(
            prompt=prompt,
            before=before.responses[row],
            after=after.responses[row],
            before_scores={name: before.measures[name][row] for name in shown},
            after_scores={name: after.measures[name][row] for name in shown},
        )
        for row, prompt in enumerate(after.prompts)
    )
    return write_report(folder.path, title=title)


def describe(found: Evaluation) -> str:
    """One line of the measures that matter."""
    table = estimates(found)
    names = ("score", "vader", "classifier", "kl", "distinct_2", "perplexity")
    return "  ".join(f"{name} {table[name][0]:.3f} ± {table[name][1]:.3f}" for name in names)
