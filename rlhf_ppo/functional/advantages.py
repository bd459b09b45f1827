"""Advantage estimates: GAE, Monte Carlo returns, and group baselines (RLOO, GRPO)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import next_action_index, zero_where_masked


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time+1"],
    terminated: Bool[Tensor, "batch time"],
    truncated: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    lam: float | Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16) and their value targets.

        δ_t = r_t + γ (1 - terminated_t) V(s_{t'}) - V(s_t)
        Â_t = δ_t + γ λ (1 - done_t) Â_{t'},        done_t = terminated_t or truncated_t
        R_t = Â_t + V(s_t)

    A terminated step has no future. A truncated step has an unobserved future: it bootstraps from V(s_{t+1}), and only
    the recursion stops. Nothing after `done` is read, nan included.

    t' is the policy's next action: t + 1, or later where masked steps (a tool's output, an auto-reset) lie between,
    which are skipped without decay. The last action of a row that is neither terminated nor truncated bootstraps from
    `values[:, t + 1]`, as at the end of a rollout.

    Args:
        rewards: r_t.
        values: V(s_0) ... V(s_T), one more than rewards.
        terminated: The episode ended at t: V after it is 0.
        truncated: The episode was cut off at t: V after it is bootstrapped from.
        gamma: Discount γ in [0, 1].
        lam: λ in [0, 1]; one number, or one per row (length-adaptive).
        mask: True = an action of the policy; None: every step. Flags and numbers outside are not read.

    Returns:
        Advantages and value targets, 0 outside the mask, without gradient.

    Raises:
        ValueError: `values` is not one longer than `rewards`.
    """
    _check_length(rewards, values)
    with torch.no_grad():
        mask = torch.ones_like(terminated) if mask is None else mask
        done = terminated | truncated
        next_index, is_last = next_action_index(mask)
        index = torch.where(truncated | is_last, torch.arange(1, mask.shape[1] + 1, device=mask.device), next_index)
        bootstrap = values.gather(1, index).masked_fill(terminated, 0)
        delta = zero_where_masked(rewards + gamma * bootstrap - values[:, :-1], mask)
        decay = gamma * (lam.unsqueeze(1).to(delta) if isinstance(lam, Tensor) else lam)
        advantages = _backward_recursion(delta, decay, done, mask)
        return advantages, zero_where_masked(advantages + values[:, :-1], mask)


