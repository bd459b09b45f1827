"""The table "Defects that did not come along" of docs/migrating-from-trl.md, row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from tests.helpers import EOS_TOKEN_ID, tiny_gpt2, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided")

QUERIES = [torch.tensor([60, 61, 62]), torch.tensor([63]), torch.tensor([64, 65]), torch.tensor([66, 67, 68, 69])]
RESPONSES = [
    torch.tensor([70, 71]),
    torch.tensor([72, 73, 74]),
    torch.tensor([75]),
    torch.tensor([76, 77, 78, EOS_TOKEN_ID]),
]
SCORES = [torch.tensor(score) for score in (1.0, -1.0, 0.5, 2.0)]


def trainer(*, padding_side: str = "left", **settings: Any) -> PPOTrainer:
    """A trainer over four samples."""
    config = PPOConfig(**({"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3} | settings))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    return PPOTrainer(config, model, None, tiny_tokenizer(padding_side=padding_side))


def parameters(of: PPOTrainer) -> list[Tensor]:
    """A copy of the policy's parameters."""
    return [parameter.detach().clone() for parameter in of.model.parameters()]


def moved(of: PPOTrainer, before: list[Tensor]) -> bool:
    """Whether any parameter has changed."""
    return not all(torch.equal(now, then) for now, then in zip(of.model.parameters(), before, strict=True))


def test_gradients_are_clipped_in_every_step_and_not_only_in_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minibatches x three epochs: the norm behind clipping is below the limit six times."""
    ppo, norms = trainer(max_grad_norm=1e-3, ppo_epochs=3), []
    step = ppo.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        gradients = [parameter.grad for parameter in ppo.model.parameters() if parameter.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        return step(*args, **kwargs)

    monkeypatch.setattr(ppo.optimizer, "step", watched)
    ppo.step(QUERIES, RESPONSES, SCORES)
    assert len(norms) == 6
    assert max(norms) <= 1e-3 * 1.001
    assert min(norms) > 0


def test_gradient_checkpointing_recomputes_activations_and_gives_the_same_update() -> None:
    plain, checkpointed = trainer(), trainer(gradient_checkpointing=True)
    assert _passes_of_a_step(checkpointed) > _passes_of_a_step(plain), "nothing was recomputed in the backward pass"
    for ours, theirs in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def _passes_of_a_step(ppo: PPOTrainer) -> int:
    passes: list[None] = []
    ppo.model.pretrained_model.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_: passes.append(None))
    ppo.step(QUERIES, RESPONSES, SCORES)
    return len(passes)


def test_score_scaling_works() -> None:
    stats = trainer(use_score_scaling=True, use_score_norm=True).step(QUERIES, RESPONSES, SCORES)
    assert abs(stats["ppo/mean_scores"]) < 1e-3


def test_a_nan_score_is_refused_by_its_index_and_nothing_changes() -> None:
    ppo = trainer()
    before = parameters(ppo)
    with pytest.raises(ValueError, match=r"\b2\b"):
        ppo.step(QUERIES, RESPONSES, [*SCORES[:2], torch.tensor(float("nan")), SCORES[3]])
    assert not moved(ppo, before)


def test_generation_cuts_at_the_end_of_the_response_and_not_at_an_eos_in_the_prompt() -> None:
    query = torch.tensor([EOS_TOKEN_ID, 60, 61])
    (response,) = trainer().generate([query], return_prompt=True, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert response[:3].tolist() == query.tolist()
    assert len(response) == 7


def test_the_padding_side_does_not_change_the_statistics() -> None:
    left = trainer(padding_side="left").step(QUERIES, RESPONSES, SCORES)
    right = trainer(padding_side="right").step(QUERIES, RESPONSES, SCORES)
    torch.testing.assert_close(left["objective/logprobs"], right["objective/logprobs"], atol=1e-5, rtol=1e-5)


def test_the_ratio_guard_leaves_the_optimiser_where_it_was() -> None:
    """One good step gives Adam momentum; then a threshold that no ratio of about 1 can pass."""
    ppo = trainer(ppo_epochs=1)
    ppo.step(QUERIES, RESPONSES, SCORES)
    before = parameters(ppo)
    ppo.config.ratio_threshold = 0.5
    with pytest.warns(UserWarning, match="exceeds threshold"):
        ppo.step(QUERIES, RESPONSES, SCORES)
    assert not moved(ppo, before)


def test_shared_layers_share_memory() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    reference = create_reference_model(model, num_shared_layers=1)
    ours, theirs = (each.pretrained_model.transformer.h[0].mlp.c_fc.weight for each in (model, reference))
    assert ours.data_ptr() == theirs.data_ptr()
    assert not ours.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": [torch.tensor([], dtype=torch.long), *RESPONSES[1:]]}, "responses"),
        ({"response_masks": [torch.zeros(len(r), dtype=torch.long) for r in RESPONSES]}, "mask"),
        ({"response_masks": [torch.ones(1, dtype=torch.long) for _ in RESPONSES]}, "mask"),
        ({"queries": []}, "queries"),
    ],
)
def test_malformed_input_is_a_sentence_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    ppo = trainer()
    before = parameters(ppo)
    inputs = {"queries": QUERIES, "responses": RESPONSES, "scores": SCORES} | changes
    with pytest.raises(ValueError, match=message):
        ppo.step(**inputs)
    assert not moved(ppo, before)


def test_integer_and_per_token_scores_are_welcome() -> None:
    assert trainer().step(QUERIES, RESPONSES, [torch.tensor(score) for score in (1, 0, 1, 2)])["ppo/mean_scores"] == 1.0
    trainer().step(QUERIES, RESPONSES, [torch.ones(len(response)) for response in RESPONSES])


def test_a_batch_of_one_token_is_not_nan() -> None:
    ppo = trainer(batch_size=1, mini_batch_size=1)
    stats = ppo.step([torch.tensor([60])], [torch.tensor([70])], [torch.tensor(1.0)])
    assert torch.isfinite(torch.tensor(stats["ppo/loss/total"]))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in ppo.model.parameters())


def test_the_temperature_divides_the_logits_of_policy_and_reference() -> None:
    stats = [trainer(temperature=value, learning_rate=1e-6).step(QUERIES, RESPONSES, SCORES) for value in (1.0, 0.5)]
    assert abs(stats[0]["objective/entropy"] - stats[1]["objective/entropy"]) > 1e-3
    assert stats[1]["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        PPOConfig(learning_rat=1.0)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="learning_rat"):
        PPOConfig().learning_rat = 1.0  # type: ignore[attr-defined]
