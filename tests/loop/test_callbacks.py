"""What a callback may do during `train()`: evaluate, and change settings, which takes effect or is refused."""

import pytest
import torch

from rlhf_ppo import PPOTrainer, TrainState
from tests.support.tiny_run import SAMPLING, config, share_of_e, trainer


def test_an_evaluation_in_a_callback_leaves_the_importance_correction_on() -> None:
    """In bfloat16 sampler and learner round differently; an evaluation by another sampler does not change that."""
    own = trainer(precision="bf16")
    seen: list[bool] = []

    def evaluate(learner: PPOTrainer, _: TrainState) -> None:
        seen.append(own.importance_correction is not None)
        own.precision = plain
        own.evaluate(own.dataset, share_of_e, SAMPLING)  # type: ignore[arg-type]
        own.precision = low

    low, plain = own.precision, trainer().precision
    history = own.train(share_of_e, config(iterations=2), callbacks=[evaluate]).history
    assert seen == [True, True]
    assert "sampler/weight_mean" in history[1]


def test_a_temperature_that_a_callback_sets_is_that_of_the_next_rollout() -> None:
    """Otherwise the ratios are those of another distribution."""
    own = trainer(reuse_logprobs=False)

    def cool(learner: PPOTrainer, _: TrainState) -> None:
        learner.config.temperature = 0.5

    history = own.train(share_of_e, config(iterations=2), callbacks=[cool]).history
    assert history[1]["sampler/logprob_difference"] < 1e-5


@pytest.mark.parametrize("reuse", [True, False])
def test_a_model_that_a_callback_assigns_samples_the_next_rollout(reuse: bool) -> None:
    """Otherwise π_old would be the log-probabilities of the model before, which proved equal to its own policy's."""
    own, other = trainer(reuse_logprobs=reuse), trainer().model
    with torch.no_grad():
        other.pretrained_model.transformer.wte.weight.mul_(2.0)

    def assign(learner: PPOTrainer, _: TrainState) -> None:
        learner.model = other

    history = own.train(share_of_e, config(iterations=3), callbacks=[assign]).history
    assert all(row["sampler/logprob_difference"] < 1e-5 for row in history)
    assert [row.get("sampler/reused") for row in history] == ([0.0, 0.0, 1.0] if reuse else [None] * 3)


def test_a_batch_size_that_a_callback_sets_is_refused() -> None:
    own = trainer()

    def grow(learner: PPOTrainer, _: TrainState) -> None:
        learner.config.batch_size = 16

    with pytest.raises(ValueError, match=r"expected PPOConfig.batch_size=8 until train\(\) returns, got 16"):
        own.train(share_of_e, config(iterations=2), callbacks=[grow])


def test_another_call_of_train_logs_at_steps_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases drops a row whose step lies behind the last one."""
    own, steps = trainer(), list[int]()
    monkeypatch.setattr(own.accelerator, "log", lambda values, step: steps.append(step))
    for _ in range(2):
        own.train(share_of_e, config(iterations=2))
    assert steps == [1, 2, 3, 4]
