"""One walk through the vocabulary for some tokens: what the LM head says of them, and its gradient.

The vocabulary is cut into blocks, each with a softmax of its own. What a block holds of the whole probability is a
number a row, which goes to the narrow side of the block's products: logits are written once, read while they are in the
processor's cache, and only their probabilities wait for the loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.functional.masked import HALF_PRECISION, at_least_float32
from rlhf_ppo.kernels import memory
from rlhf_ppo.kernels.logits_buffer import Room
from rlhf_ppo.kernels.matmul import TILE, add_product, product, write_product, writes_in_place
from rlhf_ppo.kernels.scratch_buffer import Scratch


@dataclass(frozen=True)
class Slopes:
    """What a loss will send back for each token, foreseen."""

    at: Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor | None]]
    """(log-probs [n], entropy [n] or None, which of the tokens) -> the loss's derivatives, the second one or None."""
    read_entropy: bool = True
    """Whether they depend on the entropy. Where not, they may get None: it then comes from the gradient's products."""


FEWEST = 64
"""Rows beyond the gradient's room, whatever the vocabulary: at 128,000 tokens as many bytes as `kept`. Each chunk walks
once through head and gradient, in the time of the products of ten rows or more: with few rows in a chunk the time of a
token would grow with the square of the vocabulary."""
IMPOSSIBLE = -1e30
"""Stands for a logit of -inf: 0 x -inf is nan, and an impossible token adds nothing to the entropy."""

NO_SHARE = -1e3
"""Stands for the logarithm of a share that is 0; float64 holds none below exp(-745). Times that share it is 0, and
float16 holds it, which -1e30 would overflow."""


@dataclass(frozen=True)
class Sizes:
    """How much of the walk lives at once."""

    kept: int
    """Bytes of probabilities beyond the gradient's room, where the loss is waited for."""
    logits: int
    """Bytes of a block's logits there, by which the block is cut, down to one tile of a product."""
    scored: int
    """Bytes of a block's logits where no loss is waited for, by which the rows are cut."""
    plain: int
    """Bytes of logits of a head that is not walked through by blocks."""
    block: int
    """Tokens of the vocabulary in a block, at most."""
    in_place: bool
    """Whether a row's probabilities may take the place of its logits, and a block's results that of the block before.
    Torch's own allocator does as well on a GPU."""


ON_CPU = Sizes(kept=31 * 2**20, logits=8 * 2**20, scored=4 * 2**20, plain=31 * 2**20, block=4096, in_place=True)
"""A block's logits and both sides of its products stay in the processor's cache, and neither a second gradient of the
head's size comes to life nor a copy of the head in a kernel's own order."""
ELSEWHERE = Sizes(
    kept=496 * 2**20, logits=496 * 2**20, scored=496 * 2**20, plain=496 * 2**20, block=2**16, in_place=False
)


def sizes(device: torch.device) -> Sizes:
    """Those of a device."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def rows_at_once(chunk_size: int, vocab: int, device: torch.device) -> int:
    """Tokens whose logits live at once without a gradient: `chunk_size`, or fewer where they take too many bytes."""
    return min(chunk_size, max(1, sizes(device).plain // (4 * max(vocab, 1))))


@dataclass(frozen=True)
class WalkSettings:
    """How to walk, and which gradients to take."""

    temperature: float
    chunk_size: int
    with_entropy: bool
    dtype: torch.dtype | None
    trains_hidden: bool
    trains_weight: bool
    trains_bias: bool


@dataclass(frozen=True)
class _Chunk:
    """Some rows' softmax over each block of the vocabulary."""

    rows: slice
    probabilities: Float[Tensor, "blocks rows size"]
    """Empty where no gradient will be asked for; the last block may fill a part of its place."""
    ahead: bool
    """Whether they stand where the head's gradient will, a step ahead of it: what is there is no gradient yet."""
    shares: Float[Tensor, "rows blocks"]
    """Of each block in the whole probability."""


@dataclass
class Found:
    """What a walk finds out, for each token and for all of them together."""

    logprobs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    of_logprobs: Float[Tensor, " tokens"]
    """The loss's slope at each, as it was foreseen."""
    of_entropy: Float[Tensor, " tokens"]
    of_hidden: Float[Tensor, "tokens hidden"] | None
    of_bias: Float[Tensor, " vocab"] | None
    of_weight: Float[Tensor, "vocab hidden"] | None = None


