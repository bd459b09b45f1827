"""Metrics of one iteration's rollout, over all processes."""

from rlhf_ppo.diagnostics.guards import repetition
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.rewards.sources import RewardScores
from rlhf_ppo.rollout.collect import DecodedResponses
from rlhf_ppo.rollout.episodes import episode_metrics


def rollout_metrics(
    processes: Processes, collected: DecodedResponses, scores: RewardScores
) -> tuple[dict[str, float], float]:
    """Metrics of scores and episodes, and the mean share of repeated 3-grams. Collective."""
    first, *rest = processes.gather_objects([scores])
    all_scores: RewardScores = first.joined(rest)
    finished = processes.gather_objects(collected.samples.finished)
    repeated = processes.gather_objects([repetition(tokens.tolist()) for tokens in collected.own_tokens()])
    metrics = all_scores.metrics() | {
        "env/reward_mean": float(all_scores.total[~all_scores.skipped].mean()),
        "tokens/finished_share": sum(finished) / len(finished),
    }
    numbers = []
    if collected.episodes is not None:
        numbers = processes.gather_objects([episode.numbers() for episode in collected.episodes])
    if collected.episodes is not None or collected.counts:
        metrics |= episode_metrics(numbers, processes.gather_objects([collected.counts]))
    return metrics, sum(repeated) / len(repeated)


def progress_postfix(metrics: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows."""
    shown = {"reward": "env/reward_mean", "kl": "objective/kl", "length": "tokens/responses_len_mean"}
    return {name: f"{metrics[key]:.3g}" for name, key in shown.items() if key in metrics}
