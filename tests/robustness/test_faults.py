"""What happens on shared machines: full disks, forbidden folders, flipped bits, failing memory, clocks that jump.

Each test is a row of the table in docs/robustness.md.
"""

import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from reward_model.serving.client import RemoteRewardModel
from rlhf_ppo import PPOTrainer, TrainState
from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.folders import CheckpointError, find_damage, latest_checkpoint, list_checkpoints
from rlhf_ppo.checkpoints.resume import CheckpointNotWrittenError
from tests.support.patience import PATIENCE
from tests.support.tiny_run import config, parameters, share_of_e, trainer


@pytest.fixture(scope="module")
def undisturbed() -> torch.Tensor:
    """Weights after four iterations that nothing happens to."""
    return trained(None)


def trained(folder: Path | None, rewards: Any = share_of_e, *, iterations: int = 4, **wishes: Any) -> torch.Tensor:
    """Weights after so many iterations with a checkpoint after each, begun or gone on with in `folder`."""
    callbacks = wishes.pop("callbacks", ())
    torch.manual_seed(0)
    own = trainer()
    own.train(rewards, config(folder, iterations=iterations, save_every=1, **wishes), callbacks=callbacks)
    return parameters(own)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system refuses to let a file of this process grow beyond `size` bytes, half way through writing it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limit_after(iteration: int, until: int, size: int = 20_000) -> Callable[[PPOTrainer, TrainState], None]:
    """A callback: the disk is full from one iteration's checkpoint to another's."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def callback(_: PPOTrainer, state: TrainState) -> None:
        full = iteration <= state.iteration < until
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if full else resource.RLIM_INFINITY, hard))

    return callback


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_but_not_the_run(
    tmp_path: Path, undisturbed: torch.Tensor
) -> None:
    with pytest.warns(UserWarning, match=r"checkpoint-2 could not be written .* tries again after the next iteration"):
        weights = trained(tmp_path, callbacks=[limit_after(2, until=3)], keep_last=4)
    assert torch.equal(weights, undisturbed)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path))
    assert not list(tmp_path.glob(".checkpoint-*"))  # what was half written has been given back


def test_a_stop_on_a_full_disk_is_an_error_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """To say that a checkpoint was written would be a lie."""
    trained(tmp_path, iterations=1)
    with files_limited_to(20_000), pytest.raises(CheckpointNotWrittenError, match="Earlier checkpoints are unchanged"):
        trained(tmp_path, iterations=3, callbacks=[lambda *_: os.kill(os.getpid(), signal.SIGTERM)])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_full_disk_for_metrics_is_said_and_costs_lines_only(
    tmp_path: Path, undisturbed: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_ppo.loop.run_folder import RunFolder

    append = RunFolder.append_metrics

    def full(self: RunFolder, iteration: int, metrics: Any) -> None:
        if iteration == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, iteration, metrics)

    monkeypatch.setattr(RunFolder, "append_metrics", full)
    with pytest.warns(UserWarning, match="iteration 2 is missing from"):
        assert torch.equal(trained(tmp_path), undisturbed)
    assert [row["iteration"] for row in RunFolder.open(tmp_path).metrics()] == [1, 3, 4]


@pytest.mark.skipif(
    not os.path.ismount("/sys"), reason="Linux has a folder there that takes no files, not even from root"
)
def test_a_folder_that_takes_no_files_is_refused_before_anything_is_drawn() -> None:
    asked: list[str] = []

    def rewards(prompts: list[str], responses: list[str], **_: Any) -> list[float]:
        asked.extend(responses)
        return share_of_e(prompts, responses)

    with pytest.raises(OSError, match="cannot write"):
        trained(Path("/sys/kernel"), rewards)
    assert not asked


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of iterations 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    trained(folder, iterations=2)
    return folder


def test_a_checkpoint_without_its_manifest_is_named_and_no_run_begins_anew_over_it(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    """No folder becomes a checkpoint before its manifest is in it: this is damage, not half a checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    (folder / "checkpoint-2" / folders.MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-2 cannot be used: manifest\.json is missing"):
        assert latest_checkpoint(folder) == folder / "checkpoint-1"
    (folder / "checkpoint-1" / folders.MANIFEST).unlink()
    with pytest.warns(UserWarning, match="checkpoint-1 cannot"), pytest.warns(UserWarning, match="checkpoint-2 cannot"):
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
            latest_checkpoint(folder)


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """One flipped bit in each sixteenth of a file; the file cut at each quarter; emptied; grown."""
    for part in range(16):
        at = min(len(content) - 1, len(content) * part // 16)
        yield f"bit flipped at {at}", content[:at] + bytes([content[at] ^ (1 << part % 8)]) + content[at + 1 :]
    for part in range(4):
        yield f"cut to {len(content) * part // 4}", content[: len(content) * part // 4]
    yield "grown", content + b"\0"


def test_damage_in_any_region_of_any_file_is_named_and_the_checkpoint_before_is_found(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    newest = folder / "checkpoint-2"
    seen = 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for what, damaged in damages(content):
            path.write_bytes(damaged)
            with pytest.warns(UserWarning, match=f"checkpoint-2 cannot be used: .*{path.name}"):
                assert latest_checkpoint(folder) == folder / "checkpoint-1", f"{path.name}: {what}"
            seen += 1
        path.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a manifest it is no checkpoint, with one it is damaged
            assert latest_checkpoint(folder) == folder / "checkpoint-1", f"{path.name} removed"
        path.write_bytes(content)
    assert latest_checkpoint(folder) == newest
    assert seen == 21 * 6


def test_every_bit_of_the_manifest_is_guarded(two_checkpoints: Path, tmp_path: Path) -> None:
    """Whitespace that reads the same is the only change without consequences."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(two_checkpoints / "checkpoint-2", folder)
    path = folder / folders.MANIFEST
    content = path.read_bytes()
    expected = json.loads(content)
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        if find_damage(folder) is None:
            assert json.loads(path.read_bytes()) == expected


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_the_same(
    two_checkpoints: Path, tmp_path: Path, undisturbed: torch.Tensor
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    (folder / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"optimizer.safetensors has changed .* Trying the previous one"):
        assert torch.equal(trained(folder, keep_last=1), undisturbed)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4"]


def test_when_every_checkpoint_is_damaged_the_run_is_refused_instead_of_begun_again(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    for path in list_checkpoints(folder):
        (path / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="cannot be used"), pytest.raises(CheckpointError, match="none of the 2"):
        trained(folder)


def test_memory_that_runs_out_inside_an_update_ends_the_run_and_the_next_one_goes_on(
    tmp_path: Path, undisturbed: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some minibatches of the third update have moved the weights by then."""
    step, calls = torch.optim.Adam.step, []

    def failing(self: torch.optim.Adam, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * 4 + 3:  # four steps an iteration
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.Adam, "step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        trained(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert torch.equal(trained(tmp_path), undisturbed)


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, undisturbed: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Daylight saving, a virtual machine that slept, a server that set the time: limits follow another clock."""
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * (-1) ** next(jumps))
    assert torch.equal(trained(tmp_path, max_time=600.0), undisturbed)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= value < 3600 for row in rows for name, value in row.items() if name.startswith("time/"))


class Server(BaseHTTPRequestHandler):
    """A reward server that is well, or fails in the way it is told."""

    mode = "well"
    hang = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores: Any = share_of_e(body["prompts"], body["responses"])
        answers = {"lies": {"scores": scores[1:]}, "nan": {"scores": [float("nan"), *scores[1:]]}, "odd": ["?"]}
        if Server.mode == "hangs":
            Server.hang.wait(20)
            return
        answer = json.dumps(answers.get(Server.mode, {"scores": scores})).encode()
        self.send_response(500 if Server.mode == "dies" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    Server.mode = "well"
    Server.hang.clear()
    yield f"http://127.0.0.1:{running.server_port}"
    Server.hang.set()
    running.shutdown()
    running.server_close()
    thread.join(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("hangs", "did not answer within 0.2 s"),
        ("dies", "answered 500 1 times"),
        pytest.param("lies", "sent no 8 scores", marks=pytest.mark.slow),
        pytest.param("nan", "sent nan as score 0 of 8", marks=pytest.mark.slow),
        pytest.param("odd", "sent no 8 scores", marks=pytest.mark.slow),
    ],
)
def test_a_reward_server_that_fails_ends_the_run_with_its_name_and_nothing_is_lost(
    mode: str, said: str, tmp_path: Path, undisturbed: torch.Tensor, server: str
) -> None:
    """Without periodic checkpoints: the one of the last finished iteration is written on the way out."""
    remote = RemoteRewardModel(server, retries=0, timeout=0.2 if mode == "hangs" else PATIENCE)

    def fail_after_two(_: PPOTrainer, state: TrainState) -> None:
        Server.mode = mode if state.iteration == 2 else Server.mode

    torch.manual_seed(0)
    with pytest.raises((ValueError, RuntimeError), match=said):
        trainer().train(remote, config(tmp_path), callbacks=[fail_after_two])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    Server.mode = "well"
    patient = RemoteRewardModel(server, retries=0, timeout=PATIENCE)
    assert torch.equal(trained(tmp_path, patient), undisturbed)


def test_every_row_of_the_table_names_a_test_that_exists() -> None:
    root = Path(__file__).parents[2]
    named = [
        name
        for line in (root / "docs" / "robustness.md").read_text().splitlines()
        for name in line.split("`")
        if name.startswith("test_")
    ]
    tests = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert len(named) >= 20
    assert [name for name in named if f"def {name}(" not in tests] == []
