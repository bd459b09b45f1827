"""Inner methods that a script overrides are called by `step()`, as in the classic, and training stays the same."""

import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from rlhf_ppo import (
    GRPO,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    TrainConfig,
)
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([20]), torch.tensor([21, 22])]
RESPONSES = [
    torch.tensor([10, 11]), torch.tensor([12, 13, 14, EOS_TOKEN_ID]), torch.tensor([30, 31, 32]), torch.tensor([33]),
]  # fmt: skip
SCORES = [torch.tensor(score) for score in (1.0, -1.0, 0.5, 2.0)]
MASKS = [torch.tensor(mask) for mask in ([1, 1], [1, 0, 0, 1], [0, 1, 1], [1])]
INNER_METHODS = (
    "_step_safety_checker", "prepare_model_inputs", "batched_forward_pass", "compute_rewards", "_kl_penalty",
    "compute_advantages", "train_minibatch", "loss", "_early_stop", "record_step_stats",
)  # fmt: skip


class CallsSuper(PPOTrainer):
    """Overrides a method and changes nothing."""

    def compute_rewards(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_rewards(*args, **kwargs)


def policy(kind: str = "gpt2") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "t5":
            return AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())
        adapter = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4)} if kind == "lora" else {}
        model = tiny_gpt2() if kind == "gpt2" else tiny_llama()
        return AutoModelForCausalLMWithValueHead.from_pretrained(model, **adapter)


def trainer_of(
    cls: type[PPOTrainer] = PPOTrainer, kind: str = "gpt2", side: str = "left", **settings: Any
) -> PPOTrainer:
    arguments = {name: settings.pop(name) for name in ("algorithm", "training_data_collator") if name in settings}
    rate = settings.pop("sgd", None)
    defaults = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3, "diagnose": False}
    model = policy(kind)
    if rate is not None:  # Adam would turn the sign of rounding into a step
        arguments["optimizer"] = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate)
    return cls(PPOConfig(**defaults | settings), model, None, tiny_tokenizer(padding_side=side), **arguments)


