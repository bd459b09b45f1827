"""Defects of TRL's second PPO trainer (0.12 to 1.12) and of trlX 0.7, each with a test that it did not come along.

Those of the classic are in test_classic_defects.py; exact resume is tested for every algorithm in tests/robustness.
"""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo import PPOTrainer, TrainConfig
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.rollout.collect import MissingEOS
from rlhf_ppo.rollout.experience import Responses, ScoredResponses, shape_rollout
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.classic.test_classic import QUERIES, RESPONSES, SCORES, policy, trainer_of, weights
from tests.support.patience import PATIENCE
from tests.support.tiny_models import EOS_TOKEN_ID
from tests.support.tiny_run import SAMPLING, config, share_of_e, trainer


def test_v2_max_grad_norm_is_applied_in_the_managed_loop() -> None:
    """Plain SGD with rate 1 moves no farther than the limit times the number of steps."""
    own = trainer(max_grad_norm=1e-4, ppo_epochs=1)
    model = own.model
    sgd = PPOTrainer(
        own.config, model, tokenizer=own.tokenizer, dataset=own.dataset,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )  # fmt: skip
    before = weights(sgd)
    sgd.train(share_of_e, config(iterations=1))
    moved = float((weights(sgd) - before).norm())
    assert 0 < moved <= 2 * 1e-4 * 1.01


@pytest.mark.slow
def test_v2_every_minibatch_is_an_optimizer_step_of_its_own() -> None:
    """4 epochs of 2 minibatches of 2 passes are 8 steps; v2 merged them to 4."""
    own = trainer(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2, ppo_epochs=4)
    state = own.train(share_of_e, config(iterations=1))
    assert state.history[0]["ppo/updates"] == 8.0
    steps = {int(each["step"]) for each in own.optimizer.state.values()}
    assert steps == {8}


def test_v2_evaluation_that_is_asked_for_is_made_or_refused() -> None:
    with pytest.raises(ValueError, match="eval_every=1, got none"):
        trainer().train(share_of_e, config(eval_every=1))


def test_v2_a_padding_token_that_is_the_stop_token_changes_no_number() -> None:
    results = []
    for same in (False, True):
        own = trainer_of(ppo_epochs=1)
        if same:
            own.tokenizer.pad_token = own.tokenizer.eos_token
        results.append(own.step(QUERIES, RESPONSES, SCORES))
    for name in ("objective/kl", "ppo/val/vpred", "ppo/loss/total", "ppo/policy/entropy"):
        assert results[0][name] == results[1][name], name


def test_v2_the_score_is_earned_by_the_stop_token_and_not_one_slot_behind_it() -> None:
    own = trainer_of(init_kl_coef=0.0, adap_kl_ctrl=False)
    inputs = TokenInputs(prompts=[torch.tensor([5])], responses=[torch.tensor([7, 8, EOS_TOKEN_ID])])
    zeros = torch.zeros(1, 3)
    scored = ScoredResponses(logprobs=zeros, values=torch.zeros(1, 4), ref_logprobs=zeros, kl=zeros)
    responses = Responses(inputs=inputs, mask=torch.ones(1, 3, dtype=torch.bool), scores=torch.tensor([5.0]))
    rollout, _ = shape_rollout(responses, scored, own._shaping())
    assert rollout.rewards.tolist() == [[0.0, 0.0, 5.0]]
    assert rollout.terminated.tolist() == [[False, False, True]]


def test_v2_a_response_that_ends_in_another_stop_token_is_not_charged_for_a_missing_one() -> None:
    """Every token but one stops; only the responses that ran to their limit pay."""
    own = trainer()
    stops = tuple(token for token in range(2, 320) if token % 2)
    sampling = SamplingConfig(max_new_tokens=4, stop_token_ids=stops)
    settings = TrainConfig(iterations=1, sampling=sampling, progress=False, missing_eos=MissingEOS(penalty=7.0))
    state = own.train(lambda responses: [1.0] * len(responses), settings)
    finished = state.history[0]["tokens/finished_share"]
    assert finished > 0
    assert own.last_batch is not None
    expected = finished * 1.0 + (1 - finished) * -7.0
    assert state.history[0]["ppo/mean_scores"] == pytest.approx(expected)


def test_v2_entropy_is_never_negative_whatever_stands_in_the_padding() -> None:
    lengths = [torch.tensor([10]), torch.tensor([12, 13, 14, EOS_TOKEN_ID])]
    statistics = trainer_of(ppo_epochs=1).step(QUERIES, lengths, SCORES)
    assert 0 <= float(statistics["ppo/policy/entropy"]) <= math.log(320)
    assert float(statistics["objective/entropy"]) > 0


