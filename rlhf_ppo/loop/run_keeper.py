"""What a run leaves in its folder: checkpoints when they are due, and lines that a full disk may cost."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rlhf_ppo.checkpoints.lock import lock_run_folder
from rlhf_ppo.checkpoints.resume import (
    CheckpointNotWrittenError,
    Restored,
    Stateful,
    restore_checkpoint,
    save_checkpoint,
)
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.loop.run_folder import RunFolder

Parts = Callable[[], Mapping[str, Stateful]]


class RunKeeper:
    """Writes checkpoints and records of one run, and finds the newest checkpoint again.

    Args:
        learner: Whose state is saved.
        output_dir: Run folder, made when missing; None: nothing is written.
        shared: State that is the same on every process, beside the trainer's.
        own: State that each process has for itself.
        keep_last: Checkpoints kept.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        learner: PPOLearner,
        output_dir: str | None,
        *,
        shared: Parts,
        own: Parts,
        keep_last: int,
    ) -> None:
        self.learner, self.keep_last = learner, keep_last
        self.shared, self.own = shared, own
        self.folder = None if output_dir is None else RunFolder.create(output_dir)
        if self.folder is not None and learner.accelerator.is_main_process:
            self.folder.check_writable()
        self.checkpoint_is_overdue = False
        """Whether a checkpoint could not be written when it was due."""
        self._newest: int | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other run writes into the folder.

        Raises:
            FolderInUseError: One does already. Raised on the main process; a ValueError with its words on the others.
        """
        with ExitStack() as held:

            def hold() -> None:
                if self.folder is not None and self.learner.accelerator.is_main_process:
                    held.enter_context(lock_run_folder(self.folder.path))

            self.learner.processes.run_or_fail_together(hold)
            yield

    def restore(self) -> Restored | None:
        """Go on from the newest whole checkpoint, if there is one; later lines of the metrics are dropped."""
        if self.folder is None:
            return None
        found = restore_checkpoint(self.learner, self.folder.path, shared=self.shared(), own=self.own())
        if found is None:
            return None
        self._newest = found.iteration
        if self.learner.accelerator.is_main_process:
            self.folder.resume_from(found.iteration)
        self.learner.accelerator.wait_for_everyone()
        return found

    def save(self, iteration: int, *, must: bool) -> None:
        """Write a checkpoint of this iteration, unless there is one.

        Args:
            iteration: Iterations finished.
            must: Raise when it cannot be written, instead of warning and owing it.

        Raises:
            CheckpointNotWrittenError: It could not be written and `must` is set; earlier ones are as they were.
        """
        if self.folder is None or self._newest == iteration:
            return
        try:
            save_checkpoint(
                self.learner, self.folder.path, iteration=iteration, shared=self.shared(), own=self.own(),
                keep_last=self.keep_last,
            )  # fmt: skip
        except CheckpointNotWrittenError as error:
            if must:
                raise
            self.checkpoint_is_overdue = True
            warnings.warn(f"{error} Training goes on and tries again after the next iteration.", stacklevel=2)
        else:
            self._newest, self.checkpoint_is_overdue = iteration, False

    def write(self, iteration: int, action: Callable[[RunFolder], object]) -> None:
        """Write into the run folder from the main process; a full disk costs lines of it, not the run."""
        if self.folder is None or not self.learner.accelerator.is_main_process:
            return
        try:
            action(self.folder)
        except OSError as error:
            warnings.warn(f"iteration {iteration} is missing from {self.folder.path}: {error}", stacklevel=2)