def turn_gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time+1"],
    terminated: Bool[Tensor, "batch time"],
    truncated: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    lam: float | Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    turn_starts: Bool[Tensor, "batch time"],
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Generalized advantage estimates (Turn-PPO, arXiv 2512.17008) in which a reply is one action: γ and λ count turns.

        δ_k = Σ_{t in turn k} r_t + γ (1 - terminated_k) V(s_{k+1}) - V(s_k),   s_k: before the first token of turn k
        Â_k = δ_k + γ λ (1 - done_k) Â_{k+1},   the same for every token of the turn
        R_t = Â_k + V(s_k) - Σ_{t' < t in turn k} r_{t'}

    Equal to `gae` where every turn has one token.

    Args:
        rewards: r_t.
        values: V(s_0) ... V(s_T); those before the first token of a turn are read, and after the last action of a row
            that is not terminated.
        terminated: As in `gae`.
        truncated: As in `gae`.
        gamma: Discount γ in [0, 1], per turn.
        lam: λ in [0, 1], per turn.
        mask: True = an action of the policy.
        turn_starts: True at the first action of each turn.

    Returns:
        Advantages and value targets, 0 outside the mask, without gradient.
    """
    _check_length(rewards, values)
    with torch.no_grad():
        turn_starts = turn_starts & mask
        earned, ended = zero_where_masked(rewards, mask), terminated & mask
        steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        turn = (turn_starts.long().cumsum(1) - 1).clamp(min=0)  # number of each step's turn
        start = torch.zeros_like(turn).scatter_add(1, turn, steps.masked_fill(~turn_starts, 0))  # of each turn
        count = turn_starts.sum(1, keepdim=True)

        def by_turn(flags: Tensor) -> Tensor:
            return torch.zeros_like(turn).scatter_add(1, turn, flags.long()) > 0

        end = torch.where(mask, steps, -1).amax(1, keepdim=True) + 1
        turn_values = torch.nn.functional.pad(values.gather(1, start), (0, 1)).scatter(1, count, values.gather(1, end))
        advantages, returns = gae(
            torch.zeros_like(earned).scatter_add(1, turn, earned), turn_values, by_turn(ended),
            by_turn(truncated & mask), gamma=gamma, lam=lam, mask=steps < count,
        )  # fmt: skip
        before = earned.cumsum(1) - earned
        earlier_in_turn = before - before.gather(1, start.gather(1, turn))
        targets = zero_where_masked(returns.gather(1, turn) - earlier_in_turn, mask)
        return zero_where_masked(advantages.gather(1, turn), mask), targets


def discounted_returns(
    rewards: Float[Tensor, "batch time"],
    terminated: Bool[Tensor, "batch time"],
    truncated: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    values: Float[Tensor, "batch time+1"] | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    """Monte-Carlo returns (Williams 1992): G_t = r_t + γ (1 - done_t) G_{t'}.

    Equal to `gae` with λ = 1, plus V(s_t). With `values`, a truncated step and the end of the rollout add γ V(s_{t+1})
    for the unobserved future; without, that future counts as 0.

    Args:
        rewards: r_t.
        terminated: The episode ended at t.
        truncated: The episode was cut off at t.
        gamma: Discount γ in [0, 1].
        values: V(s_0) ... V(s_T), read only after truncated and last steps.
        mask: True = an action of the policy; None: every step. Others are skipped without decay.

    Raises:
        ValueError: `values` is not one longer than `rewards`.
    """
    with torch.no_grad():
        mask = torch.ones_like(terminated) if mask is None else mask
        total = zero_where_masked(rewards, mask)
        if values is not None:
            _check_length(rewards, values)
            bootstrapped = (truncated | next_action_index(mask)[1]) & ~terminated & mask
            total = total + gamma * zero_where_masked(values[:, 1:], bootstrapped)
        return _backward_recursion(total, gamma, terminated | truncated, mask)


def length_adaptive_lam(
    mask: Bool[Tensor, "batch time"], alpha: float, *, low: float = 0.5, high: float = 1.0
) -> Float[Tensor, " batch"]:
    """λ of each row from its number of actions l (VAPO, Yue et al. 2025): λ = 1 - 1 / (α l), in [low, high].

    Without the bounds, λ is 0 at l = 1/α and negative below (α = 0.05: 20 actions), where GAE would alternate in sign.

    Args:
        mask: True = an action of the policy.
        alpha: α > 0; 0.05 in the article, for responses of thousands of tokens.
        low: Smallest λ, in [0, high].
        high: Largest λ, at most 1.

    Raises:
        ValueError: α is not positive, or the bounds are no interval in [0, 1].
    """
    if not (alpha > 0 and 0 <= low <= high <= 1):
        raise ValueError(
            f"expected alpha > 0 and 0 <= low <= high <= 1, got alpha={alpha}, low={low}, high={high}: λ outside "
            "[0, 1] makes advantages diverge or alternate in sign. VAPO uses alpha=0.05."
        )
    return (1 - 1 / (alpha * mask.sum(1).clamp(min=1).double())).clamp(low, high)


def rloo_advantages(scores: Float[Tensor, " batch"], group_size: int) -> Float[Tensor, " batch"]:
    """Leave-one-out advantages (Kool et al. 2019; Ahmadian et al. 2024): score minus the mean of the others.

    Args:
        scores: Groups one after the other: the `group_size` responses to a prompt are neighbors.
        group_size: Responses per prompt, >= 2.

    Raises:
        ValueError: The group size is below 2, or does not divide the batch.
    """
    groups = _reshape_to_groups(scores, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def grpo_advantages(
    scores: Float[Tensor, " batch"], group_size: int, *, normalize_std: bool, eps: float
) -> Float[Tensor, " batch"]:
    """Group-relative advantages (Shao et al. 2024, §4.1): (score - mean) / (std + eps) within each group.

    A group whose scores are all equal gets exactly 0.

    Args:
        scores: Groups one after the other: the `group_size` responses to a prompt are neighbors.
        group_size: Responses per prompt, >= 2.
        normalize_std: False does not divide by the standard deviation (Liu et al. 2025, "Dr. GRPO"): dividing by it
            gives more weight to prompts that are almost always, or almost never, solved.
        eps: Added to the standard deviation (n - 1 in its denominator), in units of the score.

    Raises:
        ValueError: The group size is below 2, or does not divide the batch.
    """
    groups = _reshape_to_groups(scores, group_size)
    centered = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        centered = centered / (groups.std(1, keepdim=True) + eps)
    constant = (groups == groups[:, :1]).all(1, keepdim=True)
    return centered.masked_fill(constant, 0).flatten()


def _check_length(rewards: Tensor, values: Tensor) -> None:
    if values.shape != (rewards.shape[0], rewards.shape[1] + 1):
        raise ValueError(
            f"values must be [batch, time + 1], one longer than rewards {tuple(rewards.shape)}, got "
            f"{tuple(values.shape)}: "
            "V of the state after the last step is what a truncated step bootstraps from. "
            "Append it, or zeros where every row terminates."
        )


def _backward_recursion(terms: Tensor, decay: float | Tensor, done: Tensor, mask: Tensor) -> Tensor:
    """x_t = terms_t + decay (1 - done_t) x_{t'}; a masked step passes x_{t'} on unchanged and is 0 in the result."""
    if not terms.shape[1]:
        return terms
    # A selection, not a product: 0 times the nan of a later episode is nan.
    stops = (done & mask).unbind(1)
    factors = torch.where(mask, torch.as_tensor(decay, dtype=terms.dtype, device=terms.device), 1).unbind(1)
    steps = zero_where_masked(terms, mask).unbind(1)
    next_value, results = torch.zeros_like(steps[0]), []
    for step, factor, stop in zip(reversed(steps), reversed(factors), reversed(stops), strict=True):
        next_value = step + (factor * next_value).masked_fill(stop, 0)
        results.append(next_value)
    return zero_where_masked(torch.stack(results[::-1], dim=1), mask)


def _reshape_to_groups(scores: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(
            f"group_size must be at least 2, got {group_size}: the baseline of a response is the mean of the others. "
            "Sample several responses per prompt (num_return_sequences), or use an algorithm with a critic."
        )
    if len(scores) % group_size:
        raise ValueError(
            f"the batch must consist of whole groups of {group_size}, got {len(scores)} scores: a response would be "
            "compared with those of another prompt. Make the batch size a multiple of group_size."
        )
    return scores.view(-1, group_size)
