"""A made-up run with the shape of a real one: the score rises, KL goes to a plateau, entropy falls."""

import math
import random
from pathlib import Path

from rlhf_ppo.report import RunFolder, Sample, TokenTrace

PROMPTS = [
    "This film was", "I watched it with my family and", "The director's second", "After ten minutes I",
    "A story about two sisters", "When the lights went", "My expectations were low, but", "The soundtrack alone",
]  # fmt: skip
BEFORE = [
    " a bit of a disappointment. The plot goes nowhere and the jokes are old.",
    " we talked about something else after half an hour. It is not that bad, though.",
    " feature is a long walk through an empty house.",
    " looked at my watch. Then it got better, a little.",
]
AFTER = [
    " a joy from start to end, warm and funny, and the cast is wonderful.",
    " we all loved it. The kids laughed, and so did I. A lovely evening.",
    " feature is even better than his first: beautifully shot, with a great heart.",
    " was completely in love with these characters. A wonderful little film.",
]


def metrics_at(step: int, steps: int, draw: random.Random) -> dict[str, float]:
    """The numbers of one iteration under their usual names."""
    done = 1 - math.exp(-3.5 * step / steps)
    return {
        "ppo/mean_scores": -0.4 + 2.2 * done + draw.gauss(0, 0.12),
        "ppo/std_scores": 1.0 - 0.45 * done + draw.gauss(0, 0.03),
        "objective/kl": 7.5 * done + draw.gauss(0, 0.25),
        "objective/kl_coef": 0.2 * math.exp(0.4 * math.sin(3 * done)),
        "objective/entropy": 62 - 14 * done + draw.gauss(0, 1.2),
        "ppo/policy/entropy": 3.1 - 0.8 * done + draw.gauss(0, 0.05),
        "ppo/policy/approxkl": 0.004 + 0.01 * done * draw.random(),
        "ppo/policy/clipfrac": 0.03 + 0.08 * done * draw.random(),
        "ppo/loss/value": 0.9 * math.exp(-2 * done) + 0.1 + draw.gauss(0, 0.03),
        "ppo/val/var_explained": math.nan if step == 1 else -0.3 + 0.95 * done + draw.gauss(0, 0.05),
        "tokens/responses_len_mean": 21 + 2 * done + draw.gauss(0, 0.4),
        "tokens/responses_len_std": 4.0,
        "ppo/updates_skipped": 0.0,
    }


def write_synthetic_run(path: Path, *, steps: int = 120, samples: int = 64) -> RunFolder:
    """Everything a run folder can hold, from one seed."""
    draw = random.Random(0)
    run = RunFolder.create(path)
    run.write_config(
        {
            "model": "owner/gpt2-reviews",
            "seed": 0,
            "ppo": {"clip_range": 0.2, "whiten_rewards": False, "target_kl": None},
        }
    )
    for step in range(1, steps + 1):
        run.append_metrics(step, metrics_at(step, steps, draw))
    run.write_evaluation(
        before={
            "vader": (0.204, 0.022), "classifier": (0.512, 0.014), "distinct_2": (0.874, 0.002),
            "perplexity": (31.2, 0.9),
        },
        after={
            "vader": (0.671, 0.016), "classifier": (0.884, 0.009), "distinct_2": (0.791, 0.003),
            "perplexity": (27.9, 0.8),
            "kl": (7.43, 0.12), "length": (22.8, 0.2), "words_per_line": (9.1, 0.1),
        },
    )  # fmt: skip
    run.write_samples(_sample(index, draw) for index in range(samples))
    run.append_tokens(_trace(index, steps, draw) for index in range(4))
    return run


def _sample(index: int, draw: random.Random) -> Sample:
    low, high = max(-1.0, min(1.0, draw.gauss(0.2, 0.45))), max(-1.0, min(1.0, draw.gauss(0.7, 0.28)))
    return Sample(
        prompt=PROMPTS[index % len(PROMPTS)],
        before=BEFORE[index % len(BEFORE)],
        after=AFTER[index % len(AFTER)],
        before_scores={"vader": low, "classifier": 0.5 + 0.35 * low},
        after_scores={"vader": high, "classifier": min(1.0, 0.6 + 0.4 * high)},
    )


def _trace(index: int, iteration: int, draw: random.Random) -> TokenTrace:
    tokens = [" " + word for word in AFTER[index].split()]
    values = [0.5 + 0.8 * place / len(tokens) + draw.gauss(0, 0.15) for place in range(len(tokens))]
    return TokenTrace(
        iteration=iteration,
        prompt=PROMPTS[index],
        score=1.2 + draw.gauss(0, 0.4),
        tokens=tokens,
        logprobs=[-abs(draw.gauss(2, 1.5)) for _ in tokens],
        kl=[draw.gauss(0.3, 0.5) for _ in tokens],
        values=values,
        advantages=[draw.gauss(0, 1) for _ in tokens],
    )
