"""Kill -9 at random moments of a short run, also while it saves: it must go on, and end as if nothing had happened.

    python -m tests.robustness.kill_campaign --kills 200 --workers 4 --results docs/results/kill-campaign.json

Every run is a fork of one process that has its imports behind it. Half of the kills come from outside after a random
time; the other half from within, before a random one of the run's file operations (opening, flushing, renaming,
deleting), which hits the microseconds of a rename that no clock would. A run is killed up to three times. Then its
weights, metrics, best model and frontier are compared with those of a run that nobody disturbed.
"""

import argparse
import fcntl
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf_ppo.checkpoints import best
from rlhf_ppo.checkpoints.folders import find_damage, list_checkpoints, read_json, write_json
from rlhf_ppo.loop import run_keeper, training
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_models import tiny_gpt2
from tests.support.tiny_run import TEXTS, config, parameters, share_of_e, trainer

PHASES = ("start-up", "rollout and scoring", "update", "evaluation", "best model", "checkpoint", "between")
KILLS_OF_A_RUN = 3
ITERATIONS = 6


class Board:
    """A few bytes that parent and child share: the child's phase, and how many file operations it has done."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8)

    def clear(self) -> None:
        self.memory[:] = bytes(8)

    @property
    def phase(self) -> str:
        return PHASES[self.memory[0]]

    @phase.setter
    def phase(self, name: str) -> None:
        self.memory[0] = PHASES.index(name)

    @property
    def operations(self) -> int:
        return int.from_bytes(self.memory[4:8], "little")

    @operations.setter
    def operations(self, count: int) -> None:
        self.memory[4:8] = count.to_bytes(4, "little")


def marked(board: Board, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its phase on the board while it runs."""

    def inside(*arguments: Any, **keywords: Any) -> Any:
        before, board.phase = board.phase, name
        try:
            return function(*arguments, **keywords)
        finally:
            board.phase = "between" if before == "start-up" else before

    return inside


def watch_file_operations(board: Board, folder: Path, kill_at: int | None) -> None:
    """Count what this process does to files of the run; die before number `kill_at`."""
    inside = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fsync"):
            if event != "fsync" and not str(arguments[0]).startswith(inside):
                return
            board.operations += 1
            if board.operations == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    flush = os.fsync
    sys.addaudithook(hook)

    def fsync(descriptor: int) -> None:
        hook("fsync", ())
        flush(descriptor)

    os.fsync = fsync


def run(folder: Path, board: Board, kill_at: int | None) -> None:
    """The whole run, or the rest of it; what it ended with stands in `end.json`."""
    loop: Any = training.TrainingLoop
    loop._roll_out = marked(board, "rollout and scoring", loop._roll_out)
    loop._learn = marked(board, "update", loop._learn)
    loop.evaluate = marked(board, "evaluation", loop.evaluate)
    best.BestModels._write = marked(board, "best model", best.BestModels._write)  # type: ignore[method-assign]
    run_keeper.save_checkpoint = marked(board, "checkpoint", run_keeper.save_checkpoint)
    watch_file_operations(board, folder, kill_at)
    torch.manual_seed(0)
    own = trainer()
    own.train(
        share_of_e,
        config(folder, iterations=ITERATIONS, save_every=1, eval_every=2, keep_best="score", keep_frontier=2),
        eval_prompts=PromptDataset.from_texts(TEXTS, own.tokenizer),
    )
    write_json(folder / "end.json", {"weights": parameters(own).double().tolist()})


