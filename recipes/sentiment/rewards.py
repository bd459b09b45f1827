"""Who rewards the policy: a reward model trained here, one trained before, or a sentiment classifier."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from reward_model import RewardModel, RewardModelConfig, train_reward_model
from reward_model.models.contract import CONTRACT_FILE
from reward_model.models.ensemble import load_reward_model
from reward_model.models.on_policy import reward_on_policy
from reward_model.serving.client import RemoteRewardModel
from reward_model.training.resume import is_resumable
from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.loop.signals import EXIT_RESUMABLE, StopRequest, stop_on_signals
from rlhf_ppo.models.adapters import describe_trainable_parameters
from rlhf_ppo.models.device import default_device
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter

from .assets import MINILM, build_once, cache_root, fetch, fingerprint, kept_beside
from .command_line import is_main_process, leave, reason
from .reviews import Review, ReviewParts, preference_pairs

TRAIN_REWARD_MODEL = "train"


def reward_source(choice: str, parts: ReviewParts, *, seed: int = 0) -> tuple[Callable[..., list[float]], str]:
    """Who rewards the policy, and a line about it.

    Args:
        choice: "train" for a reward model trained here on preference pairs from labeled reviews, the folder of a
            `reward_model` artifact, the URL of a reward server, or a sentiment classifier of the hub such as
            lvwerra/distilbert-imdb.
        seed: Of the reward model's training.

    Raises:
        ValueError: When there is no such reward model.
    """
    if choice == TRAIN_REWARD_MODEL:
        reward = RewardModel.from_pretrained(_trained_reward_model(parts, seed))
        return reward, f"held-out pair accuracy {reward.contract.metrics['accuracy']:.3f}"
    if _is_url(choice):
        return RemoteRewardModel(choice, token=os.environ.get("REWARD_MODEL_TOKEN")), f"asked at {choice}"
    if _is_artifact(choice):
        return load_reward_model(choice), f"loaded from {choice}"
    return SentimentClassifier(choice), f"positive logit of {choice}"


def check_reward_source(choice: str) -> None:
    """Raise a ValueError with the choices, before anything is trained, if `choice` is none or out of reach."""
    if choice == TRAIN_REWARD_MODEL or _is_artifact(choice) or _is_url(choice):
        return
    try:
        AutoConfig.from_pretrained(choice)
    except (OSError, ValueError) as error:
        raise _unknown(choice, error) from error


def _is_url(choice: str) -> bool:
    return choice.startswith(("http://", "https://"))


def _is_artifact(choice: str) -> bool:
    return (Path(choice) / "reward_model.json").is_file()


def _unknown(choice: str, error: Exception) -> ValueError:
    why = reason(error)
    if not Path(choice).is_dir() and (choice.startswith((".", "/", "~")) or choice.count("/") > 1):
        why = "there is no such folder"
    return ValueError(
        f"The reward model `{choice}` could not be loaded: {why}. Choose `{TRAIN_REWARD_MODEL}`, a folder that "
        "recipes/train_reward_model.py wrote, or a sentiment classifier of the hub if it can be reached."
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """One base for several roles (docs/lora.md), and who calls the reward model."""

    critic: Literal["head", "adapter"] = "head"
    """Who gives the values: a head on the policy's trunk, or an adapter of its own on the policy's base (with LoRA)."""
    reward_on_base: bool = False
    """--reward-model is an adapter on the policy's base: score with it there, without a second base (with LoRA)."""
    load_in_4bit: bool = False
    """QLoRA: hold the frozen base in 4 bits (NF4); needs bitsandbytes, and --lora-rank."""
    reward_calls: Literal["each", "once"] = "each"
    """Of several processes: each asks for the rewards of its own responses, or process 0 for all in one request."""

    def check_reward(self, choice: str, lora_rank: int) -> None:
        """Raise a ValueError that names the flag, if a reward source is missing, or adapters that it needs are."""
        check_reward_source(choice)
        asked = {
            "--critic adapter": self.critic == "adapter",
            "--reward-on-base": self.reward_on_base,
            "--load-in-4bit": self.load_in_4bit,
        }
        wanted = [flag for flag, is_on in asked.items() if is_on]
        if wanted and not lora_rank:
            raise ValueError(f"{wanted[0]} needs a frozen base under adapters, got --lora-rank 0: give e.g. 16")
        if self.reward_on_base and _is_url(choice):
            raise ValueError("--reward-on-base and --reward-url name two reward models: leave one of them out")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ValueError(
                "--load-in-4bit needs bitsandbytes, which is not installed: `pip install 'rlhf_ppo[quantization]'`"
            )

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """How the base is loaded (Dettmers et al. 2023): NF4, its constants quantized too."""
        if not self.load_in_4bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )  # fmt: skip


