"""The learning curve, and a strip of frames."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave

from rlhf_ppo.control import ControlTrainer, render_frames
from rlhf_ppo.report import RunFolder


def draw_learning_curve(folder: RunFolder, *, title: str) -> Path:
    """`learning_curve.png`: return of the last 20 and 100 training episodes over environment steps."""
    rows = folder.metrics()
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    for name, label, width in (("return/last_20", "last 20 episodes", 1.0), ("return/last_100", "last 100", 2.0)):
        axis.plot([row["steps"] for row in rows], [row[name] for row in rows], label=label, linewidth=width)
    axis.set(title=title, xlabel="environment steps", ylabel="return of training episodes")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return folder.write_bytes("learning_curve.png", _png(figure))


def draw_frames(trainer: ControlTrainer, folder: RunFolder, *, count: int) -> Path:
    """`frames.png`: `count` pictures of one episode with the most likely actions, side by side.

    Raises:
        RuntimeError: There is no way to render on this machine.
    """
    config = trainer.config.environment
    pictures = render_frames(
        trainer.policy, trainer.normalizer, config, count=count, every=12, seed=trainer.config.seed
    )
    return folder.write_bytes("frames.png", _strip(pictures))


def _strip(pictures: Sequence[Any]) -> bytes:
    """Every second pixel is enough for a strip."""
    target = io.BytesIO()
    imsave(target, np.concatenate([picture[::2, ::2] for picture in pictures], axis=1))
    return target.getvalue()


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
