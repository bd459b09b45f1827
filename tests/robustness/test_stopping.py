"""Signals and time limits: the phase is finished or dropped, a checkpoint written; a second signal leaves at once."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ppo import PPOTrainer, TrainState
from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.folders import find_damage, latest_checkpoint, list_checkpoints
from rlhf_ppo.loop import signals
from rlhf_ppo.loop.signals import TimeLimit
from tests.support.tiny_run import config, parameters, share_of_e, trainer


def whole() -> torch.Tensor:
    """Weights of three iterations that nobody stops."""
    torch.manual_seed(0)
    own = trainer()
    own.train(share_of_e, config(iterations=3))
    return parameters(own)


def run(folder: Path, rewards: Any = share_of_e, **wishes: Any) -> tuple[PPOTrainer, TrainState]:
    """Three iterations, or what is left of them."""
    callbacks = wishes.pop("callbacks", ())
    torch.manual_seed(0)
    own = trainer()
    return own, own.train(rewards, config(folder, iterations=3, **wishes), callbacks=callbacks)


class SignalsAt:
    """A reward source that sends this process signals when it is asked for the n-th time."""

    def __init__(self, call: int, *signals: int) -> None:
        self.call, self.signals, self.calls = call, signals, 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.call:
            for number in self.signals:
                os.kill(os.getpid(), number)
        return share_of_e(prompts, responses)


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR1"))]
)
def test_a_rollout_that_a_signal_meets_is_dropped_and_drawn_again_when_the_run_goes_on(
    name: str, tmp_path: Path
) -> None:
    """The second rollout has used up random numbers and prompts by then; none of it may be noticed later."""
    _, state = run(tmp_path, SignalsAt(2, getattr(signal, name)))
    assert (state.stopped, state.interrupted, state.iteration) == (name, True, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    resumed, state = run(tmp_path)
    assert (state.stopped, state.interrupted, state.iteration) == (None, False, 3)
    assert torch.equal(parameters(resumed), whole())


def test_an_update_that_a_signal_meets_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its steps would be a state that no rollout belongs to."""
    step, calls = torch.optim.Adam.step, []

    def signaled(self: torch.optim.Adam, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", signaled)
        _, state = run(tmp_path)
    assert (state.stopped, state.iteration, len(calls)) == ("SIGTERM", 2, 8)
    resumed, _ = run(tmp_path)
    assert torch.equal(parameters(resumed), whole())


def test_a_stop_whose_line_nobody_reads_any_more_is_a_stop_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends `tee` of `2>&1 | tee log`, too: writing to the pipe then fails."""

    def broken_pipe(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("rlhf_ppo.loop.signals.os.write", broken_pipe)
    _, state = run(tmp_path, SignalsAt(3, signal.SIGINT))
    assert (state.iteration, state.stopped) == (2, "SIGINT")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_second_signal_leaves_at_once_and_what_was_saved_is_whole(tmp_path: Path) -> None:
    rewards = SignalsAt(3, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rewards, save_every=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path))
    resumed, _ = run(tmp_path)
    assert torch.equal(parameters(resumed), whole())


@pytest.mark.slow
def test_a_second_signal_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = folders.commit_checkpoint

    def interrupted(aside: Path, *, keep_last: int) -> Path:
        if "checkpoint-2" in aside.name:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return commit(aside, keep_last=keep_last)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "commit_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, save_every=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    resumed, _ = run(tmp_path)
    assert torch.equal(parameters(resumed), whole())


@pytest.mark.slow
def test_the_time_limit_stops_where_one_more_iteration_would_not_fit(tmp_path: Path) -> None:
    _, state = run(tmp_path, max_time=1e-6)
    assert (state.stopped, state.interrupted, state.iteration) == ("time limit", True, 1)
    resumed, _ = run(tmp_path, max_time=3600.0)
    assert torch.equal(parameters(resumed), whole())


def test_the_time_limit_counts_what_an_iteration_takes_with_its_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is evaluated and saved takes longer than others: the next of its kind must fit, too."""
    times = iter([0.0, 10.0, 40.0, 50.0, 80.0])  # iterations of 10, 30, 10 and 30 seconds
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(times)))
    limit = TimeLimit(80.0)
    assert [limit.is_near() for _ in range(4)] == [False, False, False, True]


def test_a_callback_that_stops_the_run_is_no_interruption(tmp_path: Path) -> None:
    _, state = run(tmp_path, callbacks=[lambda _, state: state.iteration == 2])
    assert (state.stopped, state.interrupted) == ("callback", False)