def fork(folder: Path, board: Board, kill_at: int | None = None) -> int:
    """Start `run` in a child; its number. What it says goes to a file."""
    board.clear()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with Path(f"{folder}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                run(folder, board, kill_at)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(status)


def ended(child: int) -> bool:
    """Wait for the child; whether it got to its end by itself.

    Raises:
        RuntimeError: It failed, which no kill explains.
    """
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with status {status}")
    return status == 0


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on kills."""
    rows = RunFolder.open(folder).metrics()
    # Work is counted since the last iteration: an evaluation before a kill is not repeated after it.
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "work/"))} for row in rows]
    model = {name: value.tolist() for name, value in load_file(folder / "best" / "model.safetensors").items()}
    files = sorted(path.name for path in folder.glob("frontier/iteration-*"))
    return {
        "weights": read_json(folder / "end.json"), "metrics": kept, "best": model, "frontier": files,
        "points": read_json(folder / "frontier.json"), "checkpoints": [path.name for path in list_checkpoints(folder)],
    }  # fmt: skip


class Campaign:
    """Runs, kills and counts."""

    def __init__(self, root: Path, seed: int) -> None:
        root.mkdir()
        self.root, self.seed = root, seed
        self.board = Board()
        folder = root / "undisturbed"
        start = time.perf_counter()
        if not ended(fork(folder, self.board)):
            raise RuntimeError("the undisturbed run was killed by somebody else")
        self.seconds = time.perf_counter() - start
        self.operations = self.board.operations
        self.expected = outcome(folder)

    def one(self, number: int) -> dict[str, Any]:
        """One run with its kills."""
        draw = random.Random(1000 * self.seed + number)
        folder = self.root / f"run-{number}"
        found: dict[str, Any] = {"kills": [], "unreadable": 0, "lost": 0}
        while len(found["kills"]) < KILLS_OF_A_RUN:
            before = self._newest(folder)
            within = draw.random() < 0.5
            child = fork(folder, self.board, draw.randint(1, self.operations) if within else None)
            if not within:
                time.sleep(draw.uniform(0, self.seconds))
                os.kill(child, signal.SIGKILL)
            if ended(child):
                break
            found["kills"].append(["file operation" if within else "clock", self.board.phase])
            found["unreadable"] += sum(find_damage(path) is not None for path in list_checkpoints(folder))
            found["lost"] += self._newest(folder) < before
        if not (folder / "end.json").exists() and not ended(fork(folder, self.board)):
            raise RuntimeError("the last part was killed by somebody else")
        found["equal"] = outcome(folder) == self.expected
        if found["equal"]:
            shutil.rmtree(folder)
        return found

    def _newest(self, folder: Path) -> int:
        return max((int(path.name.split("-")[1]) for path in list_checkpoints(folder)), default=0)


def add(result: dict[str, Any], number: int, found: dict[str, Any]) -> None:
    """Count one run."""
    result.setdefault("numbers", []).append(number)
    result["runs"] = result.get("runs", 0) + 1
    result["kills"] = result.get("kills", 0) + len(found["kills"])
    for name in ("equal", "unreadable", "lost"):
        result[name] = result.get(name, 0) + int(found[name])
    for position, name in enumerate(("by_way", "by_phase")):
        counts = Counter(result.get(name, {})) + Counter(kill[position] for kill in found["kills"])
        result[name] = dict(counts)


def work(worker: int, wishes: argparse.Namespace, root: Path) -> None:
    """Every so manieth run, until all workers together have enough kills."""
    campaign = Campaign(root / f"worker-{worker}", wishes.seed)
    for number in itertools.count(worker, wishes.workers):
        with Path(f"{wishes.results}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = read_json(wishes.results) if wishes.results.exists() else {"seed": wishes.seed}
        if result.get("kills", 0) >= wishes.kills:
            return
        if number in result.get("numbers", []):
            continue
        found = campaign.one(number)
        with Path(f"{wishes.results}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = read_json(wishes.results) if wishes.results.exists() else {"seed": wishes.seed}
            result |= {"iterations": ITERATIONS, "file_operations_of_a_run": campaign.operations}
            add(result, number, found)
            write_json(wishes.results, result)
        print(json.dumps({"number": number, **found}), flush=True)


def main() -> None:
    """Go on with the campaign in `--results` until it has so many kills."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the runs are; the system's temporary folder without")
    wishes = parser.parse_args()
    torch.set_num_threads(1)
    tiny_gpt2()  # what is imported late is imported before the forks
    if wishes.folder is not None:
        wishes.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wishes.folder) as root:
        workers = []
        for worker in range(wishes.workers):
            child = os.fork()
            if not child:
                status = 1
                try:
                    work(worker, wishes, Path(root))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            workers.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in workers]
    result = read_json(wishes.results)
    print(result)
    if any(statuses) or result["equal"] < result["runs"] or result["unreadable"] or result["lost"]:
        raise SystemExit("a killed run did not end as an undisturbed one")


if __name__ == "__main__":
    main()
