"""Log-probabilities and entropy of chosen tokens together with their gradient, in one pass over the logits.

The plain way multiplies by the LM head four times in training: logits in the forward pass, the same logits again in
the backward pass, and one product for each of the two gradients. A loss that is a sum over tokens has a slope at each
token that is known as soon as that token's log-probability is, so the gradients can be taken while the logits are at
hand: three products, and no chunk of logits outlives its turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_ppo.functional.logprobs import TokenStatistics
from rlhf_ppo.functional.masked import at_least_float32
from rlhf_ppo.functional.products import product
from rlhf_ppo.functional.shared_gradient import SharedGradient

Slopes: TypeAlias = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor | None]]
"""(log-probs [n], entropy [n] or None, which of the tokens) -> (∂loss/∂log-prob [n], ∂loss/∂entropy [n] or None)."""

MOST_BYTES = 31 * 2**20
"""Of one chunk of float32 logits on a CPU: blocks of 32 MiB are those that the C library gives back each time."""
FEWEST = 96
"""Rows of a chunk, whatever the vocabulary. The head's gradient is walked through once a chunk: with fewer rows that
would take longer than the products, and the time of a token would grow with the square of the vocabulary."""
IN_CACHE = 8
"""The part of a chunk whose probabilities stand beside their logits, so that the processor's cache holds both."""
ELSEWHERE = 16
"""Times as many bytes on other devices."""
BLOCK = 4096
"""Tokens of the vocabulary that are multiplied at once on a CPU: both sides of the products stay in the processor's
cache, and neither a second gradient of the head's size comes to life nor a copy of the head in a kernel's own order."""
AGREEMENT = 1e-4
"""How far the gradient that arrives may differ from the foreseen one, relative to its largest entry."""


@dataclass(frozen=True)
class _Settings:
    temperature: float
    chunk_size: int
    with_entropy: bool
    slopes: Slopes | None
    dtype: torch.dtype | None
    shared: SharedGradient | None
    trains_hidden: bool
    trains_weight: bool
    trains_bias: bool


def fused_token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    tokens: Int[Tensor, " tokens"],
    *,
    slopes: Slopes | None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    with_entropy: bool = True,
    product_dtype: torch.dtype | None = None,
    shared: SharedGradient | None = None,
) -> TokenStatistics:
    """`chunked_token_statistics` of a linear head, whose backward pass multiplies nothing.

    `slopes` foresees the gradient that will come back for each token. Where the one that comes is another (the loss is
    no sum over tokens after all), everything is computed again from it: slower, never wrong. A common factor on all
    slopes (loss scaling, the number of processes) is applied and costs nothing.

    Args:
        hidden: States at the positions before the tokens.
        weight: Of the LM head, `logits = hidden weight^T + bias`.
        bias: Of the LM head.
        tokens: The tokens drawn there.
        slopes: The loss's derivatives at each token, given the token's log-probability and entropy; None without a
            gradient, where the same walk scores alone.
        temperature: What the logits are divided by.
        chunk_size: Tokens at a time, at most; fewer where their logits would take more than 31 MiB (CPU) or 496 MiB.
        with_entropy: Also the entropy, which costs one more pass over each chunk.
        product_dtype: Of the three products; None: that of the states.
        shared: Takes the weight's gradient, for the embedding of the same weight that `hidden` comes from.
    """
    if slopes is None and torch.is_grad_enabled():
        raise ValueError("expected slopes where gradients are taken, got None: the head would get no gradient.")
    rows = min(chunk_size, _rows_in(MOST_BYTES, len(weight), weight.device, 1 if slopes is None else FEWEST))
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    shared = shared if trained[0] else None  # the embedding's turn comes through the states
    settings = _Settings(temperature, rows, with_entropy, slopes, product_dtype, shared, *trained)
    logprobs, entropy = _Fused.apply(hidden, weight, bias, tokens, settings)  # type: ignore[no-untyped-call]
    return TokenStatistics(logprobs=logprobs, entropy=entropy if with_entropy else None)


def rows_at_once(chunk_size: int, vocab: int, device: torch.device) -> int:
    """Tokens whose logits live at once without a gradient: `chunk_size`, or fewer where they take too many bytes."""
    return min(chunk_size, _rows_in(MOST_BYTES, vocab, device))


