"""When the doctor looks by itself: once, at the first step, on the main process."""

import logging

from rlhf_ppo.diagnostics.findings import Diagnosis
from rlhf_ppo.diagnostics.model_checks import run_model_checks
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch, run_text_checks
from rlhf_ppo.learner.ppo_learner import PPOLearner

logger = logging.getLogger(__name__)


def diagnose(learner: PPOLearner, batch: DiagnosedBatch) -> Diagnosis:
    """All checks. Those that run the model are left out where a process holds only parts of it."""
    tokens = run_text_checks(batch, learner.tokenizer)
    if learner.processes.sharded:
        return tokens
    # A checkpoint that was loaded has an optimizer with a past.
    model = run_model_checks(learner, batch, is_fresh=not learner.optimizer.state and not learner.start.goes_on)
    return Diagnosis(findings=[*tokens.findings, *model.findings], checked=[*tokens.checked, *model.checked])


def diagnose_first_batch(learner: PPOLearner, batch: DiagnosedBatch) -> None:
    """Diagnose the first batch of a learner on the main process, set `learner.diagnosis`, log what spoils the run.

    Does nothing at later batches, and with `PPOConfig.diagnose` off.
    """
    if learner.diagnosis is not None or not learner.config.diagnose or not learner.accelerator.is_main_process:
        return
    learner.diagnosis = diagnose(learner, batch)
    for finding in learner.diagnosis.warnings:
        logger.warning("The doctor found something in the first batch. %s", finding)
