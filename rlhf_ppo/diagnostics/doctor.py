"""When the doctor looks by itself: once, at the first step, on the main process."""

import logging
from typing import TYPE_CHECKING

from rlhf_ppo.diagnostics.findings import Diagnosis
from rlhf_ppo.diagnostics.model_checks import examine_model
from rlhf_ppo.diagnostics.text_checks import Specimen, examine_tokens

if TYPE_CHECKING:
    import rlhf_ppo.trainer

logger = logging.getLogger(__name__)


def diagnose(trainer: "rlhf_ppo.trainer.PPOTrainer", batch: Specimen) -> Diagnosis:
    """All checks. Those that run the model are left out where a process holds only parts of it."""
    tokens = examine_tokens(batch, trainer.tokenizer)
    if trainer.processes.sharded:
        return tokens
    # A checkpoint that was loaded has an optimiser with a past.
    model = examine_model(trainer, batch, is_fresh=not trainer.optimizer.state and not trainer.start.goes_on)
    return Diagnosis(findings=[*tokens.findings, *model.findings], checked=[*tokens.checked, *model.checked])


def first_look(trainer: "rlhf_ppo.trainer.PPOTrainer", batch: Specimen) -> Diagnosis | None:
    """Diagnose the first batch of a trainer, and warn of what spoils the run; None afterwards and elsewhere."""
    if trainer.diagnosis is not None or not trainer.config.diagnose or not trainer.accelerator.is_main_process:
        return None
    found = diagnose(trainer, batch)
    for finding in found.warnings:
        logger.warning("The doctor found something in the first batch. %s", finding)
    return found
