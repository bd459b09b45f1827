"""The `RewardModel`: a reward source that scores texts with one trained model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from reward_model.models.adoption import load_parts
from reward_model.models.backbone import layers_of
from reward_model.models.chat_markup import COMMON_MARKUP, chat_markup
from reward_model.models.contract import Contract
from reward_model.models.text import Texts, encode, prepare_tokenizer
from rlhf_ppo.batch import pad_rows, split_into_micro_batches
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.kernels.packing import packing_matches
from rlhf_ppo.kernels.unpadded import unpadded
from rlhf_ppo.models.device import default_device


class NonFiniteScoreError(ValueError):
    """A score that is nan or infinite: the model is at fault, not the text."""


class RewardModel:
    """Scores prompt-response texts with one trained model and its own tokenizer.

    An instance is a reward source: `reward_model(prompts=..., responses=...)` returns a list of floats. It is always in
    eval mode, without gradients, and its scores do not depend on the other texts of the batch.
    """

    def __init__(self, model: Any, tokenizer: Any, contract: Contract, *, max_tokens: int = 16_384) -> None:
        """Wrap a loaded model.

        Args:
            model: Sequence classifier with one label.
            tokenizer: Tokenizer of this model, not of the policy.
            contract: Text rule and normalization.
            max_tokens: Maximum of padded tokens per forward pass.
        """
        self.model = model.eval()
        self.tokenizer = prepare_tokenizer(tokenizer, contract.text, source=contract.base or "the reward model")
        self.contract = contract
        self.max_tokens = max_tokens
        self._can_pack: bool | None = None
        """Whether rows of unequal length run packed (on a CPU); None: not tried yet."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 16_384,
        label: str | int | None = None,
        trust_remote_code: bool = False,
    ) -> "RewardModel":
        """Load a folder that `train_reward_model` wrote, or another maker's folder or hub name.

        The contract of another maker's model is inferred and logged; see `reward_model.models.adoption`.

        Args:
            path: The folder, or a hub name.
            device: Device of the weights; None: this process's GPU if there is one, else the CPU.
            dtype: Dtype of the weights; float32 gives the scores that were measured in training.
            max_tokens: Maximum of padded tokens per forward pass.
            label: Which label's logit is the score, by name or index; only for a classifier with several labels.
            trust_remote_code: Whether Python code that comes with the model may run.

        Raises:
            ContractError: The contract is malformed, the head is missing from the checkpoint, the tokenizer is not that
                of the training, text.max_length exceeds the model's positions, or no contract can be inferred.
        """
        parts = load_parts(path, dtype=dtype, label=label, trust_remote_code=trust_remote_code)
        model = parts.model.to(default_device() if device is None else device)
        return cls(model, parts.tokenizer, parts.contract, max_tokens=max_tokens if parts.can_be_padded else 1)

    def __call__(
        self, prompts: Texts, responses: Texts, tools: Sequence[Any] | None = None, **_columns: Any
    ) -> list[float]:
        """Normalized scores, gain · raw + bias, one per prompt-response text.

        Args:
            prompts: Texts, or lists of chat messages; "" for a response without a prompt.
            responses: Texts, or lists of chat messages.
            tools: For each sample, the schemas of the tools that its conversation may call, or None.

        Raises:
            ValueError: Unequal numbers of texts, or a score that is not finite; the message names the sample.
            TypeError: A prompt or response is neither text nor messages; the message names the sample.
        """
        return [self.contract.normalization.apply(raw) for raw in self.raw_scores(prompts, responses, tools)]

    def check_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[tuple[str, str, str]]:
        """Problems of texts unlike those of the training, each as (evidence, cause, remedy), for PPO's doctor."""
        rule, problems = self.contract.text, []
        marks = COMMON_MARKUP + (chat_markup(self.tokenizer).openings if self.tokenizer.chat_template else ())
        with_markup = [index for index, prompt in enumerate(prompts) if any(mark in prompt for mark in marks)]
        if with_markup and rule.template == "plain":  # a chat reward model reads the messages, or refuses the text
            problems.append((
                f"{len(with_markup)} of {len(prompts)} prompts hold chat markup, e.g. sample {with_markup[0]}",
                "it was trained on plain text",
                "train a reward model with template='chat', or prompts without markup",
            ))  # fmt: skip
        lengths = []
        for index, (prompt, answer) in enumerate(zip(prompts, responses, strict=True)):
            try:
                lengths.append(len(encode(self.tokenizer, rule, prompt, answer, truncate=False)))
            except UnreadableText as error:
                problems.append(
                    (f"sample {index} cannot be scored", str(error), "give it texts or messages that it reads")
                )
                break
        cut_short = sum(length > rule.max_length for length in lengths)
        if cut_short:
            problems.append((
                f"{cut_short} of {len(lengths)} texts are longer than the {rule.max_length} tokens of its training",
                "their start is cut off before they are scored",
                "shorten prompts or responses, or train a reward model with a larger max_length",
            ))  # fmt: skip
        return problems

    def raw_scores(self, prompts: Texts, responses: Texts, tools: Sequence[Any] | None = None) -> list[float]:
        """The logits, as AutoModelForSequenceClassification returns them for the same folder and token ids."""
        tools = [None] * len(responses) if tools is None else tools
        _check_texts(prompts, responses, tools)
        rule, rows = self.contract.text, []
        for index, (prompt, response, schemas) in enumerate(zip(prompts, responses, tools, strict=True)):
            try:
                rows.append(encode(self.tokenizer, rule, prompt, response, truncate=True, tools=schemas))
            except UnreadableText as error:
                raise UnreadableText(f"sample {index}: {error}") from error
        return self.score_ids(rows)

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of token ids, computed in batches of similar length and at most `max_tokens` padded tokens."""
        if not rows:
            return []
        scores = torch.zeros(len(rows))
        for micro_batch in split_into_micro_batches(
            torch.tensor([len(row) for row in rows]), token_budget=self.max_tokens
        ):
            scores[micro_batch] = self._forward([rows[index] for index in micro_batch.tolist()])
        nonfinite = [index for index, score in enumerate(scores.tolist()) if not math.isfinite(score)]
        if nonfinite:
            raise NonFiniteScoreError(
                f"The reward model gives a score that is not finite for sample {nonfinite[0]} ({len(nonfinite)} of "
                f"{len(rows)}). Its weights may hold nan, or float16 overflows: load it with dtype=torch.float32."
            )
        return scores.tolist()

    @torch.inference_mode()
    def left_padded_scores(self, rows: Sequence[Sequence[int]]) -> list[float] | None:
        """Raw scores with left padding, and positions counted from the first real token, in one batch.

        For checking that padding does not change scores; None for models that cannot be padded on the left (encoders,
        which read the score at the first position).
        """
        if not getattr(self.model.config, "is_decoder", False) and not hasattr(self.model, "score"):
            return None
        width = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        device = self.model.device
        logits = self.model(**{name: value.to(device) for name, value in batch.items()}).logits
        return logits.reshape(len(rows), -1)[:, self.contract.label].float().tolist()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        ids = [torch.tensor(row) for row in rows]
        mask = pad_rows([torch.ones_like(row) for row in ids], value=0)
        padded = pad_rows(ids, value=self.tokenizer.pad_token_id)
        device = self.model.device
        with self._unpadded(ids):
            logits = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
        return logits.reshape(len(rows), -1)[:, self.contract.label].float().cpu()  # type: ignore[no-any-return]

    @contextmanager
    def _unpadded(self, rows: list[torch.Tensor]) -> Iterator[None]:
        """Context manager: while active, padding is not computed on a CPU; products are torch's, bit for bit."""
        layers = layers_of(self.model)
        if self._can_pack is None and len({len(row) for row in rows}) > 1:
            self._can_pack = self.model.device.type == "cpu" and packing_matches(layers, rows)
        with unpadded(layers) if self._can_pack else nullcontext():
            yield


def _check_texts(prompts: Any, responses: Any, tools: Any) -> None:
    if isinstance(prompts, str) or isinstance(responses, str):
        raise TypeError("prompts and responses must be lists with one text per sample, got a single string.")
    if not len(prompts) == len(responses) == len(tools):
        raise ValueError(
            f"Each sample needs a prompt and a response, got {len(prompts)} and {len(responses)}"
            f"{'' if len(tools) == len(responses) else f', and {len(tools)} lists of tools'}."
        )
    for name, texts in (("prompts", prompts), ("responses", responses)):
        for index, text in enumerate(texts):
            if not isinstance(text, str | list | tuple | dict):
                kind = type(text).__name__
                raise TypeError(f"{name}[{index}] must be a text or a list of chat messages, got {kind}: {text!r:.80}.")
