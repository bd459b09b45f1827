"""Which responses are sampled again, penalized, chosen or kept out of the loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_ppo import GRPO, RLOO, Critic, PositiveNLL, PPOClip, TrainConfig
from rlhf_ppo import functional as F
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.loop.dynamic_sampling import DynamicSampling, fill_batch, groups_with_spread, roll_out
from rlhf_ppo.rewards.sources import RewardScores
from rlhf_ppo.rollout.collect import DecodedResponses, SoftOverlong
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_run import parameters, trainer

PAIRS = SamplingConfig(max_new_tokens=6, num_return_sequences=2, stop_token_ids=())


def scores_of(totals: list[float], skipped: tuple[int, ...] = ()) -> RewardScores:
    total = torch.tensor(totals, dtype=torch.float32)
    is_skipped = torch.tensor([row in skipped for row in range(len(totals))])
    return RewardScores(
        total=total, per_token=None, per_source={"r": total}, skipped=is_skipped,
        dropped=torch.zeros(len(totals), dtype=torch.bool),
    )  # fmt: skip


def responses_of(first: int, count: int) -> DecodedResponses:
    """Responses that are one token each, with its number as text."""
    numbers = range(first, first + count)
    samples = Samples(
        prompts=[torch.tensor([1])] * count, responses=[torch.tensor([n]) for n in numbers], logprobs=None,
        finished=[True] * count,
    )  # fmt: skip
    texts = [str(n) for n in numbers]
    return DecodedResponses(samples=samples, prompts=["p"] * count, responses=texts, columns={"id": [*numbers]})


def test_a_group_has_a_spread_if_its_scores_differ_and_none_was_skipped() -> None:
    assert groups_with_spread(scores_of([1, 1, 0, 1, 2, 3, 0, 5], skipped=(6,)), 2) == [1, 2]


def test_the_spread_is_that_of_the_responses_that_are_learned_from() -> None:
    scores = scores_of([1, 1, 0, 3, 2, 1])
    assert groups_with_spread(scores, 3) == [0, 1]
    assert groups_with_spread(scores, 3, best_of=2) == [1]


def test_a_round_whose_samples_were_all_skipped_joins_scores_per_token() -> None:
    per_token = replace(scores_of([1, 2]), per_token=torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    rounds = [(responses_of(0, 2), scores_of([0, 0], skipped=(0, 1))), (responses_of(2, 2), per_token)]
    _, scores = fill_batch(rounds, 1, 2)
    assert scores.scores.tolist() == [[1.0, 0.0], [0.0, 2.0]]


def test_scores_per_token_are_learned_from_if_the_longest_response_is_skipped() -> None:
    def draw(model: Any, prompts: list[torch.Tensor], config: SamplingConfig, **settings: Any) -> Samples:
        return DecodeLoop()(model, prompts, config, limits=[6, *[2] * (len(prompts) - 1)], **settings)

    def source(prompts: list[str], responses: list[str]) -> list[dict[int, float] | None]:
        return [None, *({0: float(row)} for row in range(1, len(prompts)))]

    own, sampling = trainer(), replace(PAIRS, num_return_sequences=1)
    state = own.train(source, TrainConfig(iterations=1, sampling=sampling, progress=False), sampler=draw)
    assert state.metrics["env/reward_skipped"] == 1 / own.config.batch_size
    assert own.last_batch is not None and own.last_batch[0].mask.shape == (own.config.batch_size - 1, 2)


def test_a_batch_is_filled_with_groups_of_spread_and_otherwise_with_the_first_others() -> None:
    """Three of six groups: 1 and 4 have a spread; of the others 0 comes first, and 2 was skipped."""
    rounds = [
        (responses_of(10, 6), scores_of([1, 1, 0, 1, 2, 2], skipped=(4,))),
        (responses_of(16, 6), scores_of([3, 3, 0, 2, 4, 4])),
    ]
    collected, scores = fill_batch(rounds, 3, 2)
    assert collected.responses == ["10", "11", "12", "13", "18", "19"]
    assert collected.columns["id"] == [10, 11, 12, 13, 18, 19]
    assert [int(row) for row in torch.cat(collected.samples.responses)] == [10, 11, 12, 13, 18, 19]
    assert scores.total.tolist() == scores.per_source["r"].tolist() == [1, 1, 0, 1, 0, 2]
    assert collected.counts == {"env/groups_sampled": 6, "env/groups_equal": 4}


def test_rounds_go_on_until_the_batch_is_full_or_the_bound_is_met() -> None:
    made = iter(range(100))
    rewards = [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 5.0, 2.0], [9.0, 1.0, 9.0, 1.0]]

    def roll(bound: int) -> Any:
        count = iter(range(100))
        found = roll_out(
            lambda: responses_of(4 * next(count), 4), lambda _: scores_of(rewards[next(made)]), lambda: False,
            dynamic=DynamicSampling(max_rounds=bound), groups=2, group_size=2, any_process=bool,
        )  # fmt: skip
        assert found is not None
        return found

    collected, scores, _ = roll(10)
    assert next(made) == 3, "the third round filled the batch"
    assert scores.total.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert collected.responses == ["4", "5", "8", "9"]
    made = iter(range(100))
    _, scores, _ = roll(1)
    assert scores.total.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_a_stop_ends_the_rounds() -> None:
    assert (
        roll_out(
            lambda: responses_of(0, 2), lambda _: scores_of([0, 1]), lambda: True, dynamic=None, groups=1,
            group_size=2, any_process=bool,
        )
        is None
    )  # fmt: skip


def trained(algorithm: Any, reward: Any, **settings: Any) -> Any:
    own = trainer(algorithm=algorithm, kl_penalty="none", init_kl_coef=0.0)
    return own, own.train(reward, TrainConfig(iterations=1, sampling=PAIRS, progress=False, **settings))


def test_dynamic_sampling_trains_on_a_full_batch_of_groups_that_differ() -> None:
    """Rewards are 0 in the first round, and differ from the second on."""
    calls = iter(range(100))

    def late(*, responses: list[str], **_: Any) -> list[float]:
        return [float(row % 2) if next(calls) >= 8 else 0.0 for row, _ in enumerate(responses)]

    own, state = trained(GRPO(), late, dynamic_sampling=DynamicSampling())
    assert state.metrics["env/groups_sampled"] == 8.0 and state.metrics["env/groups_equal"] == 4.0
    assert own.last_batch is not None and len(own.last_batch[0]) == 8
    assert bool((own.last_batch[0].advantages[own.last_batch[0].mask] != 0).all())


def test_the_soft_penalty_by_hand_and_in_a_run() -> None:
    """Limit 10, buffer 4: nothing up to 6 tokens, a half at 8, all of it from 10 on."""
    lengths = torch.tensor([1, 6, 8, 10, 12])
    assert F.soft_overlong_penalty(lengths, max_length=10, buffer=4).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    _, state = trained(PPOClip(), lambda *, responses, **_: [0.0] * len(responses), overlong=SoftOverlong(buffer=6))
    assert state.metrics["env/reward_mean"] == -1.0, "no stop token is set: all have 6 tokens"
    _, half = trained(
        PPOClip(), lambda *, responses, **_: [0.0] * len(responses), overlong=SoftOverlong(buffer=6, penalty=0.5)
    )
    assert half.metrics["env/reward_mean"] == -0.5


def test_truncated_responses_count_in_the_baseline_and_not_in_the_loss() -> None:
    """Without a stop token all are cut: nothing is learned, though the scores differ."""
    fresh = parameters(trainer())

    def reward(*, responses: list[str], **_: Any) -> list[float]:
        return [float(row % 2) for row, _ in enumerate(responses)]

    plain, _ = trained(RLOO(), reward)
    assert not torch.equal(parameters(plain), fresh)
    own = trainer(algorithm=RLOO(), kl_penalty="none", init_kl_coef=0.0)
    run = TrainConfig(iterations=1, sampling=PAIRS, progress=False, mask_truncated=True)

    class Finishing(DecodeLoop):
        """Reports every second response as finished."""

        def __call__(self, *args: Any, **kwargs: Any) -> Samples:
            samples = super().__call__(*args, **kwargs)
            return replace(samples, finished=[row % 2 == 0 for row in range(len(samples.finished))])

    own.train(reward, run, sampler=Finishing(own.tokenizer))
    assert own.last_batch is not None
    mask, advantages = own.last_batch[0].mask, own.last_batch[0].advantages
    assert mask.any(dim=1).tolist() == [True, False] * 4
    assert advantages[mask].tolist() == [-1.0] * int(mask.sum()), "0 against the 1 of the response that was cut"


def test_the_best_of_each_group_are_learned_from() -> None:
    sampling = SamplingConfig(max_new_tokens=3, num_return_sequences=4)
    own = trainer(algorithm=RLOO(), kl_penalty="none", init_kl_coef=0.0)
    run = TrainConfig(iterations=1, sampling=sampling, progress=False, best_of=2)
    own.train(lambda *, responses, **_: [1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0], run)
    assert own.last_batch is not None
    assert own.last_batch[0].advantages[:, 0].tolist() == [1.0, -1.0, 1.0, -1.0]


def test_dynamic_sampling_goes_on_until_the_best_of_each_group_differ() -> None:
    """The best two of the first group are equal, though its four scores are not; a second round brings another one."""
    rounds = iter([[4.0, 4.0, 0.0, 1.0, 1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 1.0, 1.0, 2.0, 0.0, 0.0, 1.0]])
    own = trainer(algorithm=RLOO(), kl_penalty="none", init_kl_coef=0.0)
    sampling = SamplingConfig(max_new_tokens=3, num_return_sequences=4)
    run = TrainConfig(
        iterations=1, sampling=sampling, progress=False, best_of=2, dynamic_sampling=DynamicSampling(max_rounds=2)
    )
    state = own.train(lambda *, responses, **_: next(rounds), run)
    assert state.metrics["env/groups_sampled"] == 4.0
    assert own.last_batch is not None
    assert own.last_batch[0].advantages[:, 0].tolist() == [-1.0, 1.0, 1.0, -1.0], "of 3 and 4, and of 2 and 1"


def test_without_a_comparison_in_groups_dynamic_sampling_looks_for_a_spread_of_all_scores() -> None:
    """Then one response of a group can be learned from, and groups whose best are equal teach something."""
    own, state = trained(
        PPOClip(), lambda *, responses, **_: [float(row % 2) for row, _ in enumerate(responses)], best_of=1,
        dynamic_sampling=DynamicSampling(max_rounds=2),
    )  # fmt: skip
    assert state.metrics["env/groups_sampled"] == 4.0 and state.metrics["env/groups_equal"] == 0.0
    assert own.last_batch is not None and len(own.last_batch[0]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic_sampling": DynamicSampling(), "sampling": SamplingConfig(max_new_tokens=3)}, "has no spread"),
        ({"best_of": 2, "sampling": PAIRS}, "nothing to choose or to compare"),
        ({"overlong": SoftOverlong(buffer=9), "sampling": PAIRS}, "every response would be penalized"),
    ],
)
def test_settings_that_cannot_act_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer().train(lambda **_: [0.0] * 8, TrainConfig(iterations=1, progress=False, **settings))


def test_bounds_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be sampled"):
        DynamicSampling(max_rounds=0)
    with pytest.raises(ValueError, match="long responses would not be penalized"):
        SoftOverlong(buffer=0)


def test_excluded_responses_are_none_of_the_good_ones() -> None:
    """The weights of good responses' likelihood average to μ over the tokens that take part in the loss."""
    own = trainer(algorithm=RLOO(positive_nll=PositiveNLL(coef=0.1)), kl_penalty="none", init_kl_coef=0.0)
    rows = [torch.arange(3, 3 + length) for length in (2, 5, 1, 3)]
    own.learn(
        Responses(
            inputs=TokenInputs(prompts=[torch.tensor([3, 4])] * 4, responses=rows), group_size=2,
            mask=torch.tensor([[step < len(row) for step in range(5)] for row in rows]),
            scores=torch.tensor([1.0, 2.0, -1.0, 3.0]), excluded=torch.tensor([False, True, False, False]),
        )
    )  # fmt: skip
    assert own.last_batch is not None and own.last_batch[0].nll_weights is not None
    weights = own.last_batch[0].nll_weights[own.last_batch[0].mask]
    assert len(weights) == 6
    assert float(weights.mean()) == pytest.approx(0.1)