def weights(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        ({}, {"response_masks": MASKS}),
        ({"side": "right", "whiten_rewards": True, "use_score_scaling": True, "use_score_norm": True}, {}),
        ({"side": "left", "whiten_rewards": True, "score_clip": 1.0, "gamma": 0.9}, {}),
        ({"kl_penalty": "full", "ent_coef": 0.05, "temperature": 0.9, "sgd": 0.001}, {}),
        ({"mini_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, {}),
        ({"kind": "t5", "early_stopping": True, "target_kl": 1e-6}, {"response_masks": MASKS}),
        pytest.param({"kind": "lora", "gradient_checkpointing": True, "ppo_epochs": 1}, {}, marks=pytest.mark.slow),
        ({}, {"scores": [torch.linspace(-1, 1, len(response)) for response in RESPONSES]}),
    ],
    ids=["masks", "whitening", "left", "full", "accumulation", "t5", "lora", "per token"],
)  # fmt: skip
def test_an_override_that_only_calls_super_changes_nothing(settings: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Two steps: the weights, and every statistic that is one number (variances are those of a minibatch)."""
    settings = {"sgd": 0.01, **settings}
    plain, composed = trainer_of(**settings), trainer_of(CallsSuper, **settings)
    before, accumulates = weights(plain), "gradient_accumulation_steps" in settings
    for _ in range(2):
        expected, got = (t.step(QUERIES, RESPONSES, **{"scores": SCORES, **inputs}) for t in (plain, composed))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float) and not name.startswith("time/") and not (accumulates and "var" in name):
                assert np.isclose(got[name], value, rtol=2e-4, atol=2e-5), name
    assert (weights(plain) - before).abs().max() > 1e-4
    assert torch.allclose(weights(composed), weights(plain), atol=2e-6)
    assert plain.kl_ctl.value == pytest.approx(composed.kl_ctl.value, rel=1e-6)


@pytest.mark.parametrize("on_the_class", [True, False])
def test_step_calls_every_method_that_the_classic_called(on_the_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is wrapped once, on a subclass and on the trainer itself; all others are called, too."""
    calls: list[str] = []

    def counted(name: str, method: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        return wrapper

    class Patched(PPOTrainer):
        pass

    trainer = trainer_of(Patched, early_stopping=True)
    for name in INNER_METHODS:
        if on_the_class:
            monkeypatch.setattr(Patched, name, counted(name, getattr(Patched, name)))
        else:
            setattr(trainer, name, counted(name, getattr(trainer, name)))
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert set(calls) == set(INNER_METHODS)


def test_an_override_of_early_stopping_gets_the_kl_of_the_whole_optimizer_step() -> None:
    """Four minibatches of unequal lengths a step. The KL of the first step is 0, that of the second twice the mean."""
    received: list[float] = []

    class Recording(PPOTrainer):
        def _early_stop(self, policykl: torch.Tensor) -> bool:
            received.append(float(policykl))
            return super()._early_stop(policykl)

    settings = {"mini_batch_size": 1, "gradient_accumulation_steps": 4, "ppo_epochs": 2, "sgd": 0.01}
    trainer = trainer_of(Recording, early_stopping=True, target_kl=100.0, **settings)
    trainer.step(QUERIES, RESPONSES, SCORES)
    expected = trainer_of(early_stopping=True, target_kl=100.0, **settings).step(QUERIES, RESPONSES, SCORES)
    assert received == pytest.approx([0.0, 2 * expected["ppo/policy/policykl"]], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("masks", [None, MASKS], ids=["none", "some"])
def test_an_override_gets_masks_only_where_the_step_got_some(masks: Any) -> None:
    """Public overrides of the classic handle masks wrongly, and never met any."""
    received: list[Any] = []

    class Recording(PPOTrainer):
        def batched_forward_pass(self, *args: Any, response_masks: Any = None, **kwargs: Any) -> Any:
            received.append(response_masks)
            return super().batched_forward_pass(*args, response_masks=response_masks, **kwargs)

    trainer_of(Recording).step(QUERIES, RESPONSES, SCORES, masks)
    of_policy, *others = received
    assert (of_policy is None) == (masks is None)
    assert all(mask is None for mask in others)


def test_what_an_override_returns_is_what_is_learned_from() -> None:
    """A subclass that returns advantages of 7: the classic reports 7, and so does this."""

    class Sevens(PPOTrainer):
        def compute_advantages(self, values: Any, rewards: Any, mask: Any) -> Any:
            values, advantages, returns = super().compute_advantages(values, rewards, mask)
            return values, torch.full_like(advantages, 7.0), returns

    statistics = trainer_of(Sevens).step(QUERIES, RESPONSES, SCORES)
    assert statistics["ppo/policy/advantages_mean"] == pytest.approx(7.0)


def test_a_loss_of_zero_moves_nothing() -> None:
    """LLaMA-Factory and others override `loss` and `train_minibatch`; a policy with a zero loss stays where it is."""

    class NoLoss(PPOTrainer):
        def loss(self, *args: Any) -> Any:
            policy, value, statistics = super().loss(*args)
            return policy * 0, value * 0, statistics

    trainer = trainer_of(NoLoss)
    before = weights(trainer)
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert torch.equal(weights(trainer), before)


def test_a_minibatch_written_as_in_the_classic_accumulates_gradients() -> None:
    """It calls `accelerator.backward`, `optimizer.step` and `zero_grad` at each of two minibatches: one step follows.

    With SGD of rate 1 a step is the mean of the two minibatches' gradients: that of the loss sum(w) is 1 everywhere.
    """

    class Own(PPOTrainer):
        def train_minibatch(self, *args: Any) -> Any:
            old_logprobs, values, logprobs, logits, vpreds, *rest = args
            _, _, statistics = self.loss(old_logprobs, values, logits, vpreds, logprobs, *rest)
            self.accelerator.backward(sum(parameter.sum() for parameter in self.model.parameters()))
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model_params, 1e9)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return statistics

    model = policy()
    config = PPOConfig(batch_size=4, mini_batch_size=2, gradient_accumulation_steps=2, ppo_epochs=1, diagnose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Own(config, model, None, tiny_tokenizer(), optimizer=optimizer)
    before = weights(trainer)
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert torch.allclose(weights(trainer), before - 1.0, atol=1e-5)


def test_a_smaller_batch_passes_where_the_safety_checker_lets_it() -> None:
    class AnySize(PPOTrainer):
        def _step_safety_checker(self, batch_size: Any, *args: Any) -> Any:
            return super()._step_safety_checker(None, *args)

    trainer = trainer_of(AnySize)
    statistics = trainer.step(QUERIES[:3], RESPONSES[:3], SCORES[:3])
    assert statistics["ppo/mean_scores"] == pytest.approx(0.5 / 3)


def test_the_collator_of_the_script_pads() -> None:
    calls = []

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        calls.append(len(rows))
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return {name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for name, column in columns.items()} | {
            "labels": torch.zeros(1)
        }

    plain, own = trainer_of(sgd=0.01), trainer_of(sgd=0.01, training_data_collator=collate)
    for trainer in (plain, own):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert calls == [4]
    assert torch.allclose(weights(own), weights(plain), atol=2e-6)


def test_the_other_path_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(CallsSuper)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            trainer.step(QUERIES, RESPONSES, SCORES)
    assert [record.message for record in caplog.records if "compute_rewards is overridden" in record.message] != []
    assert len(caplog.records) == 1


def test_what_the_classic_did_not_know_is_refused_with_an_override(tmp_path: Any) -> None:
    trainer = trainer_of(CallsSuper, algorithm=GRPO())
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"where compute_rewards is overridden, got the algorithm GRPO"):
        trainer.step(QUERIES, RESPONSES, SCORES)
    with pytest.raises(ValueError, match=r"got compute_rewards: only step\(\) calls them"):
        trainer.train(lambda **_: [0.0], TrainConfig(iterations=1, sampling=SamplingConfig(max_new_tokens=2)))
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dump_dir": "somewhere"}, r"got dump_dir='somewhere'"),
        ({"token_budget": 100}, r"got token_budget=100"),
        ({"importance_sampling": "mask"}, r"needs the sampler's log-probability"),
    ],
)
def test_settings_that_the_inner_methods_do_not_read_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(CallsSuper, **settings).step(QUERIES, RESPONSES, SCORES)


def test_a_score_that_is_not_finite_is_refused_there_too() -> None:
    trainer = trainer_of(CallsSuper)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"scores\[1\] must be finite"):
        trainer.step(QUERIES, RESPONSES, [SCORES[0], torch.tensor(float("nan")), *SCORES[2:]])
    assert torch.equal(weights(trainer), before)


