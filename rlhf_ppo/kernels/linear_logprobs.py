"""Log-probabilities, entropy and gradients of a linear LM head, block by block of the vocabulary.

Each block of the vocabulary has a softmax of its own. The block's share of the whole probability is one number per row,
which is multiplied into the narrow operand of the block's products: logits are written once, read while they are in the
processor's cache, and only their probabilities are kept until the gradient of the loss is known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.functional.masked import HALF_PRECISION, at_least_float32
from rlhf_ppo.kernels import chunk_sizes, memory
from rlhf_ppo.kernels.float16_range import divide_by_largest, multiply_by
from rlhf_ppo.kernels.logits_buffer import LogitsBuffer
from rlhf_ppo.kernels.matmul import matmul
from rlhf_ppo.kernels.scratch_buffer import ScratchBuffer


@dataclass(frozen=True)
class LossGradient:
    """The derivatives of a loss at each token, computed before the backward pass."""

    at: Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor | None]]
    """(log-probs [n], entropy [n] or None, which of the tokens) -> the loss's derivatives, the second one or None."""
    reads_entropy: bool = True
    """Whether they depend on the entropy. Where not, they may get None: it then comes from the gradient's products."""
    differs: list[Tensor] | None = None
    """None: the backward pass compares the gradient that arrives with these derivatives, and waits for the device to
    know. A list: it trusts them, and appends 1 where they differ, else 0, for the caller to read later."""


MASKED_LOGIT = -1e30
"""Stands for a logit of -inf: 0 x -inf is nan, and an impossible token adds nothing to the entropy."""

LOG_OF_ZERO_SHARE = -1e3
"""Stands for the logarithm of a share that is 0; float64 holds none below exp(-745). Times that share it is 0, and
float16 holds it, which -1e30 would overflow."""


BlockFold: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""Statistics of a block's softmax: see `triton_logprobs.fold_block`."""


@dataclass(frozen=True)
class LinearLogprobsSettings:
    """Sampling temperature, chunking, precision, and which gradients to compute."""

    temperature: float
    chunk_size: int
    with_entropy: bool
    matmul_dtype: torch.dtype | None
    trains_hidden: bool
    trains_weight: bool
    trains_bias: bool
    fold: BlockFold | None = field(default=None, kw_only=True)
    """Computes the statistics of each block's softmax; None: torch does."""


@dataclass(frozen=True)
class _Chunk:
    """The softmax of some rows over each block of the vocabulary."""

    rows: slice
    probabilities: Float[Tensor, "blocks rows size"]
    """Empty without a gradient; the last block may fill only a part of its place."""
    overlaps_gradient: bool
    """Whether they lie where the head's gradient will be written: nothing is added to it there yet."""
    shares: Float[Tensor, "rows blocks"]
    """Of each block in the whole probability."""


@dataclass
class HeadOutput:
    """Log-probabilities and entropy of each token, and the gradients where they were asked for."""

    logprobs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    grad_logprobs: Float[Tensor, " tokens"]
    """∂loss/∂logprob at each token, as `LossGradient` gave it."""
    grad_entropy: Float[Tensor, " tokens"]
    grad_hidden: Float[Tensor, "tokens hidden"] | None
    grad_bias: Float[Tensor, " vocab"] | None
    grad_weight: Float[Tensor, "vocab hidden"] | None = None


