"""Who asks the reward sources: every process about its own samples, or one about everybody's."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

from accelerate.utils import broadcast_object_list

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.rewards.sources import RewardRequest, RewardScores, RewardSourceError

Prepare: TypeAlias = Callable[[], RewardRequest]
Ask: TypeAlias = Callable[[RewardRequest], RewardScores]
Finish: TypeAlias = Callable[[RewardScores], RewardScores]
Scoring: TypeAlias = Callable[[Prepare, Ask, Finish], RewardScores]
"""(what to ask, how to ask it, what to do with the answer) -> scores: who of several processes asks is its matter."""


def make_scoring(processes: Processes, *, once: bool) -> Scoring:
    """How a rollout of all processes is scored.

    Args:
        processes: All of them call it together; if it fails for one, it fails for all.
        once: Let process 0 ask about the samples of all processes, in the order of the processes.
    """
    return partial(score_on_main if once and processes.accelerator.num_processes > 1 else score_locally, processes)


def score_locally(processes: Processes, prepare: Prepare, ask: Ask, finish: Finish) -> RewardScores:
    """Every process asks about its own samples."""
    return processes.run_or_fail_together(lambda: finish(ask(prepare())))


def score_on_main(processes: Processes, prepare: Prepare, ask: Ask, finish: Finish) -> RewardScores:
    """Process 0 asks about the samples of all; each is handed its own."""
    requests = processes.gather_objects([processes.run_or_fail_together(prepare)])
    all_scores = _on_main(processes, lambda: ask(concatenate_requests(requests)))
    sizes = [len(request.prompts) for request in requests]
    rank = processes.accelerator.process_index
    first = sum(sizes[:rank])
    own = select_scores(all_scores, slice(first, first + sizes[rank]), requests[rank])
    if rank:
        own = replace(own, failed_calls=0)  # process 0 counts them
    return processes.run_or_fail_together(lambda: finish(own))


def concatenate_requests(requests: list[RewardRequest]) -> RewardRequest:
    """One request about the samples of all, in their order."""
    lengths: list[int] | None = None
    if all(request.response_lengths is not None for request in requests):
        lengths = [length for request in requests for length in request.response_lengths or []]
    names = requests[0].columns
    return RewardRequest(
        prompts=list(chain.from_iterable(request.prompts for request in requests)),
        responses=list(chain.from_iterable(request.responses for request in requests)),
        columns={name: list(chain.from_iterable(request.columns[name] for request in requests)) for name in names},
        response_lengths=lengths,
    )


def select_scores(scores: RewardScores, rows: slice, request: RewardRequest) -> RewardScores:
    """What was said about the samples `rows`, which are those of `request`."""
    width = max(request.response_lengths or [0], default=0)
    return replace(
        scores,
        total=scores.total[rows],
        per_token=None if scores.per_token is None else scores.per_token[rows, :width],
        per_source={name: values[rows] for name, values in scores.per_source.items()},
        skipped=scores.skipped[rows],
        dropped=scores.dropped[rows],
    )


def _on_main(processes: Processes, work: Callable[[], RewardScores]) -> RewardScores:
    """`work()` of process 0, on every process; its error, too.

    Raises:
        RewardSourceError, TypeError, ValueError: What process 0 raised, of the same kind and with the same message.
    """
    said: list[Any] = [None, None]
    raised: Exception | None = None
    if processes.accelerator.is_main_process:
        try:
            said[0] = work()
        except Exception as error:
            raised, said[1] = error, (type(error).__name__, str(error))
    result, problem = broadcast_object_list(said)
    if raised is not None:
        raise raised
    if problem is not None:
        name, message = problem
        known = {kind.__name__: kind for kind in (RewardSourceError, TypeError, ValueError)}
        raise known.get(name, RewardSourceError)(message)
    found: RewardScores = result
    return found
