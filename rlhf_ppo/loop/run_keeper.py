"""`RunKeeper` saves and restores the checkpoints of a run, and writes its records even when the disk is full."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rlhf_ppo.checkpoints.compatibility import present_settings
from rlhf_ppo.checkpoints.lock import lock_run_folder
from rlhf_ppo.checkpoints.resume import (
    CheckpointNotWrittenError,
    RestoredCheckpoint,
    Stateful,
    restore_checkpoint,
    save_checkpoint,
)
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.loop.run_folder import RunFolder

StateGetter = Callable[[], Mapping[str, Stateful]]
"""Returns the objects to save, by name."""


class RunKeeper:
    """Saves and restores the checkpoints of one run, and writes into its run folder.

    Args:
        output_dir: Run folder, made when missing; None: nothing is written.
        shared: State that is the same on every process, besides the learner's.
        per_process: State of each process.

    Raises:
        OSError: The folder is not writable.
    """

    def __init__(
        self,
        learner: PPOLearner,
        output_dir: str | None,
        *,
        shared: StateGetter,
        per_process: StateGetter,
        keep_last: int,
    ) -> None:
        self.learner, self.keep_last = learner, keep_last
        self.shared, self.per_process = shared, per_process
        self.folder = None if output_dir is None else RunFolder.create(output_dir)
        if self.folder is not None and learner.accelerator.is_main_process:
            self.folder.check_writable()
        self.checkpoint_is_overdue = False
        """Whether the last checkpoint could not be written."""
        self._last_saved: int | None = None
        self._first_settings = present_settings(learner)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context manager: while active, the run folder is locked against other runs.

        Raises:
            FolderInUseError: Another run holds the lock. The other processes raise a ValueError with this message.
        """
        with ExitStack() as stack:

            def lock() -> None:
                if self.folder is not None and self.learner.accelerator.is_main_process:
                    stack.enter_context(lock_run_folder(self.folder.path))

            self.learner.processes.run_or_fail_together(lock)
            yield

    def restore(self) -> RestoredCheckpoint | None:
        """Restore the latest intact checkpoint and remove later lines from the run folder; `start_anew` without one."""
        if self.folder is None:
            return None
        restored = restore_checkpoint(
            self.learner, self.folder.path, shared=self.shared(), per_process=self.per_process()
        )
        if restored is None:
            self.start_anew()
            return None
        self._last_saved = restored.iteration
        if self.learner.accelerator.is_main_process:
            self.folder.resume_from(restored.iteration)
        self.learner.accelerator.wait_for_everyone()
        return restored

    def start_anew(self) -> None:
        """Set the records of an earlier run in the folder aside: this one begins at iteration 1, too."""
        if self.folder is not None and self.learner.accelerator.is_main_process:
            self.folder.set_records_aside()

    def save(self, iteration: int, *, required: bool) -> None:
        """Save a checkpoint of this iteration, unless there is one.

        Args:
            required: Raise if it cannot be written, instead of warning and retrying after the next iteration.

        Raises:
            CheckpointNotWrittenError: It could not be written and `required` is set; earlier ones are unchanged.
        """
        if self.folder is None or self._last_saved == iteration:
            return
        try:
            save_checkpoint(
                self.learner, self.folder.path, iteration=iteration, shared=self.shared(),
                per_process=self.per_process(), keep_last=self.keep_last, first_settings=self._first_settings,
            )  # fmt: skip
        except CheckpointNotWrittenError as error:
            if required:
                raise
            self.checkpoint_is_overdue = True
            warnings.warn(f"{error} Training goes on and tries again after the next iteration.", stacklevel=2)
        else:
            self._last_saved, self.checkpoint_is_overdue = iteration, False

    @contextmanager
    def saved_before_error(
        self, iteration: int, prepare: Callable[[], None] = lambda: None, *, together: bool = False
    ) -> Iterator[None]:
        """Context manager: if an error in it ends the run, call `prepare` and save a checkpoint of this iteration.

        Args:
            together: Whether all processes raise the error if one does. If not, only a single process saves: saving is
                collective.
        """
        try:
            yield
        except Exception:
            if together or self.learner.accelerator.num_processes == 1:
                prepare()
                self.save(iteration, required=False)
            raise

    def write(self, iteration: int, action: Callable[[RunFolder], object]) -> None:
        """Call `action` on the run folder, on the main process; an OSError (disk full) only warns."""
        if self.folder is None or not self.learner.accelerator.is_main_process:
            return
        try:
            action(self.folder)
        except OSError as error:
            warnings.warn(f"iteration {iteration} is missing from {self.folder.path}: {error}", stacklevel=2)


def restorer(parts: Mapping[str, Stateful]) -> Callable[[], None]:
    """Return a function that restores the present states of `parts`."""
    before = {name: part.state_dict() for name, part in parts.items()}

    def restore() -> None:
        for name, part in parts.items():
            part.load_state_dict(before[name])

    return restore
