"""PPO-ptx: gradients of texts added to those of an optimizer step, and texts drawn in an order that goes on."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import TRPO, PPOClip
from rlhf_ppo.updates import MinibatchConfig, pretraining
from rlhf_ppo.updates.pretraining import PretrainingMix, PretrainingRows, passes_of_all
from tests.classic.test_classic import QUERIES, RESPONSES, SCORES, policy, trainer_of, weights

TEXTS = [torch.tensor(row) for row in ([5, 6, 7, 8], [9, 10], [11, 12, 13])]


def stepped(mix: PretrainingMix | None, *, rate: float = 0.0, **settings: Any) -> Any:
    """A trainer after one optimizer step on everything with plain gradient descent."""
    model = policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    defaults: dict[str, Any] = {"ppo_epochs": 1, "kl_penalty": "none", "init_kl_coef": 0.0}
    arguments = {"optimizer": optimizer, "pretraining": mix}
    trainer = trainer_of(model, **defaults | settings, arguments=arguments)
    trainer.step(QUERIES, RESPONSES, SCORES)
    return trainer


def likelihood_gradient(texts: list[Tensor]) -> Tensor:
    """Of the mean negative log-likelihood of all tokens but the first of each text, by the model alone."""
    model = policy()
    total = torch.zeros(())
    for text in texts:
        logits = model.pretrained_model(text[None]).logits[0, :-1]
        total = total - logits.log_softmax(-1).gather(1, text[1:, None]).sum()
    loss = total / sum(len(text) - 1 for text in texts)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if gradient is None else gradient).flatten() for p, gradient in pairs])


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_moves_by_both_gradients(micro_batch: int) -> None:
    """θ' - θ'' = -rate · γ · ∇(mean NLL of the drawn texts), whatever the micro-batches."""
    mix = PretrainingMix(texts=TEXTS, coef=0.5, rows=3)
    settings = {"rate": 0.1, "mini_batch_size": micro_batch, "gradient_accumulation_steps": 2 // micro_batch}
    mixed, plain = stepped(mix, **settings), stepped(None, **settings)
    assert_close(weights(mixed) - weights(plain), -0.1 * 0.5 * likelihood_gradient(TEXTS), atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        model = policy()
        total = 0.0
        for text in TEXTS:
            logprobs = model.pretrained_model(text[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logprobs.gather(1, text[1:, None]).sum())
    assert mixed.metrics["ppo/loss/pretraining"] == pytest.approx(total / 6, rel=1e-4)
    assert "ppo/loss/pretraining" not in plain.metrics


@pytest.mark.parametrize("change", [{"coef": 0.25}, {"rows": 1}, {"texts": TEXTS[:2]}])
def test_every_setting_changes_what_is_learned(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"texts": TEXTS, "coef": 0.5, "rows": 3}
    one, other = (stepped(PretrainingMix(**part), rate=0.1) for part in (settings, settings | change))
    assert not torch.equal(weights(one), weights(other))


def test_every_text_is_drawn_once_a_pass_and_processes_share_a_draw() -> None:
    rows = PretrainingRows(PretrainingMix(texts=TEXTS, rows=3), seed=4)
    (texts,), tokens = rows(1)
    assert tokens == 6 and {len(text) for text in texts} == {4, 2, 3}
    shares, count = PretrainingRows(PretrainingMix(texts=TEXTS, rows=3), seed=4)(2)
    assert count == 6 and len(shares) == 2
    assert sorted(map(len, [*shares[0], *shares[1]])) == [2, 3, 4]


def test_a_resumed_update_draws_the_texts_that_come_next() -> None:
    trainer = stepped(PretrainingMix(texts=TEXTS, rows=2))
    state = trainer.algorithm.update.state_dict()
    assert state["texts"] == 2
    fresh = stepped(PretrainingMix(texts=TEXTS, rows=2))
    fresh.step(QUERIES, RESPONSES, SCORES)
    fresh.algorithm.update.load_state_dict(state)
    assert fresh.algorithm.update.state_dict() == state


def test_texts_and_algorithms_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(ValueError, match="there would be nothing to learn"):
        PretrainingMix(texts=[torch.tensor([5])])
    with pytest.raises(ValueError, match="there would be nothing to learn"):
        PretrainingMix(texts=[])
    with pytest.raises(ValueError, match=r"at least two token ids each, .* got 1 texts \(others: \[0\]\)"):
        PretrainingMix(texts=[torch.tensor([5.0, 6.0])])
    with pytest.raises(ValueError, match="which TRPO does not take"):
        trainer_of(arguments={"pretraining": PretrainingMix(texts=TEXTS), "algorithm": TRPO()})
    assert trainer_of(arguments={"pretraining": PretrainingMix(texts=TEXTS), "algorithm": PPOClip()}).pretraining


@pytest.mark.parametrize("text", [torch.tensor([5, 10**6]), torch.tensor([-1, 5]), torch.full((1000,), 5)])
def test_a_text_that_the_model_cannot_read_is_refused_before_the_first_rollout(text: Tensor) -> None:
    with pytest.raises(ValueError, match=r"got texts\[1\] with ids from .*: the model cannot read it"):
        trainer_of(arguments={"pretraining": PretrainingMix(texts=[TEXTS[0], text])})


def test_the_token_budget_limits_the_passes_over_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    as_inputs = pretraining._as_inputs

    def seen(texts: Any, device: torch.device) -> Any:
        sizes.append(len(texts))
        return as_inputs(texts, device)

    monkeypatch.setattr(pretraining, "_as_inputs", seen)
    stepped(PretrainingMix(texts=TEXTS, rows=3), mini_batch_size=2, token_budget=4)
    assert sizes == [1, 1, 1]


def test_all_processes_make_equally_many_passes_over_their_texts() -> None:
    """Under sharded weights a pass waits for all: here one process has long texts, the other short ones."""
    short, long = torch.arange(5, 8), torch.arange(5, 25)
    first, second = passes_of_all([[long, long], [short, short]], MinibatchConfig(token_budget=24))
    assert len(first) == len(second) == 2
    assert sorted(torch.cat(second).tolist()) == [0, 1]
