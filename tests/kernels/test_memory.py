"""Large tensors have pages of their own, which go from one to the next."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from rlhf_ppo.kernels import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere all stay on the heap")

LARGE = memory.MIN_BYTES // 4
"""Elements of the smallest float32 tensor that gets memory."""


def large(count: int = LARGE, **settings: int) -> Tensor:
    return memory.empty((count,), like=torch.ones(1), **settings)


def mappings() -> list[object]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is memory.mmap.mmap]


def test_pages_of_a_tensor_that_is_gone_go_to_the_next_one() -> None:
    with memory.reuse_memory():
        first = large().fill_(3.0)
        address = first.data_ptr()
        del first
        second = large()
        assert second.data_ptr() == address and bool((second == 3.0).all())  # nobody has cleared them


def test_pages_are_not_handed_on_while_a_part_of_the_tensor_is_in_use() -> None:
    with memory.reuse_memory():
        part = large().fill_(3.0)[5:7]
        other = large().fill_(4.0)
        assert_close(part, torch.full((2,), 3.0))
        del other


def test_a_gradient_holds_its_pages_until_it_is_forgotten() -> None:
    weight = torch.nn.Parameter(torch.zeros(LARGE))

    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return large().fill_(1.0)

    with memory.reuse_memory():
        Ones.apply(weight).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        address = weight.grad.data_ptr()
        other = large().fill_(2.0)
        assert other.data_ptr() != address and bool((weight.grad == 1.0).all())
        weight.grad = None
        assert large().data_ptr() == address


def test_a_smaller_tensor_leaves_the_pages_that_have_capacity_a_later_one() -> None:
    with memory.reuse_memory():
        first = large(LARGE, capacity=2 * LARGE)
        address = first.data_ptr()
        del first
        small = large(LARGE)
        assert small.data_ptr() != address
        assert large(2 * LARGE - 5, capacity=2 * LARGE).data_ptr() == address


def test_pages_are_given_back_at_the_end_and_at_once_outside() -> None:
    before = len(mappings())
    with memory.reuse_memory():
        with memory.reuse_memory():  # the outer one's are the inner one's
            del [large()][:]
        assert len(mappings()) == before + 1
        survivor = large()
    assert len(mappings()) == before + 1 and float(survivor.fill_(1.0).sum()) == LARGE
    del survivor
    assert len(mappings()) == before
    large()
    assert len(mappings()) == before


def test_small_tensors_and_those_without_content_stay_what_they_were() -> None:
    before = len(mappings())
    small = memory.empty((3, 4), like=torch.ones(1, dtype=torch.float64))
    assert small.shape == (3, 4) and small.dtype == torch.float64
    with FakeTensorMode():
        planned = memory.empty((LARGE, 2), like=torch.ones(1))
    assert planned.shape == (LARGE, 2) and type(planned) is not Tensor
    assert memory.empty((LARGE,), like=torch.empty(1, device="meta")).device.type == "meta"
    assert len(mappings()) == before


def test_a_cast_is_the_tensor_itself_or_a_copy_without_a_gradient() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 2 * LARGE).view(2, -1))
    assert memory.cast(weight, torch.float32) is weight
    low = memory.cast(weight.detach(), torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.shape == weight.shape and not low.requires_grad
    assert_close(low, weight.detach().bfloat16(), rtol=0, atol=0)


def test_an_error_inside_does_not_leave_pages_behind() -> None:
    before = len(mappings())

    def fail() -> None:
        with memory.reuse_memory():
            large()
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert len(mappings()) == before


def test_a_view_outlives_its_tensor() -> None:
    """The tensor's memory ends with the last that looks at it, not with the first object."""
    tensor = large().fill_(5.0)
    gone, part = weakref.ref(tensor), tensor.view(2, -1)[1]
    del tensor
    assert gone() is None and bool((part == 5.0).all())


@pytest.mark.slow
def test_a_process_may_end_with_a_tensor_in_its_pages() -> None:
    keep = "kept = memory.empty((2**23,), like=torch.ones(1)).fill_(1.0)"
    program = f"import torch; from rlhf_ppo.kernels import memory; {keep}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, text=True)
    assert (found.returncode, found.stderr) == (0, "")
