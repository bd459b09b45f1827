"""Build a `Rollout` from scored responses: log-probabilities, values, KL, shaped rewards."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_ppo.batch import (
    PolicyOutput,
    Rollout,
    RowBatch,
    TokenInputs,
    episode_of_rows,
    pad_rows,
    split_into_micro_batches,
)
from rlhf_ppo.functional import (
    classic_whiten_rewards,
    kl_estimate,
    kl_shaped_rewards,
    last_action_index,
    total_scores,
    whiten,
    whitening_statistics,
)
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.rollout.kl_placement import KLPenalty, KLPlacement, reward_kl

_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "k3": "k3"}


@dataclass(frozen=True, kw_only=True)
class Responses(RowBatch):
    """A checked batch of responses and scores, from `step()` or `train()`."""

    inputs: TokenInputs
    mask: Bool[Tensor, "batch time"]
    """True at tokens that the policy chose; False at padding and at tokens of others (tool output)."""
    scores: Float[Tensor, " batch"] | Float[Tensor, "batch time"]
    """One score per response, or one per token."""
    truncated: Bool[Tensor, " batch"] | None = None
    """True where a response was cut off: its last value is bootstrapped. None: every response ended."""
    group_size: int = 1
    """Number of adjacent responses to one prompt."""
    turn_starts: Bool[Tensor, "batch time"] | None = None
    """True at the first token of each turn; None: a turn is a run of tokens that the policy chose."""
    excluded: Bool[Tensor, " batch"] | None = None
    """True where a response is kept out of the loss, but not out of baselines and statistics. None: nowhere."""
    continues: Bool[Tensor, " batch"] | None = None
    """True where the next row goes on with the same episode: its first value is bootstrapped. None: nowhere."""
    sampler_logprobs: Float[Tensor, "batch time"] | None = None
    """log μ of each token under the sampler, nats; None if the sampler did not return it."""
    sampler_values: Float[Tensor, "batch time"] | None = None
    """V at each token by the policy's value head, if the sampler samples from the policy itself and computes it."""


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """Log-probabilities, values and KL of a batch under policy and reference, without gradients."""

    logprobs: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time+1"]
    ref_logprobs: Float[Tensor, "batch time"] | None
    """None without a reference (`kl_penalty="none"`)."""
    kl: Float[Tensor, "batch time"]
    """The `kl_penalty` estimate of KL(policy || reference) at each token, nats; 0 beyond the end, and without one."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Computes log-probabilities, values and KL of responses under policy and reference.

    Args:
        policy: The policy's module, as prepared for its device and precision.
        reference: The frozen reference; None: the policy while `reference_context` is active.
        reference_context: Disables LoRA adapters, or loads the reference to its device.
        rows: Maximum rows per pass.
        token_budget: Maximum padded tokens per pass.
    """

    policy: nn.Module
    reference: nn.Module | None
    reference_context: Callable[[], AbstractContextManager[object]] = nullcontext
    kl_penalty: KLPenalty = "kl"
    rows: int | None = None
    token_budget: int | None = None
    max_passes: Callable[[int], int] = lambda passes: passes
    """Maximum number of passes over processes, if parameters are sharded and passes therefore collective."""

    @torch.no_grad()
    def __call__(self, inputs: TokenInputs, precomputed: PolicyOutput | None = None) -> ScoredResponses:
        """Compute log-probabilities under policy and reference, values and KL, in passes sorted by length.

        Args:
            precomputed: The policy's output, if it is known already; spares the policy's passes.
        """
        policy_output = self.run_passes(self.policy, inputs) if precomputed is None else precomputed
        logprobs, values = policy_output.logprobs, policy_output.values
        if self.kl_penalty == "none":
            return ScoredResponses(logprobs=logprobs, values=values, ref_logprobs=None, kl=torch.zeros_like(logprobs))
        with self.reference_context():
            reference_output = self.run_passes(self.reference or self.policy, inputs)
        if self.kl_penalty == "full":
            with self.reference_context():
                kl = self._exact_kl(inputs)
        else:
            kind = _ESTIMATORS[self.kl_penalty]
            kl = kl_estimate(logprobs, reference_output.logprobs, kind)  # type: ignore[arg-type]
        return ScoredResponses(logprobs=logprobs, values=values, ref_logprobs=reference_output.logprobs, kl=kl)

    def run_passes(self, module: nn.Module, inputs: TokenInputs) -> PolicyOutput:
        """Run all responses through `module`, split into micro-batches as in an update."""
        logprobs: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        micro_batches = split_into_micro_batches(inputs.costs(), size=self.rows, token_budget=self.token_budget)
        micro_batches += micro_batches[-1:] * (self.max_passes(len(micro_batches)) - len(micro_batches))
        for micro_batch in micro_batches:
            output: PolicyOutput = module(inputs.select(micro_batch))
            for row, position in enumerate(micro_batch.tolist()):
                logprobs[position], values[position] = output.logprobs[row], output.values[row]
        width = inputs.width()
        order = range(len(inputs))
        return PolicyOutput(
            logprobs=pad_rows([logprobs[row] for row in order], width=width),
            values=pad_rows([values[row] for row in order], width=width + 1),
        )

    def _exact_kl(self, inputs: TokenInputs) -> Float[Tensor, "batch time"]:
        if self.reference is None:
            raise ValueError(
                "kl_penalty='full' needs policy and reference at the same time, but the reference is the policy with "
                "its adapters disabled. Pass a separate `ref_model`, or use kl_penalty='kl'."
            )
        policy, reference = _unwrap_token_policy(self.policy), _unwrap_token_policy(self.reference)
        kl: dict[int, Tensor] = {}
        for micro_batch in split_into_micro_batches(inputs.costs(), size=self.rows, token_budget=self.token_budget):
            output = policy.kl_to(reference, inputs.select(micro_batch))
            kl.update(zip(micro_batch.tolist(), output, strict=True))
        return pad_rows([kl[row] for row in range(len(inputs))], width=inputs.width())


