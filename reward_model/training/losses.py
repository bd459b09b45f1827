"""Preference losses, as pure functions from scores to one loss per comparison.

In every model below exp(r) is the strength of a completion with score r, and only differences of scores within one
comparison matter (except for `centering_penalty`).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Pairs = Float[Tensor, " pairs"]
Groups = Float[Tensor, " groups"]


def bradley_terry_loss(
    chosen: Pairs,
    rejected: Pairs,
    *,
    margin: Pairs | None = None,
    preference: Pairs | None = None,
    label_smoothing: float = 0.0,
) -> Pairs:
    """Negative log-likelihood of a pair (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

        z = r_chosen - r_rejected - margin
        loss = -q log σ(z) - (1 - q) log σ(-z),     q = (1 - ε) p + ε (1 - p)

    Args:
        chosen, rejected: Scores of the two completions.
        margin: How far apart the scores should at least be, in score units (Touvron et al. 2023, eq. 2); None is 0.
        preference: p, the probability in [0, 1] that `chosen` is the better one; None is 1.
        label_smoothing: ε, the assumed share of flipped labels.
    """
    logits = chosen - rejected if margin is None else chosen - rejected - margin
    target = torch.ones_like(logits) if preference is None else preference
    target = (1 - label_smoothing) * target + label_smoothing * (1 - target)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def davidson_log_probabilities(difference: Pairs, *, tie_strength: float) -> Float[Tensor, "pairs outcomes"]:
    """Log-probabilities of (win, loss, tie) in the Davidson model of ties (Davidson 1970, eq. 2.4).

        P(win) ∝ exp(d / 2),  P(loss) ∝ exp(-d / 2),  P(tie) ∝ ν,        d = r_chosen - r_rejected

    At ν = 0 it is Bradley-Terry; between equals a tie has probability ν / (2 + ν).

    Args:
        difference: d, of each pair.
        tie_strength: ν >= 0.
    """
    tie = torch.full_like(difference, tie_strength).log()
    return torch.stack((difference / 2, -difference / 2, tie), dim=-1).log_softmax(dim=-1)


def davidson_loss(
    chosen: Pairs,
    rejected: Pairs,
    tie: Bool[Tensor, " pairs"],
    *,
    tie_strength: float,
    margin: Pairs | None = None,
    preference: Pairs | None = None,
    label_smoothing: float = 0.0,
) -> Pairs:
    """Negative log-likelihood of a win, loss or tie in the Davidson (1970) model.

    Davidson and not Rao-Kupper (1967): its three outcomes are one softmax, it keeps the Bradley-Terry odds between
    win and loss, and the expected number of points (win 1, tie 1/2) stays a sufficient statistic.

    Args:
        chosen, rejected: Scores of the two completions; which is which does not matter in a tie.
        tie: True where neither is better; `preference`, `margin` and smoothing are not used there.
        tie_strength: ν > 0, see `davidson_log_probabilities`.
        margin, preference, label_smoothing: As in `bradley_terry_loss`.
    """
    difference = chosen - rejected
    if margin is not None:
        difference = torch.where(tie, difference, difference - margin)
    win, loss, draw = davidson_log_probabilities(difference, tie_strength=tie_strength).unbind(dim=-1)
    target = torch.ones_like(win) if preference is None else preference
    target = (1 - label_smoothing) * target + label_smoothing * (1 - target)
    return -torch.where(tie, draw, target * win + (1 - target) * loss)


def plackett_luce_loss(
    scores: Float[Tensor, "groups items"], ranks: Int[Tensor, "groups items"], mask: Bool[Tensor, "groups items"]
) -> Groups:
    """Negative log-likelihood of a ranking under Plackett-Luce (Luce 1959; Plackett 1975), best first.

        loss = -Σ_i [ r_i - log Σ_{j: rank_j >= rank_i} exp(r_j) ]

    The sum is over all items but those of the last rank, which are not chosen over any other. Items that share a rank
    share one denominator (Breslow 1974). With two items it is Bradley-Terry.

    Args:
        scores: Scores of the items of each comparison.
        ranks: 0 is best; equal numbers are ties.
        mask: True for an item, False for padding.
    """
    padding = ~mask
    scores = scores.masked_fill(padding, 0.0)
    last = ranks.masked_fill(padding, -1).amax(dim=1, keepdim=True)
    at_risk = (ranks[:, None, :] >= ranks[:, :, None]) & mask[:, None, :]
    at_risk = at_risk | padding[:, :, None]  # a padded row needs a finite denominator; it is dropped below
    denominators = scores[:, None, :].expand(at_risk.shape).masked_fill(~at_risk, -torch.inf).logsumexp(dim=-1)
    counted = mask & (ranks < last)
    return torch.where(counted, denominators - scores, 0.0).sum(dim=1)


def centering_penalty(scores: Float[Tensor, "groups items"], mask: Bool[Tensor, "groups items"]) -> Groups:
    """Penalty on the level of a comparison's scores (Eisenstein et al. 2023, eq. 2), which keeps rewards near mean 0.

    (r_1 + ... + r_K)² (2 / K)²: for a pair the (r_chosen + r_rejected)² of the paper.
    """
    count = mask.sum(dim=1).clamp(min=1)
    return (scores.masked_fill(~mask, 0.0).sum(dim=1) * 2 / count) ** 2


def weighted_mean(losses: Groups, weights: Groups, total: Tensor | None = None) -> Float[Tensor, ""]:
    """Weighted mean Σ w l / Σ w: a comparison of weight 2 counts as two equal ones.

    Args:
        losses: One per comparison.
        weights: >= 0, one per comparison.
        total: Sum of weights of the whole optimizer step, over micro-batches and processes; None is the sum here.
    """
    denominator = weights.sum() if total is None else total
    return (losses * weights).sum() / denominator.clamp(min=torch.finfo(losses.dtype).tiny)
