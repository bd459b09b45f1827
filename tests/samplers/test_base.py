"""Settings and small parts of samplers."""

import dataclasses

import pytest
import torch
from torch import nn

from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.samplers.base import (
    PromptError,
    SamplingConfig,
    SamplingCounts,
    check_prompts,
    draw_seed,
    pad_prompts,
    unwrap_causal_lm,
)


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", 5),
        ("min_new_tokens", -1),
        ("temperature", 0.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("num_return_sequences", 0),
        ("stop_token_ids", (-1,)),
        ("stop_strings", ("",)),
    ],
)
def test_an_impossible_setting_is_refused_by_its_name(field: str, value: object) -> None:
    good = SamplingConfig(max_new_tokens=4)
    with pytest.raises(ValueError, match=rf"SamplingConfig\.{field} must be"):
        dataclasses.replace(good, **{field: value})


def test_only_an_untouched_distribution_counts_as_unwarped() -> None:
    assert not SamplingConfig(max_new_tokens=4, stop_token_ids=(1,), num_return_sequences=3).warps_distribution
    for changed in (
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.9},
        {"repetition_penalty": 1.1},
        {"do_sample": False},
    ):
        assert SamplingConfig(max_new_tokens=4, **changed).warps_distribution
    assert SamplingConfig(max_new_tokens=4, min_new_tokens=2).warps_distribution


def test_work_adds_up_field_by_field() -> None:
    total = SamplingCounts(forwards=1, response_tokens=5) + SamplingCounts(forwards=2, prefill_tokens=7)
    assert total == SamplingCounts(forwards=3, response_tokens=5, prefill_tokens=7)


def test_eval_mode_is_put_back_module_by_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model.train()
    model[1].eval()
    with EvalMode(model):
        assert not any(module.training for module in model.modules())
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_eval_mode_is_put_back_after_an_error() -> None:
    model = nn.Dropout()
    with pytest.raises(RuntimeError), EvalMode(model):
        raise RuntimeError
    assert model.training


@pytest.mark.parametrize(
    "prompt", [torch.zeros(0, dtype=torch.long), torch.ones(1, 2, dtype=torch.long), torch.ones(3)]
)
def test_an_unusable_prompt_is_refused_by_its_index(prompt: torch.Tensor) -> None:
    with pytest.raises(PromptError, match=r"prompts\[1\]"):
        check_prompts([torch.tensor([1]), prompt])


def test_padding_is_on_the_asked_side_and_holds_only_tokens_of_the_row() -> None:
    ids, mask = pad_prompts([torch.tensor([7]), torch.tensor([1, 2, 3])], torch.device("cpu"), side="left")
    assert (ids.tolist(), mask.tolist()) == ([[7, 7, 7], [1, 2, 3]], [[0, 0, 1], [1, 1, 1]])
    _, mask = pad_prompts([torch.tensor([7]), torch.tensor([1, 2, 3])], torch.device("cpu"), side="right")
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_seed_drawn_from_a_generator_repeats_with_its_state() -> None:
    first, second = (draw_seed(torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second != draw_seed(torch.Generator().manual_seed(4))


def test_a_model_is_found_inside_its_wrappers() -> None:
    inner = nn.Linear(1, 1)
    wrapper = nn.Module()
    wrapper.pretrained_model = inner
    assert unwrap_causal_lm(wrapper) is inner
    assert unwrap_causal_lm(inner) is inner
