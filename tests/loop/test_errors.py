"""Errors after a rollout: the finished iterations are saved, and the same call goes on from them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo import TrainConfig, TrainState
from rlhf_ppo.checkpoints.folders import latest_checkpoint
from rlhf_ppo.rewards.sources import RewardFailures, RewardSourceError
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.tiny_run import TEXTS, config, parameters, share_of_e, trainer

DROP = RewardFailures(on_failure="drop", backoff=0.0)


def broken_from(call: int, breaks: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A reward source that is well, and from a call on does what `breaks` does."""
    calls = []

    def source(responses: Sequence[str], **_: Any) -> list[Any]:
        calls.append(1)
        return breaks(responses) if len(calls) >= call else share_of_e([], responses)

    return source


def dies(_: Sequence[str]) -> list[Any]:
    raise OSError("no route")


def scores_none(responses: Sequence[str]) -> list[Any]:
    return [None] * len(responses)


def resumed_like_undisturbed(folder: Path, **settings: Any) -> bool:
    """Whether the run goes on from the second iteration, and ends with the weights of one that nothing disturbed."""
    assert latest_checkpoint(folder) == folder / "checkpoint-2"
    whole, resumed = trainer(), trainer()
    whole.train(share_of_e, config(iterations=3))
    state = resumed.train(share_of_e, config(folder, iterations=3, **settings))
    return len(state.history) == 1 and torch.equal(parameters(whole), parameters(resumed))


def test_a_batch_that_a_source_skips_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every sample of the batch was skipped"):
        trainer().train(broken_from(3, scores_none), config(tmp_path, iterations=3))
    assert resumed_like_undisturbed(tmp_path)


@pytest.mark.filterwarnings("ignore:A rollout was lost")
def test_lost_rollouts_end_the_run_with_a_checkpoint_that_counts_them_anew(tmp_path: Path) -> None:
    with pytest.raises(RewardSourceError, match="none in 3 rollouts in a row"):
        trainer().train(broken_from(3, dies), config(tmp_path, iterations=3, reward_failures=DROP))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    calls = []

    def dies_once(responses: Sequence[str], **_: Any) -> list[float]:
        calls.append(1)
        return dies(responses) if len(calls) == 1 else share_of_e([], responses)

    state = trainer().train(dies_once, config(tmp_path, iterations=3, reward_failures=DROP))
    assert state.iteration == 3
    assert state.history[0]["env/rollouts_lost"] == 4.0


def test_a_batch_of_nothing_but_truncated_responses_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """Whatever is refused before anything changes leaves the iterations before it."""
    own = trainer()

    def stops_never(_: Any, state: TrainState) -> None:
        if state.iteration == 2:
            own.processes.any_process = lambda flag: False  # no process has a response to learn from

    stops = SamplingConfig(max_new_tokens=6, stop_token_ids=tuple(range(3, 320, 2)))
    settings = {"iterations": 3, "sampling": stops, "output_dir": str(tmp_path), "progress": False}
    with pytest.raises(ValueError, match="expected a response that takes part in the loss"):
        own.train(share_of_e, TrainConfig(mask_truncated=True, **settings), callbacks=[stops_never])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_judge_that_fails_ends_the_run_with_its_iteration_saved_and_recorded(tmp_path: Path) -> None:
    own = trainer()
    arguments = {"eval_prompts": PromptDataset.from_texts(TEXTS, own.tokenizer)}
    with pytest.raises(RewardSourceError, match="no route"):
        own.train(share_of_e, config(tmp_path, eval_every=2), judges={"judge": broken_from(1, dies)}, **arguments)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert resumed_like_undisturbed(tmp_path)


def test_a_callback_that_fails_ends_the_run_with_its_iteration_saved(tmp_path: Path) -> None:
    def fails(_: Any, state: TrainState) -> None:
        if state.iteration == 2:
            raise OSError("no space for the plot")

    with pytest.raises(OSError, match="no space for the plot"):
        trainer().train(share_of_e, config(tmp_path, iterations=3), callbacks=[fails])
    assert resumed_like_undisturbed(tmp_path)
