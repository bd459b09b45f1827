"""Tokens that another engine drew, in the trainer: what is weighed, what is measured, what is refused."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, Reinforce, TrainConfig
from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.functional import ppo_clip_loss
from rlhf_ppo.learner.importance_correction import (
    ImportanceCorrection,
    correct_for_sampler,
    mismatch_metrics,
    resolve_correction,
)
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.transformers_generate import TransformersGenerate
from tests.functional.cases import numbers
from tests.support import tiny_run
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

SAMPLING = SamplingConfig(max_new_tokens=5)


@dataclass
class Shifted:
    """The own loop, whose log-probabilities are reported lower by `nats`: each ratio is e^nats."""

    nats: float

    def __call__(
        self, model: nn.Module, prompts: Sequence[Tensor], config: SamplingConfig, *,
        generator: torch.Generator | None = None,
    ) -> Samples:  # fmt: skip
        samples = DecodeLoop()(model, prompts, config, generator=generator)
        assert samples.logprobs is not None
        return replace(samples, logprobs=[row - self.nats for row in samples.logprobs])


def trained(sampler: Any, *, iterations: int = 1, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """All weights after training, and the last metrics."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0))
    torch.nn.init.zeros_(model.v_head.summary.weight)
    torch.nn.init.zeros_(model.v_head.summary.bias)
    defaults: dict[str, Any] = {"batch_size": 4, "mini_batch_size": 4, "learning_rate": 1e-3, "ppo_epochs": 2}
    trainer = PPOTrainer(
        PPOConfig(**defaults | settings), model, tokenizer=tokenizer,
        dataset=PromptDataset.from_texts(["The movie", "I liked"], tokenizer),
    )  # fmt: skip
    state = trainer.train(
        lambda *, responses, **_: [float(len(text)) for text in responses],
        TrainConfig(iterations=iterations, sampling=SAMPLING, progress=False), sampler=sampler,
    )  # fmt: skip
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), state.metrics


def test_a_weighed_advantage_weighs_the_clipped_surrogate() -> None:
    """min(ρ wÂ, clip(ρ) wÂ) = w min(ρ Â, clip(ρ) Â) token by token, for both signs of the advantage."""
    rows, mask = [torch.tensor([3, 4, 5])] * 2, torch.ones(2, 3, dtype=torch.bool)
    old, new, sampler = numbers(0, 2, 3), numbers(1, 2, 3), numbers(2, 2, 3)
    inputs = TokenInputs(prompts=rows, responses=rows)
    batch = TrainBatch(
        inputs=inputs, mask=mask, logprobs=old, values=numbers(3, 2, 3), advantages=numbers(4, 2, 3),
        returns=numbers(5, 2, 3),
    )  # fmt: skip
    responses = Responses(inputs=inputs, mask=mask, scores=torch.zeros(2), sampler_logprobs=sampler)
    correction = resolve_correction("truncate", "token", None, 1.5)
    weighed, _ = correct_for_sampler(batch, responses, correction)
    weights = (old - sampler).exp().clamp(max=1.5)
    expected = 0.0
    for position in mask.nonzero():
        at = tuple(position.tolist())
        loss, _ = ppo_clip_loss(
            new[at], old[at], batch.advantages[at], torch.tensor(True), clip_low=0.2, clip_high=0.2, count=6
        )
        expected = expected + weights[at] * loss
    loss, _ = ppo_clip_loss(new, weighed.logprobs, weighed.advantages, mask, clip_low=0.2, clip_high=0.2)
    assert_close(loss, expected)
    assert weighed.returns is batch.returns


