"""Lengths, seeds, plain sampling, best-of-n."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from rlhf_ppo import LengthSampler, respond_to_batch, set_seed
from rlhf_ppo.classic.best_of_n import BestOfNSampler
from rlhf_ppo.models import AutoModelForCausalLMWithValueHead
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

TOKENS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def policy() -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())


def test_lengths_cover_the_range_without_its_end() -> None:
    set_seed(0)
    sampler = LengthSampler(2, 5)
    drawn = [sampler() for _ in range(100)]
    assert set(drawn) == {2, 3, 4}
    assert all(type(length) is int for length in drawn)
    set_seed(0)
    assert [sampler() for _ in range(100)] == drawn


def test_an_empty_range_of_lengths_is_an_error() -> None:
    with pytest.raises(ValueError, match="min_value < max_value, got 5 and 5"):
        LengthSampler(5, 5)


def test_a_seed_fixes_all_three_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    set_seed(7)
    first = draw()
    set_seed(7)
    assert draw() == first


def test_plain_sampling_gives_responses_of_the_asked_length() -> None:
    set_seed(0)
    responses = respond_to_batch(policy(), TOKENS, txt_len=6)
    assert responses.shape == (2, 6) and not responses.requires_grad


def test_plain_sampling_of_the_likeliest_token_is_greedy_decoding() -> None:
    model = policy()
    expected = model.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(respond_to_batch(model, TOKENS, txt_len=4, top_k=1), expected[:, 3:])
    assert torch.equal(respond_to_batch(model, TOKENS, txt_len=4, top_p=1e-6), expected[:, 3:])


def sampler(**kwargs: Any) -> BestOfNSampler:
    arguments: dict[str, Any] = {
        "queries_to_scores": lambda texts: [float(len(text)) for text in texts],
        "length_sampler": LengthSampler(2, 6),
        "generation_config": GenerationConfig(do_sample=True, top_k=0, pad_token_id=0, eos_token_id=1),
        "seed": 0,
        **kwargs,
    }
    return BestOfNSampler(policy(), tiny_tokenizer(), **arguments)


@pytest.mark.parametrize(
    ("queries", "count"),
    [([5, 6, 7], 1), ([[5, 6, 7], [8, 9]], 2), (TOKENS[0], 1), (TOKENS, 2), ([TOKENS[0], TOKENS[1, :2]], 2)],
)
def test_every_form_of_queries_gives_one_list_each(queries: Any, count: int) -> None:
    results = sampler().generate(queries)
    assert len(results) == count
    assert all(len(result) == 1 and isinstance(result[0], str) for result in results)


def test_candidates_are_the_best_of_all_samples_in_order() -> None:
    seen: list[str] = []

    def scores(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [float(len(text)) for text in texts]

    (best,) = sampler(queries_to_scores=scores, sample_size=6, n_candidates=3).generate([5, 6, 7])
    assert [len(text) for text in best] == sorted(map(len, seen), reverse=True)[:3]


def test_one_sample_of_one_token_is_still_a_list_of_one_text() -> None:
    (best,) = sampler(sample_size=1, length_sampler=lambda: 1).generate([5, 6, 7])
    assert len(best) == 1


def test_misuse_of_best_of_n_is_named() -> None:
    with pytest.raises(ValueError, match="n_candidates must be between 1 and sample_size=4, got 5"):
        sampler(n_candidates=5)
    with pytest.raises(ValueError, match="one finite score for each of 4 texts"):
        sampler(queries_to_scores=lambda texts: [1.0]).generate([5, 6])
    with pytest.raises(ValueError, match="one finite score"):
        sampler(queries_to_scores=lambda texts: [float("nan")] * len(texts)).generate([5, 6])
    with pytest.raises(ValueError, match="tokenizer must be"):
        BestOfNSampler(policy(), object(), lambda texts: [], LengthSampler(1, 2))
    with pytest.raises(ValueError, match="model must be a PreTrainedModelWrapper"):
        BestOfNSampler(tiny_gpt2(), tiny_tokenizer(), lambda texts: [], LengthSampler(1, 2))
