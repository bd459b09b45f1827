"""What is worth plotting of a run: which metrics, in which units, and how to read the curve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One curve over the iterations."""

    metrics: tuple[str, ...]
    """Names under which the metric may stand; the first that the run has is drawn."""
    label: str
    """The vertical axis, with its unit."""
    band: str = ""
    """A metric whose ± is drawn as a band around the curve."""
    zero: bool = False
    """Whether zero means something here and is marked."""
    noisy: bool = True
    """Whether a long curve gets a moving average."""


@dataclass(frozen=True)
class Figure:
    """Panels that share the iterations, and what a reader should look for."""

    name: str
    """File name under plots/, without its ending."""
    title: str
    reading: str
    """What a healthy curve looks like, in a sentence or two."""
    panels: tuple[Panel, ...]


FIGURES = (
    Figure(
        "reward",
        "Reward",
        "Mean score of the sampled responses, before the KL penalty. It should rise and then level off; "
        "the band is one standard deviation over the batch.",
        (Panel(("ppo/mean_scores", "env/reward_mean"), "score", band="ppo/std_scores"),),
    ),
    Figure(
        "kl",
        "KL to the reference",
        "How far the policy has moved from the model it started as, and what a nat of it costs. A slow rise to a "
        "plateau is healthy; a clearly negative value means that sampling and scoring disagree.",
        (
            Panel(("objective/kl",), "KL (nats per response)", zero=True),
            Panel(("objective/kl_coef",), "KL coefficient", noisy=False),
        ),
    ),
    Figure(
        "entropy",
        "Entropy",
        "How open the policy still is. A gentle fall is learning; a fall towards zero is collapse to one answer.",
        (
            Panel(("ppo/policy/entropy",), "entropy (nats per token)"),
            Panel(("objective/entropy",), "surprise of samples\n(nats per response)"),
        ),
    ),
    Figure(
        "length",
        "Response length",
        "Tokens per response, with one standard deviation. A drift without a reason is often the reward's loophole.",
        (Panel(("tokens/responses_len_mean",), "length (tokens)", band="tokens/responses_len_std"),),
    ),
    Figure(
        "value",
        "Value function",
        "The critic's error and the share of the variance of the returns that it explains. Explained variance should "
        "climb above 0; at 0 or below the critic is no better than a constant.",
        (
            Panel(("ppo/loss/value",), "value loss"),
            Panel(("ppo/val/var_explained",), "explained variance", zero=True),
        ),
    ),
    Figure(
        "update",
        "Size of the updates",
        "How far one iteration moves the policy, and how often the clip stops it. Usual are an approximate KL below "
        "0.02 nats per token and a clip fraction below 0.2.",
        (
            Panel(("ppo/policy/approxkl",), "approx. KL to the\nold policy (nats/token)"),
            Panel(("ppo/policy/clipfrac",), "clip fraction"),
        ),
    ),
)

FRONTIER_TITLE = "Reward against KL"
FRONTIER_READING = (
    "Each dot is an iteration: what score was bought for what distance from the reference. Up and to the left is "
    "better; a curve that bends over to the right pays with KL for nothing."
)
HISTOGRAM_TITLE = "Held-out scores before and after"
HISTOGRAM_READING = (
    "How the judges' scores of the held-out responses are spread. A shift of the whole hill is learning; a single "
    "spike is a policy that repeats itself."
)