def test_a_batch_of_nothing_but_truncated_responses_is_refused() -> None:
    own = trainer(algorithm=RLOO(), kl_penalty="none", init_kl_coef=0.0)
    before = parameters(own)
    run = TrainConfig(iterations=1, sampling=PAIRS, progress=False, mask_truncated=True)
    with pytest.raises(ValueError, match="each of the batch was cut before a stop token"):
        own.train(lambda *, responses, **_: [0.0] * len(responses), run)
    assert torch.equal(parameters(own), before)


def test_a_minibatch_without_an_action_moves_no_critic() -> None:
    """Of two responses one is excluded: minibatches of one row, and a fit of the critic behind."""
    algorithm = PPOClip(critic=Critic(extra_fits=1, warmup_iterations=1))
    own = trainer(algorithm=algorithm, kl_penalty="none", init_kl_coef=0.0, batch_size=2, mini_batch_size=1)
    inputs = TokenInputs(prompts=[torch.tensor([3, 4])] * 2, responses=[torch.tensor([5, 6]), torch.tensor([7])])
    mask = torch.tensor([[True, True], [True, False]])
    for _ in range(2):
        own.learn(
            Responses(inputs=inputs, mask=mask, scores=torch.tensor([1.0, 2.0]), excluded=torch.tensor([False, True]))
        )
        assert torch.isfinite(parameters(own)).all()
