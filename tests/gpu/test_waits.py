"""How often the host waits for a GPU: counted on a pretended one, with the line that causes each wait."""

from dataclasses import replace

import pytest
import torch

from rlhf_ppo import TrainConfig
from rlhf_ppo.loop.sampling import make_collector
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.kv_cache import bytes_per_token, default_budget
from rlhf_ppo.updates import MinibatchUpdate
from tests.gpu.runs import batch, trainer, weights
from tests.support.pretend_cuda import Counts
from tests.support.tiny_models import tiny_llama


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
    "settings",
    [{}, pytest.param({"token_budget": 48, "max_grad_norm": 0.5, "ent_coef": 0.1}, marks=pytest.mark.slow)],
    ids=["one pass", "several passes"],
)
def test_an_optimizer_step_waits_once(gpu: Counts, settings: dict[str, object]) -> None:
    """Metrics, norm and statistics come in one transfer, however many micro-batches there are."""
    assert waits_per_step(gpu, diagnose=False, **settings) <= 1


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("static", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["graphs", "no graphs"])
@pytest.mark.parametrize(
    "stops", [(), pytest.param(tuple(range(0, 320, 24)), marks=pytest.mark.slow)], ids=["no row leaves", "rows leave"]
)
def test_a_sampled_token_waits_at_most_once_in_sixteen(gpu: Counts, stops: tuple[int, ...], static: bool) -> None:
    """Prompts of unequal length; some rows finish. The waits of a call without many tokens are left out."""
    model, found = tiny_llama().cuda(), []
    prompts = [torch.arange(5, 6 + row % 3, device="cuda") for row in range(6)]
    for tokens in (16, 80):
        gpu.reset()
        sampling = SamplingConfig(max_new_tokens=tokens, stop_token_ids=stops, num_return_sequences=4)
        loop = DecodeLoop(static_step=static)
        samples = loop(model, prompts, sampling, generator=torch.Generator().manual_seed(0))
        found.append((sum(gpu.syncs.values()), gpu.kernels, max(map(len, samples.responses))))
    steps = found[1][2] - found[0][2]
    assert steps > 32
    assert (found[1][0] - found[0][0]) / steps <= 1 / 16
    # Two layers, and embedding, head and sampling; or a graph, and sampling.
    assert (found[1][1] - found[0][1]) / steps < (65 if static else 2 * 70 + 40)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 5, 16])
def test_looking_rarely_at_the_stops_changes_no_response(interval: int) -> None:
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([11] * 9)]
    sampling = SamplingConfig(max_new_tokens=24, stop_token_ids=tuple(range(0, 320, 24)), num_return_sequences=4)
    draw = [
        DecodeLoop(stop_check_interval=each)(
            tiny_llama(), prompts, sampling, generator=torch.Generator().manual_seed(1)
        )
        for each in (None, interval)
    ]
    assert [row.tolist() for row in draw[0].responses] == [row.tolist() for row in draw[1].responses]
    assert draw[0].finished == draw[1].finished
    assert any(draw[0].finished)
    torch.testing.assert_close(torch.cat(draw[0].logprobs or []), torch.cat(draw[1].logprobs or []))


@pytest.mark.slow
def test_the_cache_is_sized_by_free_memory_unless_a_setting_says_otherwise(gpu: Counts) -> None:
    """Of 70 GiB free a half; before, 4 GiB whatever the card."""
    model = tiny_llama().cuda()
    assert default_budget(model.device) == 35 * 2**30
    assert default_budget(torch.device("cpu")) == 4 * 2**30
    per_row = bytes_per_token(model.config, torch.float32) * (3 + 8)
    rows: list[int] = []
    for budget in (None, 2 * per_row):
        loop = DecodeLoop(kv_budget_bytes=budget, on_progress=lambda done, total: rows.append(done))
        loop(model, [torch.tensor([5, 6, 7], device="cuda")] * 4, SamplingConfig(max_new_tokens=8))
    assert rows == [4, 2, 4]
    made = trainer(kv_budget_gib=2 * per_row / 2**30, diagnose=False)
    found = make_collector(made, TrainConfig(sampling=SamplingConfig(max_new_tokens=8)), None)
    assert isinstance(found.sampler, DecodeLoop)
    assert found.sampler.kv_budget_bytes == 2 * per_row