class FusedLinearLogprobs:
    """One forward pass of the LM head over all tokens in chunks, with its gradients where the loss's are known.

    Its plain twin is `functional.logprobs.chunked_token_statistics` with autograd.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, settings: LinearLogprobsSettings
    ) -> None:
        self.tokens, self.settings, self.sizes = tokens, settings, chunk_sizes.chunk_sizes(weight.device)
        self.inputs = hidden.to(settings.matmul_dtype or hidden.dtype)
        self.head = memory.cast(weight, self.inputs.dtype)
        self.offset = None if bias is None else bias.to(self.inputs.dtype)
        zeros = torch.zeros(len(tokens), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        single = torch.float32 if hidden.dtype == torch.float16 else None  # until the loss's scale is applied
        grad_hidden = torch.zeros_like(hidden, dtype=single) if settings.trains_hidden else None
        grad_bias = torch.zeros_like(bias) if bias is not None and settings.trains_bias else None
        self.output = HeadOutput(zeros, zeros.clone(), zeros.clone(), zeros.clone(), grad_hidden, grad_bias)
        self.grad_dtype = weight.dtype if settings.trains_weight else None
        self.entropy_first = settings.with_entropy
        self.scratch = ScratchBuffer(weight.device, reuse=self.sizes.in_place)

    def run(self, loss_gradient: LossGradient | None) -> HeadOutput:
        """Compute log-probabilities of all tokens and, given the derivatives of the loss, the gradients."""
        training = loss_gradient is not None
        self.block = self._block_size(training=training)
        self.buffer = LogitsBuffer(self.head, self.block, self.grad_dtype)
        chunks = self._chunks(training=training)
        if loss_gradient is not None:
            self.entropy_first &= loss_gradient.reads_entropy or not self._entropy_can_wait()
            tokens = len(self.head) + self.sizes.block  # the last block's rest differs with the rows
            self.buffer.allocate(chunks, capacity=tokens * (self.buffer.shared_rows + self._max_rows(training=True)))
            self.output.grad_weight = self.buffer.gradient
        for rows in chunks:
            chunk = self._score(rows, training=training)
            if loss_gradient is not None:
                self._add_gradients(chunk, *self._gradient_at(chunk.rows, loss_gradient))
        return self.output

    def _block_size(self, *, training: bool) -> int:
        """Tokens of the vocabulary in a block; all blocks have nearly the same size."""
        vocab, most = len(self.head), self.sizes.block
        if training:
            rows = max(1, min(len(self.tokens), self.settings.chunk_size))
            most = min(most, max(chunk_sizes.MIN_BLOCK, self.sizes.block_logits // (4 * rows)))
        return math.ceil(vocab / max(1, math.ceil(vocab / most)))

    def _chunks(self, *, training: bool) -> list[slice]:
        """First the rows that share the gradient's memory and those beyond it, then chunks of equal size."""
        total, most, shared = len(self.tokens), self._max_rows(training=training), self.buffer.shared_rows
        start = min(total, self.settings.chunk_size, shared + most) if training and shared > 0 else 0
        chunks = math.ceil((total - start) / most)
        size = math.ceil((total - start) / max(1, chunks))
        others = [slice(first, min(first + size, total)) for first in range(start, total, max(1, size))]
        return [slice(0, start), *others] if start > 0 else others

    def _entropy_can_wait(self) -> bool:
        """Whether the entropy can be taken from the product that the gradient of the states needs anyway."""
        return self.output.grad_hidden is not None and self.offset is None and self.head.dtype not in HALF_PRECISION

    def _gradient_at(self, rows: slice, loss_gradient: LossGradient) -> tuple[Tensor, Tensor | None]:
        """The derivatives of the loss at some tokens, stored too; None for those by the entropy where all are 0."""
        entropy = self.output.entropy[rows] if self.entropy_first else None
        grad_logprobs, grad_entropy = loss_gradient.at(self.output.logprobs[rows], entropy, rows)
        self.output.grad_logprobs[rows] = grad_logprobs
        if grad_entropy is None or not self.entropy_first or not loss_gradient.reads_entropy:
            return grad_logprobs, None
        if grad_entropy.device.type == "cpu" and not bool((grad_entropy != 0).any()):  # a GPU's host would wait
            return grad_logprobs, None
        self.output.grad_entropy[rows] = grad_entropy
        return grad_logprobs, grad_entropy

    def _max_rows(self, *, training: bool) -> int:
        """Most rows of a chunk: beyond those that share the gradient's memory, or without a gradient."""
        if training:
            row_bytes = self.head.element_size() * max(len(self.head), 1)
            rows = max(chunk_sizes.MIN_EXTRA_ROWS, self.sizes.probabilities // row_bytes)
        else:
            rows = self.sizes.scoring_logits // (4 * self.sizes.block)
        return min(self.settings.chunk_size, rows)

    def _blocks(self) -> list[slice]:
        """The blocks of the vocabulary."""
        size, vocab = self.block, len(self.head)
        return [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]

    def _score(self, rows: slice, *, training: bool) -> _Chunk:
        """Store the log-probabilities and entropy of some rows."""
        parts = self._blocks()
        nothing = (len(parts), rows.stop - rows.start, 0)
        probabilities = self.buffer.probabilities(rows) if training else self.head.new_empty(nothing)
        chosen = torch.full_like(self.output.logprobs[rows, None], -torch.inf)
        found = [self._softmax(rows, part, chosen, place) for part, place in zip(parts, probabilities, strict=True)]
        largest, log_sums, means = (torch.cat(column, dim=-1) for column in zip(*found, strict=True))
        highest = largest.amax(dim=-1, keepdim=True)
        log_sums = log_sums + (largest - highest)
        log_sum = log_sums.logsumexp(dim=-1, keepdim=True)
        shares = (log_sums - log_sum).exp_()
        self.output.logprobs[rows] = (chosen - highest - log_sum).squeeze(-1)
        if self.entropy_first:
            self.output.entropy[rows] = (highest + log_sum).squeeze(-1) - (shares * means).sum(dim=-1)
        return _Chunk(rows, probabilities, self.buffer.overlaps_gradient(rows), shares)

    def _softmax(self, rows: slice, part: slice, chosen: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """Of one block: max z, log Σ exp(z - max z) and Σ p z, each [rows, 1].

        p goes into `place` if that is not empty, and the logits of those tokens that lie in the block into `chosen`.
        """
        self.scratch.reset()
        z = self._logits(rows, part, place)
        if self.settings.fold is not None:
            return self._fold(z, self.tokens[rows], part.start, chosen, place)
        index = self.tokens[rows, None] - part.start
        inside = (index >= 0) & (index < z.shape[-1])
        chosen.copy_(torch.where(inside, z.gather(-1, index.clamp(0, z.shape[-1] - 1)), chosen))
        if self.offset is not None:
            z.clamp_(min=MASKED_LOGIT)
        largest = z.amax(dim=-1, keepdim=True)
        fits = place.shape == z.shape and place.dtype == z.dtype
        other = self.scratch.empty(z.shape, z.dtype) if self.entropy_first or not self.sizes.in_place else z
        logits = other.copy_(z) if z is place and self.entropy_first else z
        p = torch.softmax(z, dim=-1, out=place if fits else other)
        # Of the likeliest token log p = 0 - log Σ exp: exact where the sum of a huge vocabulary would be.
        log_sum = p.amax(dim=-1, keepdim=True).log_().neg_()
        mean = logits.mul_(p).sum(dim=-1, keepdim=True) if self.entropy_first else log_sum
        if place.numel() > 0 and p is not place:
            place[:, : p.shape[-1]] = p
        return largest, log_sum, mean

    def _fold(self, z: Tensor, tokens: Tensor, start: int, chosen: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        assert self.settings.fold is not None
        if self.offset is not None:
            z.clamp_(min=MASKED_LOGIT)
        largest, log_sum, mean = self.settings.fold(z, tokens, start, chosen, with_entropy=self.entropy_first)
        if self.offset is not None:
            chosen.masked_fill_(chosen <= MASKED_LOGIT, -torch.inf)
        if place.numel() > 0:
            torch.exp(z.sub_(largest + log_sum), out=place[:, : z.shape[-1]])
        return largest, log_sum, mean

    def _logits(self, rows: slice, part: slice, place: Tensor) -> Tensor:
        """Logits of one block, [rows, block], at least in float32; in `place` where they are cast and fit there."""
        inputs, head = self.inputs[rows], self.head[part].t()
        offset = None if self.offset is None else self.offset[part]
        z, dtype = matmul(inputs, head, offset, scratch=self.scratch), torch.promote_types(inputs.dtype, torch.float32)
        if z.dtype != dtype:
            if place.shape != z.shape or place.dtype != dtype or place.device.type != "cpu":
                place = self.scratch.empty(z.shape, dtype)
            z = place.copy_(z)
        return z if self.settings.temperature == 1.0 else z.div_(self.settings.temperature)

    def _add_gradients(self, chunk: _Chunk, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> None:
        """Add the gradients of some rows."""
        inputs, output = self.inputs[chunk.rows], self.output
        unit, grad_logprobs, grad_entropy = divide_by_largest(inputs.dtype, grad_logprobs, grad_entropy)
        grad_hidden = torch.zeros_like(output.logprobs[chunk.rows, None].expand(inputs.shape))
        slope = (-grad_logprobs if grad_entropy is None else -torch.ones_like(grad_logprobs))[:, None]
        slope /= self.settings.temperature
        shares = self._logit_gradients(chunk, grad_logprobs, grad_entropy)
        self.scratch.release()
        for part, place, share in zip(self._blocks(), chunk.probabilities, shares.split(1, dim=-1), strict=True):
            grad_logits, factor = place[:, : part.stop - part.start], share * slope
            self.scratch.reset()
            if output.grad_bias is not None:
                product = multiply_by(unit, factor.t().to(grad_logits.dtype) @ grad_logits)
                output.grad_bias[part] += product[0].to(output.grad_bias.dtype)
            if output.grad_hidden is not None:
                grad_hidden.addcmul_(matmul(grad_logits, self.head[part], scratch=self.scratch), share)
            if output.grad_weight is not None:
                scaled = torch.mul(inputs, factor, out=self.scratch.empty(inputs.shape, inputs.dtype))
                gradient = output.grad_weight[part]
                accumulate = gradient.copy_ if chunk.overlaps_gradient else gradient.add_
                accumulate(multiply_by(unit, matmul(grad_logits.t(), scaled, scratch=self.scratch)))
        if output.grad_hidden is not None:
            output.grad_hidden[chunk.rows] = multiply_by(unit, grad_hidden * slope).to(output.grad_hidden.dtype)
        if self.settings.with_entropy and not self.entropy_first:
            # H = -log p - Σ (p_j - 1[j = token]) z_j, and Σ (p_j - 1[j = token]) w_j has just been taken.
            others = (inputs * grad_hidden).sum(dim=-1) / self.settings.temperature
            output.entropy[chunk.rows] = -output.logprobs[chunk.rows] - others

    def _logit_gradients(
        self, chunk: _Chunk, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> Float[Tensor, "rows blocks"]:
        """Overwrite the probabilities with ∂loss/∂logits, up to a factor for each row and for each row and block.

        With g = ∂loss/∂log π(token) and s = ∂loss/∂H it is g (1[j = token] - p_j) - s p_j (log p_j + H). Left out are
        -g where s = 0, else -1, and the block's share, which is returned.
        """
        q, shares, tokens = chunk.probabilities, chunk.shares, self.tokens[chunk.rows]
        row, own = torch.arange(len(tokens), device=tokens.device), tokens // q.shape[-1]
        # A token's own block gets its share now: its entry p - 1, divided by a share, could be anything.
        flat, index = q.flatten(0, 1), own * len(tokens) + row
        self.scratch.reset()
        own_blocks = torch.index_select(flat, 0, index, out=self.scratch.empty((len(tokens), q.shape[-1]), q.dtype))
        flat.index_copy_(0, index, own_blocks.mul_(shares.gather(1, own[:, None])))
        shares = shares.scatter(1, own[:, None], 1.0)
        log_p = self.output.logprobs[chunk.rows]
        entry = torch.expm1(log_p)
        if grad_entropy is not None:
            entropy, p = self.output.entropy[chunk.rows], log_p.exp()
            slope = (grad_logprobs + grad_entropy * entropy)[:, None]
            for part, place, share in zip(self._blocks(), q, shares.split(1, dim=-1), strict=True):
                probability = at_least_float32(place[:, : part.stop - part.start])
                own_slope = slope + grad_entropy[:, None] * share.log().clamp(min=LOG_OF_ZERO_SHARE)
                p_log_p = torch.xlogy(probability, probability)
                place[:, : probability.shape[-1]] = probability * own_slope + p_log_p * grad_entropy[:, None]
            entry = entry * grad_logprobs + grad_entropy * (p * entropy + torch.xlogy(p, p))
        q[own, row, tokens % q.shape[-1]] = entry.to(q.dtype)
        return shares
