"""Prove on the model at hand that fast paths score as its own call does: one small batch, once, before they are used.

The model's own call gives the right log-probabilities, hidden states and gradients: on a padded batch where a row alone
or packed rows, which know no padding, agree with it, else on each row alone. Each fast path must give the same, or is
declined. Gradients of embeddings and LM heads with more than 2^18 entries are not compared.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.functional import TokenStatistics, token_logprobs
from rlhf_ppo.kernels.linear_layers import decline_fast_layers, has_fast_layers, plain_layers
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.kernels.packing import reason_not_to_pack
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.models.gradient_check import gradient_difference, gradients_by, some_trained_parameters
from rlhf_ppo.models.lm_head import assumed_transform, find_transform, relative_gap
from rlhf_ppo.models.small_batch import is_low_precision, is_sharded, small_batch
from rlhf_ppo.models.trunk import FastPaths, Trunk, layers_of

logger = logging.getLogger(__name__)

TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-4, 5e-2
"""How far logits and hidden states may differ, relative to the largest; gradients ten times as far."""
TRANSFORM_ROWS = 2
"""Rows of logits that tell the transform behind the LM head; log-probabilities of all are compared with it."""
COSTS = {
    "padding": "rows are scored one by one",
    "head_rows": "logits of all tokens are computed, prompts included",
    "packing": "padding runs through the layers",
    "last_layer": "the last layer runs on prompts, too",
    "fused_head": "the LM head's logits are computed again in the backward pass",
    "fast_layers": "layers run by torch's own products",
}
"""What it costs to do without each fast path."""

ScoredBy: TypeAlias = Callable[[FastPaths, TokenInputs, LossGradient | None], tuple[Tensor, Tensor, TokenStatistics]]
"""Scores a batch by given paths: the LM head's inputs, the value head's, the statistics of response tokens."""


@dataclass(frozen=True)
class _Expected:
    """The model's own results on the small batch."""

    logits: Tensor
    states: Tensor
    logprobs: Tensor
    largest: float
    """The largest logit; not finite if one of them is not."""
    gradients: dict[str, Tensor]


