"""From sampled tokens and their scores to a `Rollout`: score under policy and reference, shape the reward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlhf_ppo.batch import PolicyOutput, Rollout, TokenInputs, pad_rows, split_into_micro_batches
from rlhf_ppo.functional import classic_whiten_rewards, kl_estimate, kl_shaped_rewards, last_action_index
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.rollout.kl_placement import KLPenalty, KLPlacement, reward_kl

_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "k3": "k3"}


@dataclass(frozen=True, kw_only=True)
class Responses:
    """One batch of responses, checked: what `step()` and `train()` both hand to the trainer."""

    inputs: TokenInputs
    mask: Bool[Tensor, "batch time"]
    """True at our tokens: False at padding and at tokens that others wrote (tool output)."""
    scores: Float[Tensor, " batch"] | Float[Tensor, "batch time"]
    """One score a response, or one a token."""
    truncated: Bool[Tensor, " batch"] | None = None
    """Responses whose future we did not watch; their last value is bootstrapped. None: every response ended."""
    group_size: int = 1
    """Responses to one prompt, side by side."""
    sampler_logprobs: Float[Tensor, "batch time"] | None = None
    """log μ of each token under the sampler as it drew, nats; None where nobody knows."""
    sampler_values: Float[Tensor, "batch time"] | None = None
    """V at each token by the policy's value head, from a sampler that draws from the policy itself; None elsewhere."""


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """A batch of responses under policy and reference, without gradients."""

    logprobs: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time+1"]
    ref_logprobs: Float[Tensor, "batch time"]
    kl: Float[Tensor, "batch time"]
    """The penalized estimate of KL(policy || reference) at each token, nats; 0 beyond the end."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Policy and reference side by side.

    Args:
        policy: The policy's module, as prepared for its device and precision.
        reference: The frozen reference; None when it is the policy itself inside `reference_context`.
        reference_context: Turns the policy into the reference (LoRA adapters off), or brings it to its device.
        kl_penalty: Which estimate the reward pays for.
        rows: Most rows of one pass.
        token_budget: Most padded tokens of one pass.
    """

    policy: nn.Module
    reference: nn.Module | None
    reference_context: Callable[[], AbstractContextManager[object]] = nullcontext
    kl_penalty: KLPenalty = "kl"
    rows: int | None = None
    token_budget: int | None = None
    most: Callable[[int], int] = lambda passes: passes
    """The largest number over processes, where passes are collective because parameters are sharded."""

    @torch.no_grad()
    def __call__(self, inputs: TokenInputs, known: PolicyOutput | None = None) -> ScoredResponses:
        """Score every response once under the policy and once under the reference, rows sorted by length.

        Args:
            inputs: Prompts and responses.
            known: What the policy's pass would find, where somebody knows it already.
        """
        own = self.passes(self.policy, inputs) if known is None else known
        with self.reference_context():
            other = self.passes(self.reference or self.policy, inputs)
        if self.kl_penalty == "full":
            with self.reference_context():
                kl = self._exact_kl(inputs)
        else:
            kl = kl_estimate(own.logprobs, other.logprobs, _ESTIMATORS[self.kl_penalty])  # type: ignore[arg-type]
        return ScoredResponses(logprobs=own.logprobs, values=own.values, ref_logprobs=other.logprobs, kl=kl)

    def passes(self, module: nn.Module, inputs: TokenInputs) -> PolicyOutput:
        """Every response through one module, rows sorted by length and cut like those of an update."""
        logprobs: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        micro_batches = split_into_micro_batches(inputs.costs(), size=self.rows, token_budget=self.token_budget)
        micro_batches += micro_batches[-1:] * (self.most(len(micro_batches)) - len(micro_batches))
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
                "kl_penalty='full' needs both distributions of a token at once, but the reference is the policy with "
                "its adapters off. Pass a separate `ref_model`, or use kl_penalty='kl'."
            )
        policy, reference = _plain(self.policy), _plain(self.reference)
        kl: dict[int, Tensor] = {}
        for micro_batch in split_into_micro_batches(inputs.costs(), size=self.rows, token_budget=self.token_budget):
            output = policy.kl_to(reference, inputs.select(micro_batch))
            kl.update(zip(micro_batch.tolist(), output, strict=True))
        return pad_rows([kl[row] for row in range(len(inputs))], width=inputs.width())


@dataclass(frozen=True, kw_only=True)
class RewardShaping:
    """How scores and KL become rewards."""

    kl_coef: float
    kl_placement: KLPlacement = "reward"
    whiten_rewards: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    separate_prompts: bool = False
    """Whether prompts stand in an encoder instead of before the responses."""
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    reduce_max: Callable[[Tensor], Tensor] = lambda tensor: tensor


def shape_rollout(
    responses: Responses, scored: ScoredResponses, shaping: RewardShaping
) -> tuple[Rollout, Float[Tensor, "batch time"]]:
    """Rewards of each token: -kl_coef x KL everywhere, plus the score at the last action (Ziegler et al. 2019).

    Returns:
        The rollout and the non-score part of its rewards, [B, T].
    """
    mask = responses.mask
    paid = reward_kl(scored.kl, mask, shaping.kl_placement)
    rewards, penalty = kl_shaped_rewards(paid, responses.scores, mask, kl_coef=shaping.kl_coef)
    last = last_action_index(mask)
    if shaping.whiten_rewards:
        tail = _tail(responses.inputs, last, shaping)
        rewards = classic_whiten_rewards(
            rewards, mask, tail=tail, gamma=shaping.gamma, lam=shaping.lam, reduce_sum=shaping.reduce_sum
        )
    ends = torch.zeros_like(mask)
    ends[torch.arange(len(last), device=last.device), last] = True
    cut_off = torch.zeros_like(last, dtype=torch.bool) if responses.truncated is None else responses.truncated
    totals = rewards.masked_fill(~mask, 0.0).sum(dim=1)
    rollout = Rollout(
        inputs=responses.inputs, mask=mask, logprobs=scored.logprobs, values=scored.values, rewards=rewards,
        terminated=ends & ~cut_off[:, None], truncated=ends & cut_off[:, None], ref_logprobs=scored.ref_logprobs,
        scores=totals, group_size=responses.group_size,
        reference_kl_coef=0.0 if shaping.kl_placement == "reward" else shaping.kl_coef,
    )  # fmt: skip
    return rollout, penalty


def _tail(inputs: TokenInputs, last: Tensor, shaping: RewardShaping) -> Tensor:
    """Padded columns behind each row's last action in the classic's right-padded layout."""
    before = [0 if shaping.separate_prompts else len(prompt) for prompt in inputs.prompts]
    prompts = torch.tensor(before, device=last.device)
    widest = shaping.reduce_max((prompts + inputs.response_lengths().to(last.device)).max())
    return widest - prompts - last - 1


def _plain(module: nn.Module) -> TokenPolicy:
    inner = getattr(module, "module", module)
    if not isinstance(inner, TokenPolicy):
        raise TypeError(f"kl_penalty='full' needs a TokenPolicy, got {type(inner).__name__}: use kl_penalty='kl'")
    return inner
