"""The doctor: run all diagnostic checks on a batch, by default on the first batch of a run."""

import logging
from dataclasses import replace

from rlhf_ppo.diagnostics.environment_checks import ENVIRONMENT_CHECKS
from rlhf_ppo.diagnostics.findings import DoctorReport, without_consequences
from rlhf_ppo.diagnostics.model_checks import run_model_checks
from rlhf_ppo.diagnostics.text_checks import TEXT_CHECKS, DiagnosedBatch, run_text_checks
from rlhf_ppo.learner.ppo_learner import PPOLearner

logger = logging.getLogger(__name__)


def diagnose(learner: PPOLearner, batch: DiagnosedBatch) -> DoctorReport:
    """Run all checks; those that run the model are left out if it is sharded.

    A warning that another one brings about is left out: it would name a wrong cause.
    """
    checks = TEXT_CHECKS | ENVIRONMENT_CHECKS
    if learner.is_encoder_decoder:  # prompts of T5 and its like end in the end-of-sequence token
        checks = {name: check for name, check in checks.items() if name != "eos_in_prompt"}
    with learner.sources_context():  # some call the reward sources, whose models may be offloaded
        text = run_text_checks(batch, learner.tokenizer, checks)
    if learner.processes.sharded:
        return replace(text, findings=without_consequences(text.findings))
    # After a checkpoint was loaded, the optimizer has a state.
    model = run_model_checks(
        learner, batch, is_fresh=not learner.optimizer.state and not learner.start_kl_check.continues_ppo
    )
    findings = without_consequences([*text.findings, *model.findings])
    return DoctorReport(findings=findings, checked=[*text.checked, *model.checked])


def diagnose_first_batch(learner: PPOLearner, batch: DiagnosedBatch) -> None:
    """Diagnose the first batch of a learner on the main process: set `learner.diagnosis`, log warnings.

    Does nothing at later batches, and with `PPOConfig.diagnose` off.
    """
    if learner.diagnosis is not None or not learner.config.diagnose or not learner.accelerator.is_main_process:
        return
    learner.diagnosis = diagnose(learner, batch)
    for finding in learner.diagnosis.warnings:
        logger.warning("The doctor found something in the first batch. %s", finding)
