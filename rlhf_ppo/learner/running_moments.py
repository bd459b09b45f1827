"""Running mean and standard deviation of scores, observations and returns."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.batch import episode_of_rows, pad_rows
from rlhf_ppo.functional import normalize_episode_scores, total_scores
from rlhf_ppo.functional.masked import ReduceSum, identity


class RunningMoments:
    """Running mean and standard deviation of all samples (Chan et al. 1979), equal on all processes.

    Below two samples the standard deviation is 1, so that dividing by it does nothing.

    Args:
        shape: Shape of one sample: () for scores, that of the observation for observations. Moments are per entry.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.shape = shape
        self.count = 0
        """Number of samples, over all processes."""
        self.mean: Tensor = torch.zeros(shape, dtype=torch.float64)
        """float64, on the CPU."""
        self._squares = torch.zeros(shape, dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        """Standard deviation with n - 1 in the denominator, float64, on the CPU; 1 below two samples."""
        return _std(self._squares, self.count)

    def update(self, x: Float[Tensor, "samples ..."], reduce_sum: ReduceSum = identity) -> tuple[Tensor, Tensor]:
        """Add a batch; return the mean and standard deviation of this batch alone, over all processes.

        Args:
            x: Samples of this process, any floating dtype and device.
            reduce_sum: Sums over processes; every process must call `update`, even without samples.

        Raises:
            ValueError: A sample has another shape, or is not finite.
        """
        self._check(x)
        x = x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)
        count = int(reduce_sum(torch.tensor(len(x), device=x.device)))
        if count == 0:
            return torch.zeros(self.shape, dtype=torch.float64), torch.ones(self.shape, dtype=torch.float64)
        mean = reduce_sum(x.sum(0)) / count
        squares = reduce_sum((x - mean).square().sum(0)).cpu().double()
        mean = mean.cpu().double()
        total, delta = self.count + count, mean - self.mean
        self._squares = self._squares + squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total
        return mean, _std(squares, count)

    def normalize(
        self, x: Float[Tensor, "..."], *, shift_mean: bool, clip: float | None = None, eps: float = 1e-8
    ) -> Float[Tensor, "..."]:
        """Normalize samples: x / (std + eps), or (x - mean) / (std + eps), in the dtype and on the device of `x`.

        Args:
            x: One sample or many.
            shift_mean: Whether to subtract the mean; False for rewards, whose zero has a meaning.
            clip: Clip the result to [-clip, clip].
            eps: Added to the standard deviation, in units of `x`.
        """
        scale = (self.std + eps).to(x)
        normalized = (x - self.mean.to(x)) / scale if shift_mean else x / scale
        return normalized if clip is None else normalized.clamp(-clip, clip)

    def state_dict(self) -> dict[str, Tensor]:
        """Count, mean, and sum of squared deviations from the mean."""
        return {
            "count": torch.tensor(self.count, dtype=torch.int64),
            "mean": self.mean.clone(),
            "squares": self._squares.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from saved moments; a ValueError if they are of another shape."""
        for name, shape in {"count": (), "mean": self.shape, "squares": self.shape}.items():
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"expected moments of shape {self.shape}, got {name} of shape {tuple(state[name].shape)}: they "
                    "were saved for other observations. Build the environment that the checkpoint was made with."
                )
        self.count = int(state["count"])
        self.mean = state["mean"].cpu().double().clone()
        self._squares = state["squares"].cpu().double().clone()

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"expected samples of shape {self.shape} behind the batch dimension, got {tuple(x.shape)}: moments of "
                "different quantities would be mixed. Pass [samples, *shape]."
            )
        if not bool(torch.isfinite(x).all()):
            rows = (~torch.isfinite(x.reshape(len(x), -1)).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"expected finite samples, got nan or inf in sample(s) {rows}: one would spoil the moments for the "
                "rest of the run. Leave these samples out, or repair their source."
            )


def _std(squares: Tensor, count: int) -> Tensor:
    return (squares / (count - 1)).sqrt() if count > 1 else torch.ones_like(squares)


def normalize_scores(
    scores: Float[Tensor, "..."],
    mask: Bool[Tensor, "batch time"],
    moments: RunningMoments,
    *,
    scale: bool,
    shift: bool,
    clip: float | None,
    reduce_sum: ReduceSum = identity,
    continues: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, "..."]:
    """Divide the total scores of episodes by their running standard deviation, then clip (`normalize_episode_scores`).

    Args:
        scores: [B], or [B, T] per token.
        mask: True = an action of the policy; scores per token are read nowhere else.
        moments: Moments of earlier totals; updated with those of `scores` first.
        scale: Whether to divide; if False, `moments` are not updated.
        shift: Whether to subtract the running mean too.
        clip: Largest absolute total afterwards; None: no clipping.
        continues: True where the next row goes on with the same episode; None: nowhere.
    """
    if continues is not None and bool(continues.any()):  # the rows of an episode one after the other, as one
        counts, width = episode_of_rows(continues).bincount().tolist(), scores.shape[1]
        whole, own = (pad_rows([part.flatten() for part in rows.split(counts)]) for rows in (scores, mask.float()))
        normalized = normalize_scores(
            whole, own.bool(), moments, scale=scale, shift=shift, clip=clip, reduce_sum=reduce_sum
        )
        return torch.cat([row[: count * width].view(-1, width) for row, count in zip(normalized, counts, strict=True)])
    mean, deviation = 0.0, 1.0
    if scale:
        moments.update(total_scores(scores, mask), reduce_sum)
        mean, deviation = float(moments.mean) if shift else 0.0, float(moments.std) + torch.finfo(scores.dtype).eps
    return normalize_episode_scores(scores, mask, mean=mean, deviation=deviation, clip=clip)