def build_reward(
    settings: AdapterSettings, policy: AutoModelForCausalLMWithValueHead, choice: str, parts: ReviewParts
) -> tuple[Callable[..., list[float]], str]:
    """The reward source and a line about it; also puts the critic on the policy's base where that was asked for."""
    if settings.critic == "adapter":
        attach_critic_adapter(policy)
    asks = settings.reward_calls == "each" or is_main_process()
    reward: Callable[..., list[float]] = _never_called
    line = ""
    if settings.reward_on_base:  # on every process: DDP broadcasts all parameters
        reward, line = reward_on_policy(policy, choice), f"adapter of {choice} on the policy's base"
    elif asks:
        reward, line = reward_source(choice, parts)
    return (reward, f"{line}\n{describe_trainable_parameters(policy)}") if asks else (_never_called, "")


PAIRS = 2200
"""Pairs that the reward model learns from: what two cores do in a minute and a half."""

CHECKPOINTS = 20
"""Of the reward model's training, so that a killed one repeats at most 5 % of it."""


def _trained_reward_model(parts: ReviewParts, seed: int) -> Path:
    """MiniLM, a pretrained encoder of 23 million weights, tuned on pairs of excerpts about as long as the responses."""
    reviews = parts.reward_model
    held_out = max(len(reviews) // 10, *(_first(label, reviews) for label in (0, 1)))
    base = str(fetch(MINILM))
    settings: dict[str, Any] = {
        "seed": seed, "learning_rate": 2e-4, "epochs": 1.0, "batch_size": 32, "max_length": 128,
        "precision": "bfloat16", "attn_implementation": "eager",  # sdpa's backward pass is slow in bfloat16 on a CPU
    }  # fmt: skip
    # Half of the excerpts begin inside a review: openings alone would teach that naming actors is praise.
    words = {"min_words": 20, "max_words": 56, "per_review": 2}
    key = fingerprint(
        "sentiment reward model 4", settings, words, PAIRS, MINILM.wheel_sha256, [r.text for r in reviews]
    )

    def build(target: Path) -> None:
        output = kept_beside(target) / "model"
        if not (output / CONTRACT_FILE).is_file():
            pairs = preference_pairs(reviews[held_out:], **words).shuffle(seed=0)
            _train_or_go_on(
                RewardModelConfig(model=base, output_dir=str(output), checkpoints=CHECKPOINTS, **settings),
                train=pairs.select(range(min(len(pairs), PAIRS))),
                evaluation=preference_pairs(reviews[:held_out], **words),
            )
        shutil.copytree(output, target, dirs_exist_ok=True)

    return build_once(cache_root() / "models" / f"sentiment-reward-model-{key}", build)


def _train_or_go_on(config: RewardModelConfig, **data: Any) -> None:
    """Train, from the newest checkpoint of an interrupted training if there is one; a signal leaves one behind."""
    config = replace(config, resume=is_resumable(config))
    with stop_on_signals() as request:
        train_reward_model(config, **data, callbacks=[SaveAndLeave(request)])
    AcceleratorState._reset_state()  # PPO has a precision of its own, whether or not this was cached
    if request.is_set:
        leave(
            f"Stopped by {request.signal_name}: the reward model is kept; the same command goes on.",
            EXIT_RESUMABLE,
            None,
        )


class SaveAndLeave(TrainerCallback):
    """After a signal: end the process behind a checkpoint of the step that runs."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self.request.is_set

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.request.is_set:
            done = f"step {state.global_step} of {state.max_steps} of the reward model"
            leave(
                f"Stopped by {self.request.signal_name} after {done}, which is kept; the same command goes on.",
                EXIT_RESUMABLE,
                None,
            )


def _first(label: int, reviews: Sequence[Review]) -> int:
    """How many of `reviews`, from the first on, hold one with this label."""
    return 1 + next(index for index, review in enumerate(reviews) if review.label == label)


class SentimentClassifier:
    """The logit of the positive class of a sequence classifier with its own tokenizer.

    Raises:
        ValueError: When it cannot be loaded, or its checkpoint holds no classification head.
    """

    def __init__(self, name: str) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, info = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise _unknown(name, error) from error
        if info["missing_keys"]:  # transformers would draw them at random and only log it
            raise ValueError(
                f"`{name}` has no trained classification head ({', '.join(sorted(info['missing_keys']))} missing): its "
                f"rewards would be noise. Choose `{TRAIN_REWARD_MODEL}`, a reward model's folder or a classifier."
            )
        self.model = model.eval().to(default_device())
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


def _never_called(**_: Any) -> list[float]:
    raise RuntimeError("only process 0 asks the reward model (--reward-calls once)")