def test_the_own_loop_agrees_with_the_trainer_on_every_token() -> None:
    _, metrics = trained(DecodeLoop(), importance_sampling_cap=2.0)
    assert metrics["sampler/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["sampler/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["sampler/logprob_difference"] < 1e-5
    assert metrics["sampler/truncated_share"] == 0.0


def test_a_sampler_that_is_off_by_a_factor_is_seen_and_capped() -> None:
    """Every ratio is e^0.5 = 1.65; a cap of 1.5 truncates each of them."""
    _, metrics = trained(Shifted(0.5), importance_sampling_cap=1.5)
    assert metrics["sampler/ratio_mean"] == pytest.approx(1.6487, abs=1e-3)
    assert metrics["sampler/logprob_difference"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["sampler/truncated_share"] == 1.0


def test_the_weights_reach_the_update() -> None:
    """Without a cap nothing is weighed whatever the sampler says; with one the step is another."""
    plain, metrics = trained(DecodeLoop())
    ignored, _ = trained(Shifted(3.0))
    weighed, _ = trained(Shifted(3.0), importance_sampling_cap=2.0)
    assert_close(ignored, plain, rtol=0, atol=0)
    assert not torch.allclose(weighed, plain, atol=1e-5)
    assert "sampler/truncated_share" not in metrics


def test_the_metrics_are_those_of_all_processes() -> None:
    """Weights 1, 1, 1, 4 of ratios 1, 1, 1, 5: an effective sample of (1 + 1 + 1 + 4)² / (3 + 16) of 4."""
    ones, cut = torch.ones(3), ImportanceCorrection(mode="truncate", level="token", low=0.0, high=4.0)
    metrics = mismatch_metrics([(ones, ones), (torch.tensor([5.0]), torch.tensor([4.0]))], cut)
    assert metrics["sampler/ratio_mean"] == pytest.approx(2.0)
    assert metrics["sampler/ratio_max"] == 5.0
    assert metrics["sampler/truncated_share"] == 0.25
    assert metrics["sampler/weight_mean"] == 7 / 4
    assert metrics["sampler/effective_share"] == pytest.approx(49 / 19 / 4)
    assert metrics["sampler/kl"] == pytest.approx((4 - math.log(5)) / 4)
    assert mismatch_metrics([None, None], None) == {}


def test_a_sampler_without_log_probabilities_cannot_be_corrected() -> None:
    with pytest.raises(ValueError, match=r"importance_sampling_cap needs the sampler's log-probability .* this batch"):
        trained(TransformersGenerate(), importance_sampling_cap=2.0)


@pytest.mark.parametrize("cap", [0.5, float("nan")])
def test_a_cap_that_would_shrink_agreed_tokens_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match=r"importance_sampling_cap must be (at least 1 \(or None\)|a number)"):
        PPOConfig(importance_sampling_cap=cap)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"importance_sampling_cap": 3.0}, ("truncate", 0.0, 3.0)),
        ({"importance_sampling": "truncate"}, ("truncate", 0.0, 2.0)),
        ({"importance_sampling": "mask"}, ("mask", 0.5, 5.0)),
        ({"importance_sampling": "mask", "importance_sampling_floor": 0.8}, ("mask", 0.8, 5.0)),
        ({"importance_sampling": "bypass"}, ("bypass", 0.0, math.inf)),
        ({"importance_sampling": "off"}, None),
    ],
)
def test_settings_name_a_correction(settings: dict[str, Any], expected: tuple[str, float, float] | None) -> None:
    config = PPOConfig(**settings)
    found = resolve_correction(
        config.importance_sampling, config.importance_sampling_level, config.importance_sampling_floor,
        config.importance_sampling_cap,
    )  # fmt: skip
    assert (found and (found.mode, found.low, found.high)) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_floor": 0.5},
        {"importance_sampling": "off", "importance_sampling_cap": 2.0},
        {"importance_sampling": "mask", "importance_sampling_floor": 1.5},
    ],
)
def test_bounds_that_would_be_ignored_or_drop_agreed_tokens_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"would be ignored|where sampler and trainer agree"):
        PPOConfig(**settings)


def test_every_correction_takes_another_step() -> None:
    """Every ratio is e^0.3 = 1.35 at its token, e^(0.3 n) for n tokens; a band below 1.2 drops all of them."""
    settings: dict[str, dict[str, Any]] = {
        "off": {},
        "truncate": {"importance_sampling": "truncate"},
        "mask": {"importance_sampling": "mask", "importance_sampling_cap": 1.2},
        "sequence": {"importance_sampling": "truncate", "importance_sampling_level": "sequence"},
        "bypass": {"importance_sampling": "bypass"},
    }
    found = {name: trained(Shifted(0.3), **setting) for name, setting in settings.items()}
    steps = [weights for weights, _ in found.values()]
    assert all(not torch.equal(a, b) for index, a in enumerate(steps) for b in steps[:index])
    assert found["mask"][1]["sampler/truncated_share"] == 1.0
    assert found["mask"][1]["ppo/loss/policy"] == 0.0
    assert found["sequence"][1]["sampler/weight_mean"] == pytest.approx(2.0), "e^1.5 beyond the cap"
    assert found["bypass"][1]["ppo/policy/ratio_max"] == pytest.approx(math.exp(0.3), rel=0.2)
    _, geometric = trained(Shifted(0.3), importance_sampling="truncate", importance_sampling_level="geometric")
    assert geometric["sampler/weight_mean"] == pytest.approx(math.exp(0.3), rel=1e-4)


def test_an_engine_that_is_known_to_differ_is_corrected_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """In bfloat16 the sampler rounds otherwise; in float32, or switched off, nothing is weighed and nothing said."""

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if "weighted" in record.getMessage()]

    caplog.set_level("INFO")
    trained(DecodeLoop())
    trained(DecodeLoop(), precision="bf16", importance_sampling="off")
    assert not said()
    _, metrics = trained(DecodeLoop(), precision="bf16")
    assert 0.9 < metrics["sampler/weight_mean"] < 1.1
    (line,) = said()
    assert line.startswith("torch.bfloat16 rounds differently token by token than in one pass: each token is weighted")


def test_the_sampler_s_distribution_in_a_ratio_that_reinforce_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"which Reinforce does not have: nothing would be corrected. Use 'truncate'"):
        tiny_run.trainer(algorithm=Reinforce(), importance_sampling="bypass")
    own = tiny_run.trainer(algorithm=Reinforce())
    with pytest.raises(ValueError, match="Reinforce does not have"):
        own.config.importance_sampling = "bypass"
    assert own.config.importance_sampling == "auto"
