"""Frozen references: a copy, or a copy that shares its lower layers in memory."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo.models import AutoModelForCausalLMWithValueHead, create_reference_model, reference
from tests.support.tiny_models import tiny_gpt2, tiny_llama

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def wrapped(build: Any = tiny_gpt2, **kwargs: Any) -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(build(**kwargs))


def step(model: AutoModelForCausalLMWithValueHead) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _, loss, values = model(TOKENS, labels=TOKENS)
    assert loss is not None
    (loss + values.mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_reference_is_a_frozen_copy_in_eval_mode(build: Any) -> None:
    model = wrapped(build).train()
    reference_model = create_reference_model(model)
    start = reference_model(TOKENS)[0]
    assert not reference_model.training and model.training
    assert not any(parameter.requires_grad for parameter in reference_model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    step(model)
    assert_close(reference_model(TOKENS)[0], start)
    assert not torch.allclose(model.eval()(TOKENS)[0], start)
    assert all(parameter.grad is None for parameter in reference_model.parameters())


@pytest.mark.parametrize(("build", "layer"), [(tiny_gpt2, "transformer.h.1."), (tiny_llama, "model.layers.1.")])
def test_shared_layers_are_one_memory_and_the_others_are_not(build: Any, layer: str) -> None:
    model = wrapped(build)
    reference_model = create_reference_model(model, num_shared_layers=1)
    above = False
    for (name, mine), other in zip(model.named_parameters(), reference_model.parameters(), strict=True):
        above = above or layer in name
        assert (mine.data_ptr() == other.data_ptr()) == (not above), name
        assert mine.requires_grad == above and not other.requires_grad


def test_training_above_shared_layers_leaves_the_reference_where_it_was() -> None:
    model = wrapped()
    reference_model = create_reference_model(model, num_shared_layers=1)
    start = reference_model(TOKENS)[0]
    step(model)
    assert_close(reference_model(TOKENS)[0], start)
    assert not torch.allclose(model(TOKENS)[0], start)
    assert model.get_parameter("pretrained_model.transformer.h.0.attn.c_attn.weight").grad is None
    assert model.get_parameter("pretrained_model.transformer.h.1.attn.c_attn.weight").grad is not None


def test_layer_1_is_not_taken_for_layer_10() -> None:
    model = wrapped(n_layer=11)
    create_reference_model(model, num_shared_layers=10)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any("h.9." in name for name in frozen) and not any("h.10." in name for name in frozen)


def test_a_pattern_serves_an_unknown_architecture() -> None:
    model = wrapped()
    create_reference_model(model, num_shared_layers=1, pattern="h.{layer}")
    assert not model.get_parameter("pretrained_model.transformer.h.0.ln_1.weight").requires_grad


@pytest.mark.parametrize("kwargs", [{"num_shared_layers": 2}, {"num_shared_layers": 1, "pattern": "blocks.{layer}"}])
def test_a_layer_that_is_not_there_is_an_error(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Layer pattern could not be matched"):
        create_reference_model(wrapped(), **kwargs)


def test_zero_3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "is_deepspeed_zero3_enabled", lambda: True)
    model = wrapped()
    create_reference_model(model)  # loaded before the engine: whole
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ZeRO-3"):
        create_reference_model(model)
