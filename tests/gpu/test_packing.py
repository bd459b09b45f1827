"""On a GPU rows run packed where the variable-length kernel passes its trial; a definition of it stands in for it."""

import pytest
import torch

from rlhf_ppo.kernels import varlen_attention
from tests.gpu.runs import LENGTHS, batch, trainer, weights
from tests.kernels.test_varlen_attention import reference
from tests.support.pretend_cuda import Counts


@pytest.mark.slow
def test_packed_rows_take_the_step_of_padded_ones_without_padding_or_waits(
    gpu: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, before = [], None
    for kernel in (None, reference):
        monkeypatch.setattr(varlen_attention, "kernel", lambda kernel=kernel: kernel)
        made = trainer(diagnose=False)
        before = weights(made)
        made.step(*batch())
        found.append((weights(made), made.metrics["work/trunk_tokens"], made.metrics["work/real_tokens"]))
    (padded, padded_tokens, _), (packed, packed_tokens, real_tokens) = found
    assert packed_tokens == real_tokens < padded_tokens
    assert real_tokens == 2 * (sum(LENGTHS) + sum(1 + row % 3 for row in range(8)))  # scoring and update
    assert (packed - padded).norm() <= 0.5 * (padded - before).norm()  # Adam's first step, of bfloat16's rounding
    cosine = torch.nn.functional.cosine_similarity(packed - before, padded - before, dim=0)
    assert cosine > 0.9
