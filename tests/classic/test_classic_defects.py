"""Thirteen defects of TRL's classic trainer (0.11.4), each with a test that it did not come along."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_ppo import PPOTrainer
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.learner.statistics import StepData
from rlhf_ppo.rollout.experience import Responses, ScoredResponses, shape_rollout
from tests.classic.test_classic import QUERIES, RESPONSES, SCORES, policy, trainer_of, weights
from tests.support.tiny_models import EOS_TOKEN_ID


@contextmanager
def counted(module: torch.nn.Module, rows: list[int]) -> Iterator[None]:
    """Note the leading size of every input of `module`."""
    handle = module.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    yield
    handle.remove()


def state_of(trainer: PPOTrainer) -> dict[str, Any]:
    """Everything that a step may change."""
    return {
        "weights": weights(trainer).tolist(),
        "optimizer": repr(trainer.optimizer.state_dict()),
        "kl_coef": trainer.kl_ctl.value,
        "scores seen": repr(trainer.running.state_dict()),
        "shuffles": repr(trainer.algorithm.update.state_dict()),
    }


def test_d1_gradients_are_clipped_in_every_optimizer_step() -> None:
    """Plain SGD shows the norm: no step is longer than learning rate times limit, and the later ones reach it too."""
    model = policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = trainer_of(model, ppo_epochs=1, max_grad_norm=1e-3, arguments={"optimizer": optimizer})
    for _ in range(3):
        before = weights(trainer)
        trainer.step(QUERIES, RESPONSES, SCORES)
        assert math.isclose(float((weights(trainer) - before).norm()), 1e-3, rel_tol=1e-2)


def test_d2_gradient_checkpointing_recomputes_and_changes_no_number() -> None:
    """One more forward of each layer in the update, although the model has dropout, which must stay off."""
    calls: dict[bool, list[int]] = {False: [], True: []}
    results = {}
    for checkpointing in (False, True):
        trainer = trainer_of(policy(dropout=0.5), gradient_checkpointing=checkpointing, ppo_epochs=1, packing=False)
        with counted(trainer.model.pretrained_model.transformer.h[0].ln_1, calls[checkpointing]):
            results[checkpointing] = trainer.step(QUERIES, RESPONSES, SCORES)
        results[checkpointing]["weights"] = weights(trainer).numpy()
    assert len(calls[False]) == 2  # rollout, update
    assert len(calls[True]) == 3
    assert math.isclose(float(results[True]["ppo/policy/approxkl"]), 0.0, abs_tol=1e-9)
    assert np.allclose(results[True]["weights"], results[False]["weights"], atol=1e-5)


@pytest.mark.parametrize(("norm", "mean", "clip"), [(False, 0.5, None), (True, 0.0, None), (False, 0.4, 0.6)])
def test_d3_score_scaling_works(norm: bool, mean: float, clip: float | None) -> None:
    """Scores 1, -1, 0.5, 2: mean 0.625, standard deviation 1.25; scaled .8, -.8, .4, 1.6; clipped .6, -.6, .4, .6."""
    trainer = trainer_of(batch_size=4, mini_batch_size=4, use_score_scaling=True, use_score_norm=norm, score_clip=clip)
    scores = [torch.tensor(score) for score in (1.0, -1.0, 0.5, 2.0)]
    statistics = trainer.step(QUERIES * 2, RESPONSES * 2, scores)
    expected = (0.6 - 0.6 + 0.4 + 0.6) / 4 if clip else mean
    assert math.isclose(float(statistics["ppo/mean_scores"]), expected, abs_tol=1e-6)
    if not clip:
        assert math.isclose(float(statistics["ppo/std_scores"]), 1.0, abs_tol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_d4_a_score_that_is_not_finite_is_refused_and_nothing_changes(bad: float) -> None:
    trainer = trainer_of(use_score_scaling=True)
    trainer.step(QUERIES, RESPONSES, SCORES)
    before = state_of(trainer)
    with pytest.raises(ValueError, match=r"scores\[1\] must be finite"):
        trainer.step(QUERIES, RESPONSES, [SCORES[0], torch.tensor(bad)])
    assert state_of(trainer) == before


def test_d5_an_end_of_sequence_token_in_the_prompt_cuts_nothing() -> None:
    queries = [torch.tensor([EOS_TOKEN_ID, 5, 6]), torch.tensor([EOS_TOKEN_ID, 8])]
    texts = trainer_of().generate(queries, return_prompt=True, do_sample=True, max_new_tokens=4, min_new_tokens=4)
    for query, text in zip(queries, texts, strict=True):
        assert len(text) == len(query) + 4
        assert torch.equal(text[: len(query)], query)


@pytest.mark.parametrize("side", ["left", "right"])
def test_d6_the_padding_side_changes_no_log_probability(side: str) -> None:
    trainer = trainer_of(padding_side=side, ppo_epochs=1)
    inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
    with torch.no_grad():
        logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, QUERIES, RESPONSES, inputs)
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        fresh = trainer_of(policy())
        with torch.no_grad():
            logits, _, value = fresh.model.eval()(torch.cat([query, response])[None])
        start = len(query) - 1
        alone = logits[0, start:-1].log_softmax(-1).gather(1, response[:, None]).squeeze(1)
        ours = torch.as_tensor(statistics["objective/logprobs"])[row, : len(response)]
        assert torch.allclose(logprobs[row][mask[row] == 1], alone, atol=1e-5)
        assert torch.allclose(values[row][mask[row] == 1], value[0, start:-1], atol=1e-5)
        assert torch.allclose(ours, alone, atol=1e-5)


def test_d7_the_ratio_guard_moves_nothing_not_even_by_momentum() -> None:
    trainer = trainer_of(kl_penalty="abs")
    trainer.step(QUERIES, RESPONSES, SCORES)  # Adam has momentum now
    before = weights(trainer), repr(trainer.optimizer.state_dict())
    trainer.config.ratio_threshold = 0.5
    with pytest.warns(UserWarning, match=r"average ratio of batch \(1\.00\) exceeds threshold 0\.50"):
        statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert torch.equal(weights(trainer), before[0])
    assert repr(trainer.optimizer.state_dict()) == before[1]
    assert trainer.metrics["ppo/updates_skipped"] == 2
    assert statistics["ppo/loss/total"] == 0.0


def test_d8_shared_layers_are_one_memory() -> None:
    trainer = trainer_of(arguments={"num_shared_layers": 1})
    assert trainer.ref_model is not None
    own = dict(trainer.model.named_parameters())
    for name, parameter in trainer.ref_model.named_parameters():
        shared = any(part in name for part in ("wte", "wpe", ".h.0."))
        assert (parameter.data_ptr() == own[name].data_ptr()) == shared, name
    before = weights(trainer)
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": [RESPONSES[0], RESPONSES[1][:0]]}, r"responses\[1\] is empty"),
        ({"queries": [QUERIES[0][:0], QUERIES[1]]}, r"queries\[0\] is empty"),
        ({"response_masks": [torch.ones(2), torch.zeros(4)]}, r"response_masks\[1\] masks every token"),
        (
            {"response_masks": [torch.ones(2), torch.ones(3)]},
            r"response_masks\[1\] must have one entry for each of",
        ),
        ({"response_masks": [torch.ones(2)]}, "got 1 for: response_masks"),
        ({"queries": [], "responses": [], "scores": []}, "got 0 for: queries"),
    ],
)
def test_d9_what_cannot_be_learned_from_is_refused_in_a_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of().step(**{"queries": QUERIES, "responses": RESPONSES, "scores": SCORES, **change})


def test_d10_a_gap_in_the_mask_is_passed_over_without_decay() -> None:
    """V = 1 everywhere, a score of 1, no KL: every action's target is 1, before and behind two tokens of a tool."""
    trainer = trainer_of(init_kl_coef=0.0, adap_kl_ctrl=False)
    mask = torch.tensor([[True, True, False, False, True]])
    inputs = TokenInputs(prompts=[torch.tensor([5, 6])], responses=[torch.tensor([7, 8, 9, 10, 11])])
    zeros = torch.zeros(1, 5)
    scored = ScoredResponses(logprobs=zeros, values=torch.ones(1, 6), ref_logprobs=zeros, kl=zeros)
    responses = Responses(inputs=inputs, mask=mask, scores=torch.tensor([1.0]))
    rollout, _ = shape_rollout(responses, scored, trainer._shaping())
    returns = trainer.algorithm.estimate_advantages(rollout).returns
    assert torch.allclose(returns, torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]]))


