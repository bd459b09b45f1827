"""Best-of-n sampling: sample n responses, keep those with the highest scores. A baseline for PPO."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_ppo.models import SUPPORTED_ARCHITECTURES
from rlhf_ppo.utils.seeding import set_seed

Queries = Sequence[int] | Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


class BestOfNSampler:
    """Samples `sample_size` responses per query and keeps the `n_candidates` with the highest scores.

    Args:
        model: The policy, a `PreTrainedModelWrapper`.
        tokenizer: The tokenizer of `model`, a `PreTrainedTokenizerBase`.
        queries_to_scores: Full texts (query and response) -> one score per text.
        length_sampler: Called once per query; returns the number of tokens to sample.
        sample_size: n, the number of responses per query.
        seed: Seed of the global generators, set now; None: not set.
        n_candidates: Number of texts to keep per query.
        generation_config: Passed to `model.generate`.

    Raises:
        ValueError: The model or tokenizer is of the wrong type, or `n_candidates` is not in 1 ... `sample_size`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        queries_to_scores: Callable[[list[str]], Sequence[float]],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"tokenizer must be a PreTrainedTokenizer or PreTrainedTokenizerFast, got {type(tokenizer)}: samples "
                "could not be decoded. Load it with AutoTokenizer.from_pretrained."
            )
        if not isinstance(model, SUPPORTED_ARCHITECTURES):
            raise ValueError(
                f"model must be a PreTrainedModelWrapper, got {type(model)} - supported architectures are: "
                f"{SUPPORTED_ARCHITECTURES}. Pass AutoModelForCausalLMWithValueHead.from_pretrained(model)."
            )
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(
                f"n_candidates must be between 1 and sample_size={sample_size}, got {n_candidates}: no more texts can "
                "be kept than are sampled. Raise sample_size."
            )
        if seed is not None:
            set_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.gen_config = generation_config
        self.sample_size = sample_size
        self.n_candidates = n_candidates

    def generate(
        self,
        tokenized_query: Queries,
        skip_special_tokens: bool = True,
        device: str | torch.device | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The best texts for each query, best first.

        Args:
            tokenized_query: Tokens of one query, or of several.
            skip_special_tokens: Whether to leave special tokens out of the texts.
            device: Where to generate; None: where the model is.
            generation_kwargs: Passed to `model.generate`; they override `generation_config`.

        Raises:
            ValueError: `queries_to_scores` does not return one finite score per text.
        """
        device = self.model.device if device is None else device
        best = []
        for query in _queries(tokenized_query):
            batch = query.to(device).repeat(self.sample_size, 1)
            arguments = {"max_new_tokens": self.length_sampler(), "attention_mask": torch.ones_like(batch)}
            output = self.model.generate(batch, **{**arguments, **generation_kwargs}, generation_config=self.gen_config)
            texts = self.tokenizer.batch_decode(output, skip_special_tokens=skip_special_tokens)
            order = self._scores(texts).topk(self.n_candidates).indices.tolist()
            best.append([texts[index] for index in order])
        return best

    def _scores(self, texts: list[str]) -> Tensor:
        scores = [float(score) for score in self.queries_to_scores(texts)]
        if len(scores) != len(texts) or not all(math.isfinite(score) for score in scores):
            raise ValueError(
                f"queries_to_scores must give one finite score for each of {len(texts)} texts, got {scores}: the best "
                "cannot be told. Return a list of floats in the order of the texts."
            )
        return torch.tensor(scores)


def _queries(tokens: Queries) -> list[Tensor]:
    """Each query as a tensor [1, time]."""
    if isinstance(tokens, Tensor):
        return [row.reshape(1, -1) for row in (tokens.unsqueeze(0) if tokens.ndim == 1 else tokens)]
    if all(isinstance(token, int) for token in tokens):
        return [torch.tensor(tokens).reshape(1, -1)]
    return [torch.as_tensor(query).reshape(1, -1) for query in tokens]
