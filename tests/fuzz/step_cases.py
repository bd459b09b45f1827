"""Batches for `PPOTrainer.step`: a good one with up to three parts replaced by something else."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from tests.fuzz.harness import Target
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

VOCABULARY, POSITIONS, ROWS = 16, 12, 2
_DTYPES = [
    torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint64, torch.bool, torch.float32,
    torch.float16, torch.bfloat16, torch.float64, torch.complex64,
]  # fmt: skip

numbers = st.one_of(
    st.integers(-3, VOCABULARY + 3),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e38, 1e300, 0.0, -0.0, 1e-45, 2**31, -(2**63), 2**63 - 1]),
    st.floats(-5, 5),
)


def tensor_of(values: list[Any], dtype: torch.dtype, shape: int) -> Tensor:
    """A tensor of these values as near as the type allows, in one of several shapes and layouts."""
    made = torch.tensor([0.0 if math.isnan(v) else float(v) for v in values], dtype=torch.float64)
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.tensor([float(v) for v in values], dtype=torch.float64)
    made = made.clamp(-9e18, 9e18) if not (dtype.is_floating_point or dtype.is_complex) else made
    made = made.to(dtype)
    match shape:
        case 1:
            return made[None]
        case 2:
            return made[:, None]
        case 3:
            return made[0] if len(made) else made
        case 4:
            return made.to("meta")
        case 5 if made.dim() == 1 and dtype not in (torch.bool, torch.uint16, torch.uint64):
            return made.to_sparse()
        case 6 if dtype.is_floating_point:
            return made.clone().requires_grad_()
        case _:
            return made


any_tensor = st.builds(
    tensor_of, st.lists(numbers, max_size=6), st.sampled_from(_DTYPES), st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
)
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7).map(torch.tensor)
almost_tokens = st.lists(st.integers(-1, VOCABULARY), max_size=8).map(lambda v: torch.tensor(v, dtype=torch.long))
junk = st.one_of(
    st.none(), st.integers(-2, 5), st.floats(), st.text(max_size=3), st.binary(max_size=3), st.booleans(),
    st.lists(st.integers(-1, 20), max_size=3), st.dictionaries(st.integers(), st.integers(), max_size=2), any_tensor,
    st.just(object()), st.just(range(3)), st.just({1, 2}), st.just(Tensor), st.just(lambda: 0), st.just(NotImplemented),
)  # fmt: skip
element = st.one_of(tokens, almost_tokens, any_tensor, any_tensor, junk)
part = st.one_of(
    st.lists(element, min_size=ROWS, max_size=ROWS), st.lists(element, min_size=ROWS, max_size=ROWS),
    st.lists(element, max_size=4), st.lists(tokens, min_size=ROWS, max_size=ROWS).map(tuple), junk,
)  # fmt: skip
good_scores = st.lists(st.floats(-3, 3, width=32).map(torch.tensor), min_size=ROWS, max_size=ROWS)


@st.composite
def batches(draw: st.DrawFn) -> list[Any]:
    """queries, responses, scores, masks; one in eight is good and reaches the model."""
    rows = st.lists(tokens, min_size=ROWS, max_size=ROWS)
    case: list[Any] = [draw(rows), draw(rows), draw(good_scores), None]
    how = draw(st.integers(0, 7))
    if how == 0:
        case[3] = [torch.ones(len(row)) for row in case[1]] if draw(st.booleans()) else None
        return case
    for _ in range(draw(st.integers(1, 2))):
        which = draw(st.integers(0, 3))
        base = case[which]
        if how <= 4 and isinstance(base, list) and base:  # one sample of a part that is otherwise good
            base[draw(st.integers(0, len(base) - 1))] = draw(element)
        else:
            case[which] = draw(part)
    return case


def target(_folder: Path) -> Target:
    """A trainer of a few hundred parameters; `unchanged` compares all that a step may move."""
    model = tiny_gpt2(vocab_size=VOCABULARY, n_layer=1, n_embd=8, n_head=1, n_positions=POSITIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = PPOTrainer(
            PPOConfig(batch_size=ROWS, mini_batch_size=ROWS, ppo_epochs=1, use_score_scaling=True, learning_rate=1e-4),
            AutoModelForCausalLMWithValueHead.from_pretrained(model), tokenizer=tiny_tokenizer(),
        )  # fmt: skip
    parameters = list(trainer.model.parameters())
    before: list[Any] = []

    def state() -> list[Any]:
        optimizer = [value for each in trainer.optimizer.state.values() for value in each.values()]
        moments = list(trainer.running.state_dict().values())
        tensors = [torch.as_tensor(value).clone() for value in [*parameters, *optimizer, *moments]]
        return [trainer.kl_ctl.value, repr(trainer.algorithm.update.state_dict()), tensors]

    def attempt(case: list[Any]) -> None:
        before[:] = state()
        trainer.step(*case)
        if not all(torch.isfinite(parameter).all() for parameter in parameters):
            raise AssertionError("a step that was accepted broke the weights")

    def unchanged() -> bool:
        now = state()
        same = len(now[2]) == len(before[2]) and all(map(torch.equal, now[2], before[2]))
        return same and now[:2] == before[:2]

    return Target(cases=batches(), attempt=attempt, unchanged=unchanged)
