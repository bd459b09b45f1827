"""On a pretended GPU the passes are cut to its free memory, and activations recomputed where a row would not fit."""

from collections.abc import Callable

import pytest
import torch
from accelerate.state import AcceleratorState

from rlhf_ppo.updates.pass_memory import pass_memory, unallocated_state
from tests.gpu.runs import batch, trainer, weights
from tests.support.pretend_cuda import pretend_cuda

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided")
MANY = 60 * 2**30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], object]:
    """A pretended device with so many bytes free."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(True)
    yield lambda free: pretend_cuda(free=free)
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "recomputes"),
    [(None, False), (24, False), (10, True)],
    ids=["all fits", "in parts", "no row fits"],
)
def test_passes_fit_and_the_step_is_the_same(
    card: Callable[[int], object], capsys: pytest.CaptureFixture[str], tokens: int | None, recomputes: bool
) -> None:
    """Rows have up to 11 tokens, and 8 of them are a minibatch."""
    found = []
    for fits in (None, tokens):
        with card(MANY):
            made = trainer(precision="float32")
            need, state = pass_memory(made.policy), unallocated_state(made.model, made.optimizer)
        AcceleratorState._reset_state(True)
        free = MANY if fits is None else int((need.fixed + fits * need.kept) / 0.8) + state
        with card(free):
            made = trainer(precision="float32", diagnose=False)
            made.step(*batch())
            found.append(weights(made))
            said = capsys.readouterr().out
            assert made.policy.checkpointing == (recomputes and fits is not None)
            assert ("activations recomputed" in said) == made.policy.checkpointing
            if fits == 24:
                assert f"passes of up to {made._fitted_budget} tokens" in said
                assert 11 <= made._fitted_budget <= 24
        AcceleratorState._reset_state(True)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_pass_with_a_separate_critic_has_fewer_tokens(card: Callable[[int], object]) -> None:
    """The layers of both are kept, and two of the policy's two work: 3 parts of memory in place of 2."""
    budgets = {}
    for critic in (False, True):
        with card(MANY):
            made = trainer(precision="float32", critic=critic)
            state = unallocated_state(made.model, made.optimizer)
            need = pass_memory(made.policy) if not critic else need
        AcceleratorState._reset_state(True)
        with card(int((need.fixed + 30.5 * need.kept) / 0.8) + state):
            made = trainer(precision="float32", diagnose=False, critic=critic)
            made.step(*batch())
            budgets[critic] = made._fitted_budget
        AcceleratorState._reset_state(True)
    assert budgets[False] == 30
    assert budgets[True] == pytest.approx(20, abs=2)


@pytest.mark.slow
def test_a_budget_of_the_user_s_is_kept(card: Callable[[int], object], capsys: pytest.CaptureFixture[str]) -> None:
    with card(2**20):
        made = trainer(token_budget=16, diagnose=False)
        made.step(*batch())
        assert made._minibatch_config().token_budget == 16
        assert not made.policy.checkpointing
        assert "memory:" not in capsys.readouterr().out
