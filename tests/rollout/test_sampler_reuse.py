"""The sampler's log-probabilities and values stand in for the policy's pass, once they have proved equal."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.sampler_reuse import TOLERANCE
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_models import tiny_gpt2
from tests.support.tiny_run import SAMPLING, config, parameters, share_of_e, trainer

History = list[dict[str, float]]


def run(iterations: int = 3, *, sampling: SamplingConfig = SAMPLING, **settings: Any) -> tuple[Any, History]:
    own = trainer(**settings)
    return own, own.train(share_of_e, replace(config(iterations=iterations), sampling=sampling)).history


def test_after_one_proof_the_policy_is_not_asked_about_its_own_rollout() -> None:
    """Row passes: (1 + K) |batch| where it is asked, K |batch| where it is not."""
    own, history = run()
    epochs = own.config.ppo_epochs
    assert [row["sampler/reused"] for row in history] == [0.0, 1.0, 1.0]
    assert history[0]["sampler/first_difference"] <= TOLERANCE
    asked = [row["work/head_rows"] / (row["tokens/responses_len_mean"] * own.config.batch_size) for row in history]
    assert asked == pytest.approx([1 + epochs, epochs, epochs], abs=1e-3)


def test_rows_twice_as_long_are_compared_again() -> None:
    """Windows and rotations, and fast paths of the policy that miss them, show in long rows alone."""
    own = trainer()
    found = []
    for tokens in (2, 40, 40):
        sampling = replace(SAMPLING, max_new_tokens=tokens)
        found += own.train(share_of_e, replace(config(iterations=1), sampling=sampling)).history
    assert [row["sampler/reused"] for row in found] == [0.0, 0.0, 1.0]


@pytest.mark.slow
def test_reuse_learns_what_asking_learns() -> None:
    """Log-probabilities differ by rounding; Adam blows that up where a gradient is next to nothing, nowhere else."""
    reusing, _ = run()
    asking, history = run(reuse_logprobs=False)
    assert "sampler/reused" not in history[0]
    start, end = parameters(trainer()), parameters(asking)
    assert float((parameters(reusing) - end).norm()) < 0.02 * float((end - start).norm())


def test_values_on_the_way_are_those_of_the_policys_pass() -> None:
    """A value head's dropout stays off while it is read."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0), summary_dropout_prob=0.5).train()
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    drawn = DecodeLoop()(model, prompts, replace(SAMPLING, num_return_sequences=2), generator=torch.Generator())
    assert drawn.values is not None
    with torch.no_grad():
        output = TokenPolicy(model)(TokenInputs(prompts=drawn.prompts, responses=drawn.responses))
    for row, values in enumerate(drawn.values):
        assert_close(values, output.values[row, : len(values)], rtol=0, atol=1e-5)


def test_filtered_tokens_are_scored_by_the_policy() -> None:
    """Under top-k the sampler's probabilities are those of a cut distribution."""
    _, history = run(2, sampling=replace(SAMPLING, top_k=3))
    assert all("sampler/reused" not in row for row in history)


def test_a_sampler_that_disagrees_is_never_believed() -> None:
    own = trainer()
    learn = own.learn

    def shifted(batch: Responses) -> Any:
        assert batch.sampler_logprobs is not None
        batch.sampler_logprobs.sub_(1e-2)
        return learn(batch)

    own.learn = shifted  # type: ignore[method-assign]
    history = own.train(share_of_e, config(iterations=2)).history
    assert [row["sampler/reused"] for row in history] == [0.0, 0.0]
    assert history[0]["sampler/first_difference"] == pytest.approx(1e-2, abs=1e-4)
    assert torch.isfinite(parameters(own)).all()