class HeadWalk:
    """One walk over all chunks; what it needs on the way ends with it."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, settings: WalkSettings
    ) -> None:
        self.tokens, self.settings, self.sizes = tokens, settings, sizes(weight.device)
        self.inputs = hidden.to(settings.dtype or hidden.dtype)
        self.head = memory.cast(weight, self.inputs.dtype)
        self.offset = None if bias is None else bias.to(self.inputs.dtype)
        zeros = torch.zeros(len(tokens), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        of_hidden = torch.zeros_like(hidden) if settings.trains_hidden else None
        of_bias = torch.zeros_like(bias) if bias is not None and settings.trains_bias else None
        self.found = Found(zeros, zeros.clone(), zeros.clone(), zeros.clone(), of_hidden, of_bias)
        self.gradient = weight.dtype if settings.trains_weight else None
        self.entropy_first = settings.with_entropy
        self.scratch = Scratch(weight.device, reuse=self.sizes.in_place)

    def run(self, slopes: Slopes | None) -> Found:
        """Score all tokens, and take the gradients where the loss's slopes are given."""
        self.block = self._block(kept=slopes is not None)
        self.room = Room(self.head, self.block, self.gradient)
        chunks = self._chunks(kept=slopes is not None)
        if slopes is not None:
            self.entropy_first &= slopes.read_entropy or not self._entropy_can_wait()
            # The last block's rest, and a block for the gradient to be behind: both differ with the rows.
            tokens, most = len(self.head) + 2 * self.sizes.block, self.room.rows + self._most_rows(kept=True)
            self.room.make(chunks, room_for=tokens * most)
            self.found.of_weight = self.room.gradient
        for rows in chunks:
            chunk = self._score(rows, kept=slopes is not None)
            if slopes is not None:
                self._take(chunk, *self._slopes_at(chunk.rows, slopes))
        return self.found

    def _block(self, *, kept: bool) -> int:
        """Tokens of the vocabulary in a block: all blocks are as good as equal."""
        vocab, most = len(self.head), self.sizes.block
        if kept:
            rows = max(1, min(len(self.tokens), self.settings.chunk_size))
            most = min(most, max(TILE, self.sizes.logits // (4 * rows)))
        return math.ceil(vocab / max(1, math.ceil(vocab / most)))

    def _chunks(self, *, kept: bool) -> list[slice]:
        """The rows that the gradient and what may stand beyond have room for, then all others in chunks of one size."""
        total, most = len(self.tokens), self._most_rows(kept=kept)
        start = min(total, self.settings.chunk_size, self.room.rows + most) if kept and self.room.rows > 0 else 0
        chunks = math.ceil((total - start) / most)
        size = math.ceil((total - start) / max(1, chunks))
        others = [slice(first, min(first + size, total)) for first in range(start, total, max(1, size))]
        return [slice(0, start), *others] if start > 0 else others

    def _entropy_can_wait(self) -> bool:
        """Whether the product that the gradient of the states needs is there, and good enough, to tell the entropy."""
        return self.found.of_hidden is not None and self.offset is None and self.head.dtype not in HALF_PRECISION

    def _slopes_at(self, rows: slice, slopes: Slopes) -> tuple[Tensor, Tensor | None]:
        """The loss's, noted down; None for those at the entropy where all are 0."""
        entropy = self.found.entropy[rows] if self.entropy_first else None
        of_logprobs, of_entropy = slopes.at(self.found.logprobs[rows], entropy, rows)
        self.found.of_logprobs[rows] = of_logprobs
        if of_entropy is None or not self.entropy_first or not bool((of_entropy != 0).any()):
            return of_logprobs, None
        self.found.of_entropy[rows] = of_entropy
        return of_logprobs, of_entropy

    def _most_rows(self, *, kept: bool) -> int:
        """Of a chunk whose probabilities fit beyond the gradient or, where none is taken, a block's logits anywhere."""
        if kept:
            rows = max(FEWEST, self.sizes.kept // (self.head.element_size() * max(len(self.head), 1)))
        else:
            rows = self.sizes.scored // (4 * self.sizes.block)
        return min(self.settings.chunk_size, rows)

    def _parts(self) -> list[slice]:
        """The blocks of the vocabulary."""
        size, vocab = self.block, len(self.head)
        return [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]

    def _score(self, rows: slice, *, kept: bool) -> _Chunk:
        """Write down the log-probabilities and entropy of some rows."""
        parts = self._parts()
        probabilities = self.room.of(rows) if kept else self.head.new_empty(len(parts), rows.stop - rows.start, 0)
        chosen = torch.full_like(self.found.logprobs[rows, None], -torch.inf)
        found = [self._softmax(rows, part, chosen, place) for part, place in zip(parts, probabilities, strict=True)]
        largest, log_sums, means = (torch.cat(column, dim=-1) for column in zip(*found, strict=True))
        highest = largest.amax(dim=-1, keepdim=True)
        log_sums = log_sums + (largest - highest)
        log_sum = log_sums.logsumexp(dim=-1, keepdim=True)
        shares = (log_sums - log_sum).exp_()
        self.found.logprobs[rows] = (chosen - highest - log_sum).squeeze(-1)
        if self.entropy_first:
            self.found.entropy[rows] = (highest + log_sum).squeeze(-1) - (shares * means).sum(dim=-1)
        return _Chunk(rows, probabilities, self.room.is_ahead(rows), shares)

    def _softmax(self, rows: slice, part: slice, chosen: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One block's: max z, log Σ exp(z - max z) and Σ p z, each [rows, 1].

        p goes into `place` if that is not empty, and the logits of those tokens that lie in the block into `chosen`.
        """
        self.scratch.begin()
        z = self._logits(rows, part, place)
        index = self.tokens[rows, None] - part.start
        inside = (index >= 0) & (index < z.shape[-1])
        chosen.copy_(torch.where(inside, z.gather(-1, index.clamp(0, z.shape[-1] - 1)), chosen))
        if self.offset is not None:
            z.clamp_(min=IMPOSSIBLE)
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

    def _logits(self, rows: slice, part: slice, place: Tensor) -> Tensor:
        """Those of one block, [rows, block], at least in float32; in `place` where a CPU's product can write there.

        What stands in the way comes from memory while the product is busy, and the probabilities need not wait for it.
        """
        inputs, head = self.inputs[rows], self.head[part].t()
        offset = None if self.offset is None else self.offset[part]
        shape, dtype = (len(inputs), head.shape[1]), torch.promote_types(inputs.dtype, torch.float32)
        if place.shape != shape or place.dtype != dtype or place.device.type != "cpu":
            place = self.scratch.empty(shape, dtype)
        if dtype != inputs.dtype or writes_in_place(inputs, head, place):
            z = write_product(inputs, head, offset, to=place, scratch=self.scratch)
        else:
            z = product(inputs, head, offset)
        return z if self.settings.temperature == 1.0 else z.div_(self.settings.temperature)

    def _take(self, chunk: _Chunk, of_logprobs: Tensor, of_entropy: Tensor | None) -> None:
        """Add up what these rows give to the gradients."""
        inputs, found = self.inputs[chunk.rows], self.found
        of_hidden = torch.zeros_like(found.logprobs[chunk.rows, None].expand(inputs.shape))
        slope = (-of_logprobs if of_entropy is None else -torch.ones_like(of_logprobs))[:, None]
        slope /= self.settings.temperature
        shares = self._to_gradient(chunk, of_logprobs, of_entropy)
        for part, place, share in zip(self._parts(), chunk.probabilities, shares.split(1, dim=-1), strict=True):
            of_logits, factor = place[:, : part.stop - part.start], share * slope
            self.scratch.begin()
            if found.of_bias is not None:
                found.of_bias[part] += (factor.t().to(of_logits.dtype) @ of_logits)[0].to(found.of_bias.dtype)
            if found.of_hidden is not None:
                of_hidden.addcmul_(product(of_logits, self.head[part], scratch=self.scratch), share)
            if found.of_weight is not None:
                scaled = torch.mul(inputs, factor, out=self.scratch.empty(inputs.shape, inputs.dtype))
                into_gradient = write_product if chunk.ahead else add_product
                into_gradient(of_logits.t(), scaled, to=found.of_weight[part], scratch=self.scratch)
        if found.of_hidden is not None:
            found.of_hidden[chunk.rows] = (of_hidden * slope).to(found.of_hidden.dtype)
        if self.settings.with_entropy and not self.entropy_first:
            # H = -log p - Σ (p_j - 1[j = token]) z_j, and Σ (p_j - 1[j = token]) w_j has just been taken.
            others = (inputs * of_hidden).sum(dim=-1) / self.settings.temperature
            found.entropy[chunk.rows] = -found.logprobs[chunk.rows] - others

    def _to_gradient(
        self, chunk: _Chunk, of_logprobs: Tensor, of_entropy: Tensor | None
    ) -> Float[Tensor, "rows blocks"]:
        """Put ∂loss/∂logits in the place of the probabilities, up to a factor for each row and for each row and block.

        With g = ∂loss/∂log π(token) and s = ∂loss/∂H it is g (1[j = token] - p_j) - s p_j (log p_j + H). Left out are
        -g where s = 0, else -1, and the block's share, which is returned.
        """
        q, shares, tokens = chunk.probabilities, chunk.shares, self.tokens[chunk.rows]
        row, own = torch.arange(len(tokens), device=tokens.device), tokens // q.shape[-1]
        # A token's own block gets its share now: its entry p - 1, divided by a share, could be anything.
        q[own, row] = (q[own, row] * shares[row, own, None]).to(q.dtype)
        shares = shares.scatter(1, own[:, None], 1.0)
        log_p = self.found.logprobs[chunk.rows]
        entry = torch.expm1(log_p)
        if of_entropy is not None:
            entropy, p = self.found.entropy[chunk.rows], log_p.exp()
            slope = (of_logprobs + of_entropy * entropy)[:, None]
            for part, place, share in zip(self._parts(), q, shares.split(1, dim=-1), strict=True):
                probability = at_least_float32(place[:, : part.stop - part.start])
                own_slope = slope + of_entropy[:, None] * share.log().clamp(min=NO_SHARE)
                p_log_p = torch.xlogy(probability, probability)
                place[:, : probability.shape[-1]] = probability * own_slope + p_log_p * of_entropy[:, None]
            entry = entry * of_logprobs + of_entropy * (p * entropy + torch.xlogy(p, p))
        q[own, row, tokens % q.shape[-1]] = entry.to(q.dtype)
        return shares