def test_d10_the_tokens_of_a_gap_are_not_learned() -> None:
    """With a gap, the statistics count our tokens alone."""
    trainer = trainer_of(ppo_epochs=1)
    masks = [torch.ones(2), torch.tensor([1, 0, 0, 1])]
    statistics = trainer.step(QUERIES, RESPONSES, SCORES, masks)
    assert np.asarray(statistics["ppo/policy/ratio"]).shape == (4,)
    kept = torch.as_tensor(statistics["objective/logprobs"])
    entropy = -(kept[0, :2].sum() + kept[1, [0, 3]].sum()) / 2
    assert math.isclose(float(statistics["objective/entropy"]), float(entropy), rel_tol=1e-5)


def test_d11_one_response_of_one_token_is_learned_from_without_nan() -> None:
    trainer = trainer_of(batch_size=1, mini_batch_size=1, whiten_rewards=True)
    statistics = trainer.step([QUERIES[0]], [RESPONSES[0][:1]], [torch.tensor(1.0)])
    broken = [name for name, value in statistics.items() if not np.isfinite(np.asarray(value)).all()]
    assert set(broken) <= {"ppo/val/var_explained"}  # of a variance of zero, nothing can be explained
    assert torch.isfinite(weights(trainer)).all()


def test_d12_statistics_are_those_of_all_rows_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process with scores 10 higher moves the mean by 5, and rows are listed, not averaged one by one."""
    alone = trainer_of(ppo_epochs=1).step(QUERIES, RESPONSES, SCORES)
    trainer = trainer_of(ppo_epochs=1)

    def gathered(parts: list[Any]) -> list[Any]:
        others = [replace(part, scores=part.scores + 10) for part in parts if isinstance(part, StepData)]
        return [*parts, *others]

    monkeypatch.setattr(trainer.processes, "gather_objects", gathered)
    together = trainer.step(QUERIES, RESPONSES, SCORES)
    assert math.isclose(float(together["ppo/mean_scores"]), float(alone["ppo/mean_scores"]) + 5, abs_tol=1e-5)
    assert math.isclose(float(together["objective/entropy"]), float(alone["objective/entropy"]), abs_tol=1e-4)
    for name in ("objective/kl_dist", "objective/logprobs", "tokens/queries_dist"):
        assert np.array_equal(np.asarray(together[name])[:2], np.asarray(alone[name])), name


def test_d13_logits_exist_for_response_tokens_alone_and_one_chunk_at_a_time() -> None:
    trainer = trainer_of(logits_chunk_size=4, ppo_epochs=1)
    rows: list[int] = []
    with counted(trainer.model.pretrained_model.lm_head, rows):
        trainer.step(QUERIES, RESPONSES, SCORES)
    tokens = sum(len(response) for response in RESPONSES)
    assert max(rows) == 4
    assert sum(rows) == 3 * tokens  # rollout, update, and once more in the backward pass instead of being kept


def test_d13_the_temperature_divides_the_logits_that_are_scored() -> None:
    trainer = trainer_of(temperature=2.0)
    with torch.no_grad():
        logits, _, _ = trainer.model.eval()(torch.cat([QUERIES[0], RESPONSES[0]])[None])
    expected: Tensor = (logits[0, 2:-1] / 2.0).log_softmax(-1).gather(1, RESPONSES[0][:, None]).squeeze(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert torch.allclose(torch.as_tensor(statistics["objective/logprobs"])[0, :2], expected, atol=1e-5)
