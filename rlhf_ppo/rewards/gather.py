"""Score samples on every process, or all samples on the main process."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from accelerate.utils import broadcast_object_list

from rlhf_ppo.batch import join_columns
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.rewards.sources import RewardRequest, RewardScores, RewardSourceError

Prepare: TypeAlias = Callable[[], RewardRequest]
Score: TypeAlias = Callable[[RewardRequest], RewardScores]
Postprocess: TypeAlias = Callable[[RewardScores], RewardScores]
Scoring: TypeAlias = Callable[[Prepare, Score, Postprocess], RewardScores]
"""(make the request, call the sources, postprocess the scores) -> scores of this process's samples."""


def make_scoring(processes: Processes, *, on_main: bool) -> Scoring:
    """Make the function that scores a rollout; it is collective, and an error on one process is raised on all.

    Args:
        on_main: Whether process 0 scores the samples of all processes, in rank order.
    """
    return partial(score_on_main if on_main and processes.accelerator.num_processes > 1 else score_locally, processes)


def score_locally(processes: Processes, prepare: Prepare, score: Score, postprocess: Postprocess) -> RewardScores:
    """Call the sources on every process for its own samples."""
    return processes.run_or_fail_together(lambda: postprocess(score(prepare())))


def score_on_main(processes: Processes, prepare: Prepare, score: Score, postprocess: Postprocess) -> RewardScores:
    """Call the sources on process 0 for all samples; return those of this process."""
    requests = processes.gather_objects([processes.run_or_fail_together(prepare)])
    all_scores = _broadcast_from_main(processes, lambda: score(concatenate_requests(requests)))
    sizes = [len(request.prompts) for request in requests]
    rank = processes.accelerator.process_index
    start = sum(sizes[:rank])
    own_scores = select_scores(all_scores, range(start, start + sizes[rank]), requests[rank])
    if rank:
        own_scores = replace(own_scores, failed_calls=0)  # process 0 counts them
    return processes.run_or_fail_together(lambda: postprocess(own_scores))


def concatenate_requests(requests: list[RewardRequest]) -> RewardRequest:
    """Concatenate requests into one, in order."""
    return RewardRequest(**join_columns(requests, ("prompts", "responses", "columns", "response_lengths")))


def select_scores(scores: RewardScores, rows: range, request: RewardRequest) -> RewardScores:
    """Scores of the samples `rows`, per-token scores cut to the longest response of `request`."""
    own = scores.select(rows)
    width = max(request.response_lengths or [0], default=0)
    return own if own.per_token is None else replace(own, per_token=own.per_token[:, :width])


def _broadcast_from_main(processes: Processes, work: Callable[[], RewardScores]) -> RewardScores:
    """Run `work()` on process 0; broadcast its result, or its error with the same type and message."""
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if processes.accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as raised:
            error, outcome[1] = raised, (type(raised).__name__, str(raised))
    result, failure = broadcast_object_list(outcome)
    if error is not None:
        raise error
    if failure is not None:
        name, message = failure
        error_types = {error_type.__name__: error_type for error_type in (RewardSourceError, TypeError, ValueError)}
        raise error_types.get(name, RewardSourceError)(message)
    scores: RewardScores = result
    return scores