class OtherRank:
    """`Accelerator.reduce` as it is where another process has the given numbers."""

    def __init__(self, other: list[float]) -> None:
        self.other = torch.tensor(other)

    def __call__(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return (tensor + self.other) / 2 if reduction == "mean" else tensor


@pytest.mark.parametrize(("ratio", "moves"), [(12.0, True), (30.0, False), (float("nan"), False)])
@pytest.mark.filterwarnings("ignore:.*Skip")
def test_all_processes_take_a_step_or_none_does(ratio: float, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean ratio of two processes decides: here it is 1, on the other 12 (mean 6.5), 30 (15.5) or nan."""
    trainer = trainer_of(CallsSuper, ratio_threshold=10.0, ppo_epochs=1)
    before = weights(trainer)
    monkeypatch.setattr(trainer.accelerator, "reduce", OtherRank([0.0, ratio]))
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert torch.equal(weights(trainer), before) == (not moves)


def test_single_statistics_of_minibatches_are_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have shape [1]; ratios of one token, too, which stay those of the process."""
    trainer = trainer_of(CallsSuper)
    monkeypatch.setattr(trainer.accelerator, "reduce", OtherRank([3.0]))
    statistics = {
        "ppo/loss/total": torch.ones(1),
        "ppo/policy/ratio": torch.ones(1),
        "objective/kl_dist": torch.ones(1),
    }
    got = {name: value.tolist() for name, value in trainer.gather_stats(statistics).items()}
    assert got == {"ppo/loss/total": [2.0], "ppo/policy/ratio": [1.0], "objective/kl_dist": [1.0]}


@pytest.mark.parametrize("settings", [{"init_scale": 2.0**126}, {"ratio_threshold": 1e-3}], ids=["overflow", "ratio"])
@pytest.mark.filterwarnings("ignore:The average ratio")
def test_a_skipped_minibatch_leaves_the_loss_scaler_ready_for_the_next(
    settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 scales the loss; here by so much that the first gradients are infinite, or ratios are refused."""
    scaler = torch.amp.GradScaler("cpu", init_scale=settings.pop("init_scale", 1.0), backoff_factor=2.0**-100)
    trainer = trainer_of(CallsSuper, most_skips_in_a_row=1, **settings)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    for name, value in {"native_amp": True, "scaler": scaler, "autocast": nullcontext}.items():
        monkeypatch.setattr(trainer.accelerator, name, value)
    trainer.optimizer.scaler = scaler
    before, models = weights(trainer), len(trainer.accelerator._models)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    assert (len(trainer.accelerator._optimizers), len(trainer.accelerator._models)) == (1, models)
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert scaler.get_scale() <= 2.0**26
    assert torch.equal(weights(trainer), before) == ("ratio_threshold" in settings)
