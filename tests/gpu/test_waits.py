"""How often the host waits for a GPU: counted on a pretended one, with the line that causes each wait."""

from dataclasses import replace

import pytest
import torch

from rlhf_ppo.updates import MinibatchUpdate
from tests.gpu.runs import batch, trainer, weights
from tests.support.pretend_cuda import Counts
from tests.support.tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided")


def waits_per_step(gpu: Counts, **settings: object) -> float:
    """Waits of three epochs above those of one, for each of the optimizer steps between."""
    made, found = trainer(**settings), []
    made.step(*batch())  # first-time checks
    for epochs in (1, 3):
        made.config.ppo_epochs = epochs
        gpu.reset()
        made.step(*batch())
        found.append(sum(gpu.syncs.values()))
    return (found[1] - found[0]) / 2


@pytest.mark.parametrize(
    "settings", [{}, {"token_budget": 48, "max_grad_norm": 0.5, "ent_coef": 0.1}], ids=["one pass", "several passes"]
)
def test_an_optimizer_step_waits_once(gpu: Counts, settings: dict[str, object]) -> None:
    """Metrics, norm and statistics come in one transfer, however many micro-batches there are."""
    assert waits_per_step(gpu, diagnose=False, **settings) <= 1


def test_a_loss_that_is_no_sum_over_tokens_is_found_without_waiting_and_computed_again(gpu: Counts) -> None:
    """The square of the loss: its gradient is twice the loss times the one that was foreseen, per micro-batch."""
    found = []
    for fused in (True, False):
        made = trainer(fused_head=fused, diagnose=False, token_budget=24, precision="float32")
        update = made.algorithm.update
        assert isinstance(update, MinibatchUpdate)
        inner = update.objective

        def clamped(output, data, count, inner=inner):
            terms = inner(output, data, count)
            ends = torch.where(data.mask.any(dim=1), output.logprobs.sum(dim=1).square(), 0.0)
            return replace(terms, loss=terms.loss + 1e-3 * ends.sum())

        update.objective = clamped
        made.step(*batch())
        found.append(weights(made))
        assert update.checks_at_once == fused
    assert (found[0] - found[1]).norm() <= 1e-2 * (found[1] - weights(trainer(tiny_llama()))).norm()


def test_refused_steps_of_float16_lower_the_scale_and_the_run_goes_on(gpu: Counts) -> None:
    """A scale of 2^40 overflows at first. Before, the step after a refused one could not unscale its gradients."""
    from accelerate.utils import GradScalerKwargs

    scaler = GradScalerKwargs(init_scale=2.0**40, backoff_factor=1 / 64)
    settings = {"mixed_precision": "fp16", "kwargs_handlers": [scaler]}
    made = trainer(ppo_epochs=10, most_skips_in_a_row=2, diagnose=False, accelerator_kwargs=settings)
    before = weights(made)
    made.step(*batch())
    assert made.accelerator.scaler.get_scale() < 2.0**40
    assert 0 < made.metrics["ppo/updates_skipped"] < 10
    assert not torch.equal(weights(made), before)
    made.config.ratio_threshold, made.config.ppo_epochs = 1e-6, 2  # the ratio guard refuses, too
    with pytest.warns(UserWarning, match="exceeds threshold"):
        made.step(*batch())
    assert made.metrics["ppo/updates_skipped"] == 2
