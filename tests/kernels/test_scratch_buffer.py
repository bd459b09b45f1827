"""Results of one turn of a loop lie where those of the turn before have stood."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ppo.kernels.scratch_buffer import ALIGNMENT, ScratchBuffer

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


def test_the_second_turn_takes_the_memory_that_the_first_one_needed() -> None:
    scratch = ScratchBuffer(torch.device("cpu"))
    scratch.reset()
    scratch.empty((3, 5), torch.float32), scratch.empty((7,), torch.bfloat16)
    scratch.reset()
    first, second = scratch.empty((3, 5), torch.float32), scratch.empty((7,), torch.bfloat16)
    scratch.reset()
    assert scratch.empty((3, 5), torch.float32).data_ptr() == first.data_ptr()
    assert scratch.empty((7,), torch.bfloat16).data_ptr() == second.data_ptr()


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(DTYPES)), max_size=4), max_size=4)
)
def test_results_of_one_turn_never_overlap(turns: list[list[tuple[int, int, torch.dtype]]]) -> None:
    scratch = ScratchBuffer(torch.device("cpu"))
    for turn in turns:
        scratch.reset()
        found = [
            scratch.empty((rows, columns), dtype).fill_(index) for index, (rows, columns, dtype) in enumerate(turn)
        ]
        for index, (tensor, (rows, columns, dtype)) in enumerate(zip(found, turn, strict=True)):
            assert tensor.shape == (rows, columns) and tensor.dtype == dtype and bool((tensor == index).all())
            assert tensor.data_ptr() % ALIGNMENT == 0 or tensor.numel() == 0


def test_without_reuse_no_memory_is_held() -> None:
    scratch = ScratchBuffer(torch.device("cpu"), reuse=False)
    for _ in range(3):
        scratch.reset()
        found = scratch.empty((4,), torch.float32).fill_(1.0)
    scratch.reset()
    assert scratch.memory.numel() == 0 and float(found.sum() + scratch.empty((4,), torch.float32).zero_().sum()) == 4.0
