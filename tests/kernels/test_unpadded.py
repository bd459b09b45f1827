"""Layers whose caller pads run on the real tokens, and give the states and gradients of a padded pass."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo.batch import pad_rows
from rlhf_ppo.kernels.unpadded import unpadded
from tests.samplers.test_decode_loop import ARCHITECTURES, prompts
from tests.support.tiny_models import tiny_gpt2

ROWS = prompts(3, 9, 5, 9, 1)
IDS, MASK = pad_rows(ROWS), pad_rows([torch.ones_like(row) for row in ROWS], value=0)


def tokens_seen(layers: Any) -> list[int]:
    """Filled with the number of tokens of each pass through the embedding."""
    seen: list[int] = []
    layers.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    return seen


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"gpt2-lora", "gemma2-sliding"}))  # cannot be packed
def test_states_and_gradients_are_those_of_a_padded_pass(name: str) -> None:
    layers = ARCHITECTURES[name]().base_model
    seen = tokens_seen(layers)

    def states() -> Tensor:
        layers.zero_grad()
        found: Tensor = layers(IDS, attention_mask=MASK).last_hidden_state
        (found[MASK.bool()].square() * torch.arange(found.shape[-1])).sum().backward()
        return found.detach()

    padded = states()
    theirs = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
    with unpadded(layers):
        ours = states()
    assert seen == [IDS.numel(), int(MASK.sum())]
    assert_close(ours[MASK.bool()], padded[MASK.bool()], rtol=0, atol=1e-5)
    assert not ours[~MASK.bool()].any()
    for a, b in zip([p.grad for p in layers.parameters() if p.grad is not None], theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def holed(row: int, column: int) -> Tensor:
    mask = MASK.clone()
    mask[row, column] = 0
    return mask


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mask": None}, {"attention_mask": torch.ones_like(MASK)}, {"attention_mask": MASK.flip(1)},
        {"attention_mask": holed(1, 0)}, {"attention_mask": holed(1, 4)},
        {"use_cache": True}, {"output_hidden_states": True}, {"position_ids": torch.arange(IDS.shape[1])[None]},
    ],
    ids=lambda changes: f"{next(iter(changes))}",
)  # fmt: skip
def test_any_other_call_goes_through_unchanged(changes: dict[str, Any]) -> None:
    layers = tiny_gpt2().base_model
    call = {"attention_mask": MASK, "use_cache": False} | changes
    seen, plain = tokens_seen(layers), layers(IDS, **call)
    with unpadded(layers):
        inside = layers(IDS, **call)
    assert seen == [IDS.numel()] * 2
    assert torch.equal(inside.last_hidden_state, plain.last_hidden_state)
    assert inside.keys() == plain.keys()


def test_the_forward_of_the_layers_is_what_it_was() -> None:
    layers = tiny_gpt2().base_model
    with unpadded(layers):
        assert "forward" in vars(layers)
    assert "forward" not in vars(layers)
    layers.forward = exchanged = layers.forward
    with pytest.raises(KeyError), unpadded(layers):
        raise KeyError
    assert layers.forward is exchanged