def _rows_in(most: int, vocab: int, device: torch.device, fewest: int = 1) -> int:
    """Rows of float32 logits in so many bytes of a CPU, more elsewhere."""
    most = most if device.type == "cpu" else ELSEWHERE * most
    return max(fewest, most // (4 * max(vocab, 1)))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            found = _Pass(hidden, weight, bias, tokens, settings)
            found.run(settings.slopes)
        ctx.settings, ctx.found = settings, found
        ctx.save_for_backward(hidden, weight, bias, tokens)
        return found.logprobs, found.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError(
                "expected one backward pass through the fused LM head, got a second: its gradients are handed over, "
                "not kept. Sum the losses first, or score without `slopes`."
            )
        found, ctx.found = ctx.found, None
        factor = _common_factor((of_logprobs, of_entropy), (found.of_logprobs, found.of_entropy))
        if factor is None:
            hidden, weight, bias, tokens = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                found = _Pass(hidden, weight, bias, tokens, ctx.settings)
                found.run(lambda _, __, rows: (of_logprobs[rows], of_entropy[rows]))
            factor = 1.0
        gradients: tuple[Tensor | None, ...] = (found.of_hidden, found.of_weight, found.of_bias)
        if factor != 1.0:
            gradients = tuple(None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        of_hidden, of_weight, of_bias = gradients
        if ctx.settings.shared is not None:
            ctx.settings.shared.of_head, of_weight = of_weight, None
        return of_hidden, of_weight, of_bias, None, None


def _common_factor(came: tuple[Tensor, ...], foreseen: tuple[Tensor, ...]) -> float | None:
    """S with came = s foreseen, or None where there is no such number."""
    got, expected = torch.cat(came).double(), torch.cat(foreseen).double()
    square = expected.dot(expected)
    factor = torch.where(square > 0, got.dot(expected) / square, torch.zeros_like(square))
    off = (got - factor * expected).abs().amax() if len(got) else square
    size = got.abs().amax() if len(got) else square
    value, difference, largest = torch.stack([factor, off, size]).tolist()
    if not difference <= AGREEMENT * largest:
        return None
    return 1.0 if abs(value - 1.0) < 1e-6 else float(value)


class _Pass:
    """One walk over the chunks; what it finds lies in its attributes."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, settings: _Settings
    ) -> None:
        self.tokens, self.settings = tokens, settings
        self.inputs = hidden.to(settings.dtype or hidden.dtype)
        self.head = weight.to(self.inputs.dtype)
        self.offset = None if bias is None else bias.to(self.inputs.dtype)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        zeros = torch.zeros(len(tokens), dtype=dtype, device=hidden.device)
        self.logprobs, self.entropy = zeros, zeros.clone()
        self.of_logprobs, self.of_entropy = zeros.clone(), zeros.clone()
        self.of_hidden = torch.zeros_like(hidden) if settings.trains_hidden else None
        self.of_weight: Tensor | None = None
        self.of_bias = torch.zeros_like(bias) if bias is not None and settings.trains_bias else None
        self.weight_dtype = weight.dtype

    def run(self, slopes: Slopes | None) -> None:
        for start in range(0, len(self.tokens), self.settings.chunk_size):
            self._chunk(slice(start, start + self.settings.chunk_size), slopes)
        if self.settings.trains_weight and self.of_weight is None:  # no tokens
            self.of_weight = torch.zeros_like(self.head, dtype=self.weight_dtype)

    def _chunk(self, rows: slice, slopes: Slopes | None) -> None:
        settings = self.settings
        logits = self._logits(self.inputs[rows])
        if settings.temperature != 1.0:
            logits = logits.div_(settings.temperature)
        chosen, largest = logits.gather(-1, self.tokens[rows, None]), logits.amax(dim=-1, keepdim=True)
        if self.offset is not None:
            logits.clamp_(min=-1e30)  # 0 x -inf is nan: an impossible token adds nothing to the entropy
        log_sum, mean_logit = self._to_probabilities(logits)
        self.logprobs[rows] = (chosen - largest - log_sum).squeeze(-1)
        if settings.with_entropy:
            self.entropy[rows] = (largest + log_sum - mean_logit).squeeze(-1)
        if slopes is None:
            return
        of_logprobs, of_entropy = slopes(
            self.logprobs[rows], self.entropy[rows] if settings.with_entropy else None, rows
        )
        self.of_logprobs[rows] = of_logprobs
        # Where the probabilities stand, the gradient of the logits comes to stand, up to a factor for each row.
        scale = of_logprobs[:, None]
        own, factor = torch.ones_like(chosen), -scale
        if of_entropy is not None and bool((of_entropy != 0).any()):
            # ∂H/∂z_j = -p_j (log p_j + H)
            self.of_entropy[rows] = of_entropy
            slope = of_entropy[:, None]
            p_log_p = torch.xlogy(logits, logits)
            logits.mul_(scale + slope * self.entropy[rows, None]).add_(p_log_p.mul_(slope))
            own, factor = scale, -own
        logits.scatter_add_(-1, self.tokens[rows, None], -own.to(logits.dtype))
        self._take(rows, logits, factor / settings.temperature)

    def _to_probabilities(self, logits: Float[Tensor, "rows vocab"]) -> tuple[Tensor, Tensor]:
        """Put probabilities in the place of logits; log Σ exp(z - max z), and Σ p z where entropy is wanted, [rows, 1].

        A few rows at a time, while they are in the processor's cache.
        """
        few = _rows_in(MOST_BYTES // IN_CACHE, logits.shape[-1], logits.device)
        scratch = torch.empty_like(logits[:few])
        log_sums, means = [], []
        for z in logits.split(few):
            p = torch.softmax(z, dim=-1, out=scratch[: len(z)])
            # Of the likeliest token log p = 0 - log Σ exp: exact where the sum of a huge vocabulary would be.
            log_sums.append(-p.amax(dim=-1, keepdim=True).log())
            means.append(z.mul_(p).sum(dim=-1, keepdim=True) if self.settings.with_entropy else log_sums[-1])
            z.copy_(p)
        return torch.cat(log_sums), torch.cat(means)

    def _take(self, rows: slice, of_logits: Tensor, factor: Tensor) -> None:
        """Multiply; the `factor` of each row goes to the narrow side."""
        inputs = (self.inputs[rows] * factor).to(self.inputs.dtype)
        if self.of_bias is not None:
            self.of_bias += (factor.t().to(of_logits.dtype) @ of_logits)[0].to(self.of_bias.dtype)
        first, blocks = self.of_weight is None, self._blocks()
        if first and self.settings.trains_weight and len(blocks) > 1:
            self.of_weight = torch.empty_like(self.head, dtype=self.weight_dtype)
        of_hidden = torch.zeros_like(inputs, dtype=of_logits.dtype)
        for block in blocks:
            part = of_logits[:, block].to(self.inputs.dtype).contiguous()
            if self.of_hidden is not None:
                of_hidden += product(part, self.head[block])
            if self.settings.trains_weight:
                self._take_weight(block, product(part.t(), inputs).to(self.weight_dtype), first=first)
        if self.of_hidden is not None:
            self.of_hidden[rows] = (of_hidden * factor).to(self.of_hidden.dtype)

    def _take_weight(self, block: slice, gradient: Tensor, *, first: bool) -> None:
        if self.of_weight is None:  # the only block of the first chunk
            self.of_weight = gradient
        elif first:
            self.of_weight[block] = gradient
        else:
            self.of_weight[block] += gradient

    def _logits(self, inputs: Tensor) -> Tensor:
        """Of some rows, in at least float32."""
        blocks = self._blocks()
        if len(blocks) <= 1:
            return at_least_float32(product(inputs, self.head.t(), self.offset))
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        logits = torch.empty(len(inputs), len(self.head), dtype=dtype, device=inputs.device)
        for block in blocks:
            logits[:, block] = product(
                inputs, self.head[block].t(), None if self.offset is None else self.offset[block]
            )
        return logits

    def _blocks(self) -> list[slice]:
        """Of the vocabulary; all of it at once where there is no cache to fit into."""
        size = BLOCK if self.head.device.type == "cpu" else len(self.head)
        return [slice(start, start + size) for start in range(0, len(self.head), size)]