@dataclass(frozen=True, kw_only=True)
class RewardShaping:
    """Settings of KL-shaped rewards."""

    kl_coef: float
    kl_placement: KLPlacement = "reward"
    whiten_rewards: bool = False
    classic_padding: bool = True
    """Whether whitened rewards contain what the padding adds in TRL's classic trainer, whose γ and λ follow."""
    gamma: float = 1.0
    lam: float = 0.95
    separate_prompts: bool = False
    """Whether the model is an encoder-decoder: prompts are not before the responses."""
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    reduce_max: Callable[[Tensor], Tensor] = lambda tensor: tensor


def shape_rollout(
    responses: Responses, scored: ScoredResponses, shaping: RewardShaping
) -> tuple[Rollout, Float[Tensor, "batch time"]]:
    """Compute rewards: -kl_coef x KL at each token, plus the score at the last action (Ziegler et al. 2019).

    Returns:
        The rollout, and the KL part of its rewards, [B, T].
    """
    mask = responses.mask
    kl_in_reward = reward_kl(scored.kl, mask, shaping.kl_placement)
    rewards, penalty = kl_shaped_rewards(kl_in_reward, responses.scores, mask, kl_coef=shaping.kl_coef)
    last = last_action_index(mask)
    reference_kl_coef = 0.0 if shaping.kl_placement == "reward" else shaping.kl_coef
    if shaping.whiten_rewards:
        _, scale = whitening_statistics(rewards, mask, reduce_sum=shaping.reduce_sum)
        reference_kl_coef *= float(scale)  # the KL in the loss in the units of the rewards
    if shaping.whiten_rewards and not shaping.classic_padding:
        rewards = whiten(rewards, mask, shift_mean=False, reduce_sum=shaping.reduce_sum)
    elif shaping.whiten_rewards:
        tail = _padding_after_last_action(responses.inputs, last, shaping)
        rewards = classic_whiten_rewards(
            rewards, mask, tail=tail, gamma=shaping.gamma, lam=shaping.lam, reduce_sum=shaping.reduce_sum
        )
    is_last = torch.zeros_like(mask)
    is_last[torch.arange(len(last), device=last.device), last] = True
    is_truncated = torch.zeros_like(last, dtype=torch.bool) if responses.truncated is None else responses.truncated
    rollout = Rollout(
        inputs=responses.inputs, mask=mask, logprobs=scored.logprobs, rewards=rewards,
        turn_starts=responses.turn_starts,
        values=_values_of_the_rest(scored.values, last, responses.inputs.response_lengths(), responses.continues),
        terminated=is_last & ~is_truncated[:, None], truncated=is_last & is_truncated[:, None],
        ref_logprobs=scored.ref_logprobs, scores=_episode_scores(responses), group_size=responses.group_size,
        excluded=responses.excluded,
        reference_kl_coef=reference_kl_coef,
    )  # fmt: skip
    return rollout, penalty


def _episode_scores(responses: Responses) -> Float[Tensor, " batch"]:
    """Total score of the episode that each row is of."""
    totals = total_scores(responses.scores, responses.mask)
    if responses.continues is None:
        return totals
    episode = episode_of_rows(responses.continues)
    return torch.zeros_like(totals).index_add(0, episode, totals)[episode]


def _values_of_the_rest(
    values: Float[Tensor, "batch states"],
    last: Int[Tensor, " batch"],
    lengths: Int[Tensor, " batch"],
    continues: Bool[Tensor, " batch"] | None,
) -> Float[Tensor, "batch states"]:
    """V of the state in which the policy acts next put behind each row's last action, where GAE looks for it.

    A truncated episode may end in an observation: the policy would act after it, and only states where it acts have a
    trained value. Where the next row continues the episode, it is the first state of that row.
    """
    end = values.gather(1, lengths.to(values.device)[:, None])
    if continues is not None:
        end = torch.where(continues[:, None], values[:, :1].roll(-1, 0), end)
    return values.scatter(1, last[:, None] + 1, end)


def _padding_after_last_action(inputs: TokenInputs, last: Tensor, shaping: RewardShaping) -> Tensor:
    """Padded positions after each row's last action in the right-padded layout of TRL's classic PPO."""
    prompt_lengths = [0 if shaping.separate_prompts else len(prompt) for prompt in inputs.prompts]
    prompts = torch.tensor(prompt_lengths, device=last.device)
    max_length = shaping.reduce_max((prompts + inputs.response_lengths().to(last.device)).max())
    return max_length - prompts - last - 1


def _unwrap_token_policy(module: nn.Module) -> TokenPolicy:
    unwrapped = getattr(module, "module", module)
    if not isinstance(unwrapped, TokenPolicy):
        raise TypeError(f"kl_penalty='full' needs a TokenPolicy, got {type(unwrapped).__name__}: use kl_penalty='kl'")
    return unwrapped
