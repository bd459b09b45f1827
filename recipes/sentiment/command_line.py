"""What a user of the recipes sees: the command line, named phases, mistakes in one line, no foreign noise."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeAlias

import datasets
import torch
import transformers
import tyro

from rlhf_ppo import TrainState
from rlhf_ppo.checkpoints import lock_run_folder
from rlhf_ppo.checkpoints.folders import list_checkpoints
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.loop.signals import EXIT_ABORTED, EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE, handled_signals
from rlhf_ppo.report import serve_report
from rlhf_ppo.utils.progress import ProgressBar
from rlhf_ppo.utils.redaction import redacted

from .assets import AssetError

_HINT = "(default: what suits the model)"

IntByModel: TypeAlias = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_HINT)]
FloatByModel: TypeAlias = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_HINT)]
SwitchByModel: TypeAlias = Annotated[bool | None, tyro.conf.arg(metavar="{True,False}", help_behavior_hint=_HINT)]
IntByCores: TypeAlias = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the cores)")]
IntByLength: TypeAlias = Annotated[
    int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: a 25th of the iterations)")
]

_RULE = re.compile(r"[\u2500-]{4,}")
_FRAME = re.compile(r"[\u2500-\u257f]")


def run(main: Callable[[Any], object], config: type[Any], description: str | None) -> None:
    """Parse the command line and run; what a user can mend is one line on stderr.

    Exit status: 2 for a wrong command line, 1 for anything else to be mended, 75 when the same command should be given
    again, 130 when it was left at once by a second signal.
    """
    quieten()
    try:
        settings = parse(config, description)
        with only_run(settings.output_dir), leave_on_signals():
            main(settings)
    except KeyboardInterrupt as error:
        leave("Interrupted. What was finished is kept: the same command goes on from there.", EXIT_ABORTED, error)
    except (AssetError, NotImplementedError, OSError, ValueError) as error:
        leave(f"error: {one_line(error)}", EXIT_FAILED, error)


@contextlib.contextmanager
def leave_on_signals() -> Iterator[None]:
    """Context manager: while active, a signal that meets no training ends the process with a line and status 75.

    Training has handlers of its own. With several processes the launcher's signal must end a process that waits for
    another, which no handler in Python can.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        line = f"Stopped by {name}. Finished phases and what this one has saved are kept; the same command goes on."
        leave(line, EXIT_RESUMABLE, None)

    with handled_signals(stop):
        yield


@contextlib.contextmanager
def only_run(output_dir: str) -> Iterator[None]:
    """Inside, no other run uses the folder, from the first phase to the report; where it can be made."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # the phase that needs it says what is wrong with the path
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        if is_main_process() and Path(output_dir).is_dir():
            held.enter_context(lock_run_folder(Path(output_dir)))
        yield


def parse(config: type[Any], description: str | None) -> Any:
    """Settings from the command line; a mistake becomes one line instead of a box."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, description=description)
    except SystemExit as error:
        if error.code:
            leave(f"error: {unboxed(said.getvalue())}", EXIT_USAGE, error)
        raise


def unboxed(text: str) -> str:
    """The sentences in a frame of tyro's, without frame and heading."""
    heading, *parts = (" ".join(_FRAME.sub(" ", part).split()) for part in _RULE.split(text))
    return ". ".join(part.rstrip(".") for part in parts if part) or heading


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, and with the kind where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException, *, most: int = 200) -> str:
    """The first line of another library's message; what follows it there are its own remedies."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:most].rstrip(":. ")


def ending(state: TrainState, iterations: int) -> str:
    """How training ended, in a line; after a signal or the time limit, exit with the status that says "again"."""
    if state.interrupted:
        done = f"{state.iteration} of {iterations} iterations"
        line = f"Stopped by {state.stopped} after {done}, checkpoint written; the same command goes on."
        leave(line, EXIT_RESUMABLE, None)
    why = "" if state.stopped is None else f", ended by {state.stopped}"
    return f"{state.iteration} iterations{why}"


def leave(line: str, status: int, error: BaseException | None) -> None:
    """Exit with `status` and one line on stderr, from the main process alone."""
    for bar in list(getattr(ProgressBar, "_instances", ())):
        bar.close()  # the line begins below it
    if is_main_process():
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(status) from error


def is_main_process() -> bool:
    """Whether this process is the one that speaks, known before any library is asked."""
    return int(os.environ.get("RANK", "0")) == 0


def quieten() -> None:
    """No progress bars of loading, and no warnings that no user of the recipes can act on."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # heads that are new on purpose, masks that are not needed
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # peft mends it


