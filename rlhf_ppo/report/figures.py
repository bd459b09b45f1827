"""Which metrics the report plots, with units and how to read the curves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One curve over iterations."""

    metrics: tuple[str, ...]
    """Names of the metric; the first that the run has is plotted."""
    label: str
    """Label of the vertical axis, with unit."""
    band: str = ""
    """Metric plotted as a ± band around the curve; "": none."""
    zero: bool = False
    """Whether to mark zero."""
    noisy: bool = True
    """Whether a long curve gets a moving average."""


@dataclass(frozen=True)
class Figure:
    """Panels over the same iterations, and how to read them."""

    name: str
    """File name under plots/, without extension."""
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
        "How random the policy still is. A slow fall is learning; a fall towards zero is collapse to one answer.",
        (
            Panel(("ppo/policy/entropy",), "entropy (nats per token)"),
            Panel(("objective/entropy",), "-log p of samples\n(nats per response)"),
        ),
    ),
    Figure(
        "length",
        "Response length",
        "Tokens per response, with one standard deviation. An unexplained drift is often reward hacking.",
        (Panel(("tokens/responses_len_mean",), "length (tokens)", band="tokens/responses_len_std"),),
    ),
    Figure(
        "value",
        "Value function",
        "The critic's error and the share of the variance of the returns that it explains. Explained variance should "
        "climb above 0; at 0 or below the critic is no better than a constant.",
        (Panel(("ppo/loss/value",), "value loss"), Panel(("ppo/val/var_explained",), "explained variance", zero=True)),
    ),
    Figure(
        "calibration",
        "Calibration of the critic",
        "Mean of the value minus its target, at the first and at the last fifth of the responses. Both should come to "
        "0; a critic that is low at the start of responses has not had enough warm-up.",
        (
            Panel(("ppo/val/bias_1",), "bias, first fifth", zero=True),
            Panel(("ppo/val/bias_5",), "bias, last fifth", zero=True),
        ),
    ),
    Figure(
        "update",
        "Size of the updates",
        "How far one iteration moves the policy, and how often the clip acts. Usual are an approximate KL below "
        "0.02 nats per token and a clip fraction below 0.2.",
        (
            Panel(("ppo/policy/approxkl",), "approx. KL to the\nold policy (nats/token)"),
            Panel(("ppo/policy/clipfrac",), "clip fraction"),
        ),
    ),
)

FRONTIER_TITLE = "Reward against KL"
FRONTIER_READING = (
    "Each dot is an iteration: its score against its KL to the reference. Up and to the left is better; a curve "
    "that flattens to the right spends KL without gaining score."
)
HISTOGRAM_TITLE = "Held-out scores before and after"
HISTOGRAM_READING = (
    "Distribution of the judges' scores of held-out responses. A shift of the whole distribution is learning; a "
    "single spike is a policy that repeats itself."
)