def test_v2_a_response_that_has_stopped_is_not_sampled_on() -> None:
    own = trainer()
    stops = tuple(range(2, 320))
    sampling = SamplingConfig(max_new_tokens=40, stop_token_ids=stops)
    samples = DecodeLoop(own.tokenizer)(own.model, QUERIES, sampling, generator=torch.Generator().manual_seed(0))
    assert max(map(len, samples.responses)) < 40
    assert samples.counts.forwards < 40


def test_v2_any_callable_is_a_reward() -> None:
    class Judge:
        def __call__(self, responses: Sequence[str]) -> list[int]:
            return [len(response) for response in responses]

    assert math.isfinite(trainer().train(Judge(), config(iterations=1)).history[0]["env/reward_mean"])


def test_trlx_the_loss_sees_the_tokens_that_were_sampled_and_not_those_of_their_text() -> None:
    """The sampler spells a word letter by letter, which its text would not."""
    own = trainer(batch_size=2, mini_batch_size=2)
    letters = [
        torch.tensor([token for letter in word for token in own.tokenizer(letter)["input_ids"]])
        for word in ("movie", "good")
    ]

    def spells(model: Any, prompts: Sequence[Any], config: SamplingConfig, *, generator: Any = None) -> Samples:
        return Samples(prompts=list(prompts), responses=letters, logprobs=None, finished=[True] * 2)

    roomy = replace(SAMPLING, max_new_tokens=8)
    own.train(lambda responses: [1.0, 0.0], TrainConfig(iterations=1, sampling=roomy, progress=False), sampler=spells)
    assert own.last_batch is not None
    inputs: Any = own.last_batch[0].inputs
    assert [row.tolist() for row in inputs.responses] == [row.tolist() for row in letters]
    again = [own.tokenizer(own.tokenizer.decode(row))["input_ids"] for row in letters]
    assert again != [row.tolist() for row in letters], "the test needs words that are not encoded letter by letter"


def test_trlx_whitening_never_counts_padding() -> None:
    """Mean 0 and variance 1 over the actions; with the padding of a long row counted in, they would not be."""
    own = trainer_of(ppo_epochs=1)
    own.step(QUERIES, [torch.tensor([10]), torch.arange(10, 40)], SCORES)
    assert own.last_batch is not None
    batch = own.last_batch[0]
    actions = batch.advantages[batch.mask]
    assert len(actions) == 31
    assert float(actions.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(actions.var()) == pytest.approx(1.0, rel=1e-3)


def test_trlx_a_resumed_run_keeps_iteration_kl_coefficient_and_moments(tmp_path: Path) -> None:
    first = trainer(use_score_scaling=True)
    first.train(share_of_e, config(tmp_path, iterations=2, save_every=2))
    second = trainer(use_score_scaling=True)
    state = second.train(share_of_e, config(tmp_path, iterations=2, save_every=2))
    assert state.iteration == 2
    assert second.kl_ctl.value == first.kl_ctl.value != first.config.init_kl_coef
    assert float(second.running.mean) == float(first.running.mean) != 0.0


def test_trlx_stop_strings_that_end_every_response_at_once_hang_nothing() -> None:
    """Each response keeps the token that ended it, so none is empty and the loop goes on."""
    own = trainer()
    every = tuple(chr(code) for code in range(33, 127)) + (" ", "\n")
    sampling = SamplingConfig(max_new_tokens=6, stop_strings=every)
    state = own.train(share_of_e, TrainConfig(iterations=2, sampling=sampling, progress=False))
    assert state.iteration == 2
    assert state.history[0]["tokens/responses_len_mean"] >= 1


def test_trlx_a_cpu_needs_neither_deepspeed_nor_ray_nor_a_tracker() -> None:
    script = (
        "import sys\n"
        "for name in ('deepspeed', 'ray', 'wandb', 'tritonclient', 'torchtyping', 'gymnasium', 'vllm', 'tyro'):\n"
        "    sys.modules[name] = None\n"
        "import rlhf_ppo\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=PATIENCE, capture_output=True)


def test_trlx_gradients_are_clipped_though_the_policy_is_a_plain_copy() -> None:
    """The recorded norm is that before clipping; the step is that after it."""
    model = policy()
    own = trainer_of(
        model, ppo_epochs=1, max_grad_norm=1e-3, arguments={"optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}
    )
    before = weights(own)
    own.step(QUERIES, RESPONSES, SCORES)
    assert own.metrics["ppo/policy/grad_norm"] > 1e-2
    assert float((weights(own) - before).norm()) == pytest.approx(1e-3, rel=1e-2)
