"""The softmax statistics of a block of logits in one walk over it, by a Triton kernel of TRL; torch takes six to nine.

TRL's whole function is not used: it rounds logits to the dtype of the products, which moves log-probabilities by up to
0.06 nats in bfloat16. Plain twin: `FusedLinearLogprobs` without `fold`.
"""

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_ppo.kernels.gpu_trial import level_of_missing_kernels, trial_values, try_kernel
from rlhf_ppo.kernels.linear_logprobs import BlockFold, FusedLinearLogprobs, LinearLogprobsSettings, LossGradient

logger = logging.getLogger(__name__)

TRIAL_ROWS, TRIAL_WIDTH = 512, 16
"""Of the states of the trial: narrow ones, because the products are the same with and without the kernel."""


@cache
def kernel() -> Any:
    """TRL's Triton kernel; None without Triton, or in a release of TRL that has none."""
    try:
        found = import_module("trl.kernels.chunked_logprob")._forward_kernel
        found.arg_names  # noqa: B018  without Triton it is something else
    except Exception as refusal:  # no such module in this release, or a Triton that does not import
        logger.log(
            level_of_missing_kernels(), "softmax of the LM head on this GPU by torch (TRL's kernel: %s)", refusal
        )
        return None
    return found


def fold_block(
    logits: Float[Tensor, "rows block"], tokens: Int[Tensor, " rows"], start: int, chosen: Float[Tensor, "rows 1"],
    *, with_entropy: bool,
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:  # fmt: skip
    """Max z, log Σ exp(z - max z) and, with entropy, Σ p z of each row of a block that begins at token `start`.

    The logits of those `tokens` that lie in the block go into `chosen`.
    """
    largest, sum_exp, moments = (torch.full_like(chosen, value) for value in (-torch.inf, 0.0, 0.0))
    unused: dict[str, Any] = dict.fromkeys(("sq_sum_exp_ptr", "z_sum_ptr", "max_before_target_ptr"), chosen)
    unused |= dict.fromkeys(("HAS_SOFTCAP", "HAS_LOG_SUM_SQ_PROBS", "HAS_MEAN_LOGITS", "HAS_IS_TOP1"), False)
    with torch.cuda.device_of(logits):
        kernel()[(len(logits),)](
            mm_ptr=logits, mm_stride=logits.stride(0), n_cols=logits.shape[1], targets_ptr=tokens, vocab_start=start,
            max_ptr=largest, sum_exp_ptr=sum_exp, x_sum_exp_ptr=moments, target_logit_ptr=chosen,
            logit_scale=1.0, softcap=1.0, inv_t=1.0, HAS_ENTROPY=with_entropy, BLOCK_SIZE=1024, **unused,
        )  # fmt: skip
    return largest, sum_exp.log(), moments / sum_exp


@cache
def choose_fold(device: torch.device, vocab: int, dtype: torch.dtype) -> BlockFold | None:
    """`fold_block`, where a trial finds that an LM head gives the same with it, faster; None elsewhere. Logs which."""
    if device.type != "cuda" or dtype == torch.float64 or kernel() is None:
        return None
    made: Any = {"device": device, "dtype": dtype}
    hidden, weight = (trial_values(rows, TRIAL_WIDTH, seed=rows, **made) for rows in (TRIAL_ROWS, vocab))
    slopes = trial_values(TRIAL_ROWS, seed=1, device=device, dtype=torch.float32)
    tokens = torch.arange(TRIAL_ROWS, device=device) * 7919 % vocab
    loss_gradient = LossGradient(lambda _, __, rows: (slopes[rows], None), reads_entropy=False)

    def run(fold: BlockFold | None) -> list[Tensor]:
        settings = LinearLogprobsSettings(1.0, TRIAL_ROWS, True, None, True, True, False, fold=fold)
        output = FusedLinearLogprobs(hidden, weight, None, tokens, settings).run(loss_gradient)
        results = (output.logprobs, output.entropy, output.grad_hidden, output.grad_weight)
        return [result for result in results if result is not None]

    chosen, line = try_kernel(lambda: run(fold_block), lambda: run(None))
    logger.info("softmax of the LM head on this GPU by %s", line)
    return fold_block if chosen else None