def prove_fast_paths(language_model: Any, wanted: FastPaths, scored_by: ScoredBy, *, temperature: float) -> FastPaths:
    """Those of the fast paths `wanted` that give the model's own log-probabilities, hidden states and gradients.

    Logs one line that names the declined ones, with their costs.

    Args:
        language_model: The causal model or encoder-decoder, adapters included, without its value head.
        wanted: The fast paths that the settings ask for.
        scored_by: Scores a batch by given paths.

    Raises:
        ValueError: The model's own call is no policy over tokens: it fails, sees later tokens, or is random.
    """
    weights = list(language_model.parameters())
    if any(isinstance(weight.data, FakeTensor) or weight.device.type == "meta" for weight in weights):
        return replace(wanted, transform=assumed_transform(language_model.config))  # a plan's weights: nothing to try
    devices = [weights[0].device] if weights[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(weights[0].device.type, enabled=False):
        proof = _Proof(language_model, wanted, scored_by, temperature)
        with EvalMode(language_model):
            paths = proof.run()
    if paths.declined:
        named = [f"{name} ({reason}): {COSTS[name]}" for name, reason in paths.declined.items()]
        level = logging.INFO if set(paths.declined) <= {"packing", "last_layer"} else logging.WARNING
        logger.log(level, "%s: declined, as the model's own call gives other numbers: %s",
                   type(language_model).__name__, "; ".join(named))  # fmt: skip
    return paths


class _Proof:
    def __init__(self, model: Any, wanted: FastPaths, scored_by: ScoredBy, temperature: float) -> None:
        self.model, self.wanted, self.scored_by, self.temperature = model, wanted, scored_by, temperature
        self.inputs = small_batch(model)
        self.tokens = torch.cat(list(self.inputs.responses))
        generator = torch.Generator().manual_seed(0)
        self.slopes = torch.linspace(-1.0, 1.0, len(self.tokens)).to(self.tokens.device)
        self.slope_of_states = torch.rand(1, generator=generator).item()
        self.trained = {} if is_sharded(model) else some_trained_parameters(model)  # a backward pass is collective
        self.tolerance = LOW_PRECISION_TOLERANCE if is_low_precision(model) else TOLERANCE
        self.declined: dict[str, str] = {}

    def run(self) -> FastPaths:
        if (paths := self._all_at_once()) is not None:
            return paths
        with plain_layers(self.model):
            self.expected, paths = self._own_results()
        if not bool(self.expected.logits.isfinite().any()):
            return replace(paths, head_rows=False)
        full = replace(paths, head_rows=self.wanted.head_rows and not self.model.config.is_encoder_decoder)
        full = self._with_transform(self._within_reach(full))
        reason = self._difference(full)
        if reason is not None:
            with plain_layers(self.model):
                full = self._found_one_by_one(full)
            reason = self._difference(full)
            if reason is not None and has_fast_layers(self.model):
                self.declined["fast_layers"] = reason
                decline_fast_layers(self.model)
        return replace(full, declined=self.declined)

    def _all_at_once(self) -> FastPaths | None:
        """All paths that are wanted, if packed rows give what one padded call of the model's own gives; None: unsure.

        Only one of the two has padding, so both are right about it.
        """
        if not (self.wanted.packing and self.wanted.head_rows) or self.model.config.is_encoder_decoder:
            return None
        try:
            if reason_not_to_pack(layers_of(self.model)) is not None:
                return None
            with plain_layers(self.model), torch.enable_grad():
                self.expected = self._expected(*Trunk()(self.model, self.inputs, replace(self.wanted, head_rows=False)))
        except Exception:  # the plain way finds the error again, and says it
            return None
        certain = math.isfinite(self.expected.largest)
        certain = certain and self._causality_gap(self.expected.logits) <= self.tolerance
        paths = self._with_transform(self.wanted) if certain else replace(self.wanted, head_rows=False)
        is_right = paths.head_rows and self._difference(paths) is None
        self.declined.clear()
        return paths if is_right else None

    def _own_results(self) -> tuple[_Expected, FastPaths]:
        """The model's own logits, states and gradients; whether rows of unequal length may run side by side.

        One call gives all of them where it gives the third row's as they are without the others.
        """
        plain = replace(self.wanted, padding=True, head_rows=False, packing=False, last_layer=False, fused_head=False)
        trunk = Trunk()
        with torch.no_grad():
            third = self._own_call(trunk, self.inputs.select(torch.tensor([2])), plain)
        with torch.enable_grad():
            try:
                features = trunk(self.model, self.inputs, plain)
                reason = self._describe_third(features, third)
            except Exception as error:
                reason = _first_line(error)
            if reason is not None or self._causality_gap(features[0]) > self.tolerance:
                self.declined["padding"] = reason or "a row's results depend on the length of the others"
                plain = replace(plain, padding=False)
                features = self._own_call(trunk, self.inputs, plain)
                self._check(features, third)
        try:
            return self._expected(*features), plain
        except Exception as error:
            raise ValueError(
                f"expected {type(self.model).__name__} to have gradients in eval mode, in which PPO trains, got "
                f"{_first_line(error)}. Its log-probabilities cannot be trained: use another architecture."
            ) from error

    def _expected(self, logits: Tensor, states: Tensor) -> _Expected:
        logprobs = token_logprobs(logits, self.tokens, temperature=self.temperature)
        gradients = self._gradients(logprobs, states)
        logits = logits.detach()
        return _Expected(logits, states.detach(), logprobs.detach(), float(logits.abs().max()), gradients)

    def _own_call(self, trunk: Trunk, inputs: TokenInputs, plain: FastPaths) -> tuple[Tensor, Tensor]:
        """Logits and states of `inputs`; ValueError if the model's own call fails."""
        name = type(self.model).__name__
        try:
            return trunk(self.model, inputs, plain)
        except Exception as error:
            raise ValueError(
                f"expected a model that computes logits and hidden states from token ids, got {name}, whose own call "
                f"fails: {_first_line(error)}. It cannot be a policy over tokens as it stands: complete its "
                "configuration (attn_implementation='sdpa', if it names another), or use another architecture."
            ) from error

    def _describe_third(self, features: tuple[Tensor, Tensor], third: tuple[Tensor, Tensor]) -> str | None:
        logits, states = (relative_gap(found[-len(row) :], row) for found, row in zip(features, third, strict=True))
        return _describe(logits, states, self.tolerance)

    def _causality_gap(self, logits: Tensor) -> float:
        """The second row is the beginning of the first: its logits must be the same, as nothing before them differs."""
        first, second = (len(self.inputs.responses[row]) for row in (0, 1))
        return relative_gap(logits[first : first + second], logits[:second])

    def _check(self, features: tuple[Tensor, Tensor], third: tuple[Tensor, Tensor]) -> None:
        """Refuse a model whose rows, each by itself, have no certain log-probabilities."""
        name = type(self.model).__name__
        gap = relative_gap(features[0][-len(third[0]) :], third[0])
        if gap > self.tolerance:
            raise ValueError(
                f"expected {name} to give the same log-probabilities at every call, got logits that differ by "
                f"{gap:.1e} of the largest: its layers draw random numbers, also in eval mode, so PPO's ratios would "
                "be wrong. Switch that off in its configuration, or use another architecture."
            )
        gap = self._causality_gap(features[0])
        if gap > self.tolerance:
            raise ValueError(
                f"expected a causal model, got {name}, whose logits change by {gap:.1e} of the "
                "largest with the tokens that follow: a response's log-probabilities would depend on its own end, and "
                "generation would follow another distribution. Load it as a decoder (`config.is_decoder = True`), or "
                "use another architecture."
            )

    def _within_reach(self, paths: FastPaths) -> FastPaths:
        """`paths` with what the settings ask for and the architecture allows."""
        if not paths.head_rows:
            return paths
        packing = self.wanted.packing and paths.padding
        if packing and (reason := reason_not_to_pack(layers_of(self.model))) is not None:
            packing = False
            self.declined["packing"] = reason
        return replace(paths, packing=packing, last_layer=self.wanted.last_layer, fused_head=self.wanted.fused_head)

    def _with_transform(self, paths: FastPaths) -> FastPaths:
        """`paths` with the scale or cap between LM head and logits; without `head_rows` where none is known."""
        if not paths.head_rows:
            return paths
        try:
            with torch.no_grad(), plain_layers(self.model):
                output = self.model.get_output_embeddings()(self._head_inputs()[-TRANSFORM_ROWS:])
            own = self.expected.logits[-TRANSFORM_ROWS:]
            transform = find_transform(self.model.config, output, own, tolerance=self.tolerance)
            reason = None if transform is not None else "its logits are not those of the LM head on the last states"
        except Exception as error:
            transform, reason = None, _first_line(error)
        if transform is not None:
            return replace(paths, transform=transform)
        self.declined["head_rows"] = str(reason)
        return replace(paths, head_rows=False, packing=False, last_layer=False, fused_head=False)

    def _head_inputs(self) -> Tensor:
        """The states of the model's own call at the actions: without each row's last one."""
        rows = self.expected.states.split((self.inputs.response_lengths() + 1).tolist())
        return torch.cat([row[:-1] for row in rows])

    def _found_one_by_one(self, full: FastPaths) -> FastPaths:
        """The fast paths of `full` that are right by themselves, and right together."""
        paths = replace(full, packing=False, last_layer=False, fused_head=False)
        if full.head_rows and (reason := self._difference(paths)) is not None:
            self.declined["head_rows"] = reason
            return replace(paths, head_rows=False)
        for name in ("last_layer", "packing", "fused_head"):
            if getattr(full, name):
                further: FastPaths = replace(paths, **{name: True})  # type: ignore[arg-type]
                reason = self._difference(further)
                if reason is None:
                    paths = further
                else:
                    self.declined[name] = reason
        return paths

    def _difference(self, paths: FastPaths) -> str | None:
        """What differs between `paths` and the model's own results; None: nothing."""
        known = LossGradient(lambda _, __, rows: (self.slopes[rows], None), reads_entropy=False)
        try:
            with torch.set_grad_enabled(bool(self.trained)):
                hidden, states, statistics = self.scored_by(paths, self.inputs, known if paths.fused_head else None)
                gradients = self._gradients(logprobs := statistics.logprobs, states)
        except Exception as error:
            return _first_line(error)
        # With the right transform, right inputs of the LM head give right logits.
        features = self._head_inputs() if paths.head_rows else self.expected.logits
        gaps = [relative_gap(hidden, features), relative_gap(states, self.expected.states)]
        gap = float((logprobs - self.expected.logprobs).detach().abs().max())
        gaps.append(gap / max(1.0, self.expected.largest))
        reason = _describe(max(gaps), 0.0, self.tolerance)
        return reason or gradient_difference(self.expected.gradients, gradients, 10 * self.tolerance)

    def _gradients(self, logprobs: Tensor, states: Tensor) -> dict[str, Tensor]:
        """Gradients of a loss in log-probabilities and states by some trained parameters."""
        loss = (self.slopes * logprobs).sum() + self.slope_of_states * states.float().sin().sum()
        return gradients_by(self.trained, loss) if loss.requires_grad else {}


def _describe(logits: float, states: float, tolerance: float) -> str | None:
    if logits <= tolerance and states <= tolerance:
        return None
    what, gap = ("logits", logits) if logits > tolerance else ("hidden states", states)
    return f"{what} differ by {gap:.1e} of the largest"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"