class Phases:
    """Says which phase has begun and when, from the main process."""

    def __init__(self, count: int) -> None:
        self.count, self.number, self.start = count, 0, time.perf_counter()

    def __call__(self, name: str) -> None:
        self.number += 1
        self.say(f"[{self.number}/{self.count}] {name} ({time.perf_counter() - self.start:.0f} s)")

    def left(self, seconds: float | None) -> float | None:
        """What is left of so many seconds since the first phase, enough for one iteration at least; None of None."""
        return None if seconds is None else max(1e-3, seconds - (time.perf_counter() - self.start))

    def say(self, *lines: str) -> None:
        """Print each line once; a terminal gets it broken between words."""
        if is_main_process():
            print(*map(fitted, lines), sep="\n", flush=True)


@contextlib.contextmanager
def live_report(output_dir: str, title: str, *, live: bool, live_address: str | None) -> Iterator[None]:
    """Context manager: while active, the main process serves the report, if either setting asks for it."""
    if (live or live_address) and is_main_process():
        with serve_report(output_dir, title=title, address=live_address) as url:
            print(f"live report: {url}", flush=True)
            yield
    else:
        yield


def fitted(text: str) -> str:
    """The text in lines that fit the terminal; as it is where there is none."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


MOST_THREADS = 8
"""The products of a small model are too small for more."""


def use_threads(requested: int | None = None) -> None:
    """Compute with so many threads; by default with this process's share of the cores.

    `OMP_NUM_THREADS` is not asked: `accelerate launch` sets it to 1 by itself.

    Raises:
        ValueError: When fewer than one thread is requested.
    """
    if requested is not None and requested < 1:
        raise ValueError(f"At least one thread is needed, got {requested}. Leave the number out to use all cores.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    torch.set_num_threads(requested or max(1, min(cores // processes, MOST_THREADS)))


CHUNKS_FOLDER = "evaluations.partial"

IRRELEVANT_SETTINGS = {
    "output_dir", "fresh", "threads", "log_with", "save_every", "max_time", "vllm_url", "live", "live_address",
}  # fmt: skip
"""Settings of a run that change nothing of what is learned."""


def open_run_folder(path: str, settings: dict[str, Any], *, fresh: bool) -> RunFolder:
    """The run folder with its `config.json`.

    Raises:
        ValueError: If it cannot be made, or holds a run of other settings, which a resumed run would be mixed with.
    """
    try:
        folder = RunFolder.create(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be a run folder ({error.strerror}): choose another --output-dir") from error
    if not fresh:
        _refuse_other_settings(folder, settings)
    if is_main_process():
        if fresh:
            for old in folder.path.glob("checkpoint-*"):
                shutil.rmtree(old)
            shutil.rmtree(folder.path / CHUNKS_FOLDER, ignore_errors=True)
            folder.resume_from(0)
        folder.write_config(settings)
    return folder


def _refuse_other_settings(folder: RunFolder, settings: dict[str, Any]) -> None:
    relevant = settings.keys() - IRRELEVANT_SETTINGS
    known = {name: value for name, value in folder.config().items() if name in relevant}
    changed = {name: value for name, value in known.items() if value != redacted(settings[name], name)}
    if changed and list_checkpoints(folder.path):
        was = ", ".join(f"{name}={value!r} (now {settings[name]!r})" for name, value in changed.items())
        raise ValueError(
            f"{folder.path} holds a run with {was}: choose another --output-dir, or --fresh to begin again"
        )


def model_line(folder: str, lora_rank: int) -> str:
    """Where the policy was saved, and how an adapter becomes a plain model."""
    if not lora_rank:
        return f"model: {folder}"
    return f"adapter: {folder}; as a plain model: python -m rlhf_ppo.merge {folder} {folder}-merged"
