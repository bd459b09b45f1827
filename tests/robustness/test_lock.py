"""Two runs in one folder would replace each other's checkpoints: the second is refused, a killed one blocks nobody."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_ppo.checkpoints import FolderInUseError, lock_run_folder
from rlhf_ppo.checkpoints.folders import write_json
from rlhf_ppo.checkpoints.lock import HOLDER_FILE, LOCK_FILE
from tests.robustness.another_run import another_run_in
from tests.support.tiny_run import config, parameters, share_of_e, trainer


def test_a_second_run_in_a_folder_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    own = trainer()
    before = parameters(own).clone()
    with another_run_in(tmp_path):
        write_json(tmp_path / HOLDER_FILE, {"process": 4711, "machine": "node-3", "since": "2026-01-01T00:00:00+00:00"})
        with pytest.raises(FolderInUseError, match=r"process 4711 on node-3 since 2026-01-01.*another output_dir"):
            own.train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    assert torch.equal(parameters(own), before)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, HOLDER_FILE}


def test_a_run_that_was_killed_blocks_nobody(tmp_path: Path) -> None:
    """The system gives the lock back with the process; what it said of itself is no lock."""
    with another_run_in(tmp_path) as process:
        process.kill()
        process.wait()
        write_json(tmp_path / HOLDER_FILE, {"process": process.pid, "machine": "here", "since": "then"})
        with lock_run_folder(tmp_path):
            assert json.loads((tmp_path / HOLDER_FILE).read_text())["process"] == os.getpid()


def test_one_process_may_ask_twice_and_the_folder_is_free_only_after_both(tmp_path: Path) -> None:
    """A recipe holds the folder from its first phase to its report, `train()` within."""
    lock = str(tmp_path.resolve() / LOCK_FILE)
    question = f"import filelock; filelock.FileLock({lock!r}).acquire(timeout=0)"

    def is_free() -> bool:
        return subprocess.run([sys.executable, "-c", question], capture_output=True, check=False).returncode == 0

    with lock_run_folder(tmp_path):
        with lock_run_folder(tmp_path):
            assert (tmp_path / HOLDER_FILE).is_file()
        assert (tmp_path / HOLDER_FILE).is_file()
        assert not is_free()
    assert is_free()
    assert not (tmp_path / HOLDER_FILE).exists()


def test_where_the_file_system_knows_no_locks_a_warning_says_that_nothing_guards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems whose lock service does not run."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(
        UserWarning, match=r"cannot be locked .*No locks available.* a second run in it would not be refused"
    ):
        with lock_run_folder(tmp_path):
            pass


def test_an_error_inside_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"):
        with lock_run_folder(tmp_path):
            raise RuntimeError("inside")
    with another_run_in(tmp_path):
        pass
