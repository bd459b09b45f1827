"""Run prompts and responses through a language model: through its layers below the LM head, or by its own call."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.kernels.packing import HiddenStates, packed_hidden, padded_hidden
from rlhf_ppo.models.lm_head import LogitTransform
from rlhf_ppo.utils.transfer import upload

_POSITION_TABLE = re.compile(r"wpe|\w*(pos\w*(emb|enc)|embed_pos)\w*")
Features = tuple[Float[Tensor, "actions features"], Float[Tensor, "states hidden"]]


@dataclass(frozen=True)
class FastPaths:
    """Which fast paths score as the model's own call does; `models.fast_paths` proves them on the model at hand."""

    padding: bool = True
    """Rows of unequal length run side by side, padded on the right; False: each row runs alone."""
    head_rows: bool = True
    """The layers run without the LM head, which then runs on response tokens; False: the model's own call."""
    packing: bool = False
    """Rows of unequal length run packed, without padding."""
    last_layer: bool = False
    """The last layer runs from a prompt's last token on."""
    fused_head: bool = True
    """The LM head computes its gradients while it has the logits."""
    transform: LogitTransform = field(default_factory=LogitTransform)
    """From the LM head's output to the logits."""
    declined: dict[str, str] = field(default_factory=dict)
    """Names of the fast paths that differ from the model's own call -> what was observed."""


class Trunk:
    """Forward pass of a language model up to what its LM head and a value head read.

    The model is an argument of each call, not an attribute: wrappers of a policy may replace its modules.
    """

    def __init__(self) -> None:
        self.work: Counter[str] = Counter()
        """Deterministic counters of tokens and rows, summed until the caller clears them."""
        self.autocast: torch.dtype | None = None
        """Dtype of the layers' matrix products under autocast; None: that of the caller."""
        self.head_dtype: torch.dtype | None = None
        """Dtype of the LM head's matrix products where the fused kernel computes them; None: that of its inputs."""

    def in_compute_dtype(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function under autocast, where that is set."""
        if self.autocast is None:
            return function

        def run(*args: Any) -> Any:
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            with torch.autocast(device.type, dtype=self.autocast):
                return function(*args)

        return run

    def __call__(self, model: Any, inputs: TokenInputs, paths: FastPaths) -> Features:
        """The LM head's inputs (without `head_rows`: the logits) at each action; the states for V(s_0) ... V(s_T)."""
        if self.autocast is None:
            return self._features(model, inputs, paths)
        with torch.autocast(inputs.prompts[0].device.type, dtype=self.autocast):
            return self._features(model, inputs, paths)

    def _features(self, model: Any, inputs: TokenInputs, paths: FastPaths) -> Features:
        if not paths.padding and len(inputs) > 1:
            rows = [self(model, inputs.select(torch.tensor([row])), paths) for row in range(len(inputs))]
            return torch.cat([features for features, _ in rows]), torch.cat([states for _, states in rows])
        if model.config.is_encoder_decoder:
            return self._decoder_states(model, inputs)
        if not paths.head_rows:
            return self._own_call(model, inputs)
        hidden = self._hidden(layers_of(model), inputs, paths)
        return _gather(hidden, inputs, extra=0), _gather(hidden, inputs, extra=1)

    def _own_call(self, model: Any, inputs: TokenInputs) -> Features:
        """The same by the model's own call, logits in place of the LM head's inputs."""
        input_ids = pad_rows([torch.cat(pair) for pair in zip(inputs.prompts, inputs.responses, strict=True)])
        self._count(inputs, input_ids.numel(), 0)
        # A mask of ones keeps the fast causal kernels, and without any, some models warn of padding.
        output = call_model(model, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        states = last_states(output.hidden_states, input_ids)
        starts = [input_ids.shape[1] * row for row in range(len(inputs))]
        logits, hidden = (_flat(features, starts) for features in (output.logits, states))
        return _gather(logits, inputs, extra=0), _gather(hidden, inputs, extra=1)

    def _decoder_states(self, model: Any, inputs: TokenInputs) -> Features:
        """The same for an encoder-decoder, with logits in place of the LM head's inputs.

        The operations before the LM head (a scale, a bias) differ by architecture, so the model computes its logits.
        """
        prompts = list(inputs.prompts)
        starts = [prompt.new_full((1,), decoder_start_token(model)) for prompt in prompts]
        decoded = pad_rows([torch.cat(pair) for pair in zip(starts, inputs.responses, strict=True)])
        input_ids = pad_rows(prompts)
        self._count(inputs, input_ids.numel() + decoded.numel(), len(starts))
        mask = pad_rows([torch.ones_like(prompt) for prompt in prompts])
        output = call_model(model, input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoded)
        decoder_inputs = TokenInputs(prompts=starts, responses=inputs.responses)
        row_starts = [decoded.shape[1] * row for row in range(len(starts))]
        last = last_states(output.decoder_hidden_states, decoded)
        logits, states = (_flat(features, row_starts) for features in (output.logits, last))
        return _gather(logits, decoder_inputs, extra=0), _gather(states, decoder_inputs, extra=1)

    def _hidden(self, layers: Any, inputs: TokenInputs, paths: FastPaths) -> HiddenStates:
        rows = [torch.cat(pair) for pair in zip(inputs.prompts, inputs.responses, strict=True)]
        ragged = len({len(row) for row in rows}) > 1
        # A checkpointed layer is recomputed in the backward pass, with the model's own attention and last layer.
        recomputed = layers.training
        first_read = [len(prompt) - 1 for prompt in inputs.prompts] if paths.last_layer and not recomputed else None
        compute_hidden = packed_hidden if ragged and paths.packing and not recomputed else padded_hidden
        hidden = compute_hidden(layers, rows, first_read=first_read)
        real = sum(len(row) for row in rows)
        self._count(inputs, hidden.positions, 0)
        self.work["last_layer_tokens"] += hidden.positions if first_read is None else real - sum(first_read)
        return hidden

    def _count(self, inputs: TokenInputs, positions: int, extra: int) -> None:
        self.work["trunk_tokens"] += positions
        self.work["real_tokens"] += sum(map(len, inputs.prompts)) + sum(map(len, inputs.responses)) + extra


def layers_of(model: Any) -> Any:
    """The module below the LM head of a language model, adapters included; a ValueError if it has none."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    for layers in (base.base_model, decoder, getattr(base, "model", None)):
        if isinstance(layers, nn.Module) and layers is not base:
            return layers
    raise ValueError(
        f"expected a model with layers below its LM head, got {type(base).__name__} with none that transformers names "
        "(`base_model`): nothing there gives hidden states without logits. Use the policy's own value head."
    )


def call_model(model: Any, **inputs: Tensor | None) -> Any:
    """Call a language model for logits and hidden states, without the arguments that its `forward` does not know."""
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    settings: dict[str, Any] = {**given, "use_cache": False, "output_hidden_states": True, "return_dict": True}
    parameters = inspect.signature(model.forward).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        settings = {name: value for name, value in settings.items() if name in parameters}
    output = model(**settings)
    expected = given.get("decoder_input_ids", given["input_ids"]).shape
    if output.logits.dim() != 3 or output.logits.shape[:2] != expected:
        raise ValueError(f"its logits are {list(output.logits.shape)} for tokens {list(expected)}, not one row a token")
    return output


def last_states(layers: Sequence[Tensor] | None, tokens: Tensor) -> Float[Tensor, "rows width hidden"]:
    """The last of a model's hidden states, without positions that it added behind `tokens` (Reformer).

    Raises:
        ValueError: They are not one row a token.
    """
    states = None if layers is None else layers[-1]
    if states is None or states.dim() != 3 or len(states) != len(tokens) or states.shape[1] < tokens.shape[1]:
        found = None if states is None else list(states.shape)
        raise ValueError(f"its last hidden states are {found} for tokens {list(tokens.shape)}, not one row a token")
    return states[:, : tokens.shape[1]]


def decoder_start_token(model: Any) -> int:
    """The token id that an encoder-decoder's decoder starts with; a ValueError if its configurations have none."""
    for settings in (model.config, model.generation_config):
        token: int | None = getattr(settings, "decoder_start_token_id", None)
        if token is not None:
            return token
    raise ValueError(
        f"{type(model).__name__} has no decoder_start_token_id: its decoder cannot start a response. "
        "Set `model.config.decoder_start_token_id`."
    )


def max_positions(model: Any) -> int | None:
    """Tokens for which a model says that it has positions; None if it says nothing.

    RoBERTa and its relatives begin to count behind the position of their padding.
    """
    limit: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet says -1
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = [index for table in tables if (index := getattr(table, "padding_idx", None)) is not None]
    return limit - max(padding, default=-1) - 1


def learned_positions(model: Any) -> int | None:
    """Tokens that a model has position embeddings for; None for rotary and relative positions, or none at all."""
    text_config = model.config.get_text_config(decoder=True)
    rotary = ("rope_parameters", "rope_scaling", "rope_theta")
    is_rotary = any(getattr(text_config, name, None) is not None for name in rotary)
    return max_positions(model) if not is_rotary and _has_position_table(model) else None


def _has_position_table(model: nn.Module) -> bool:
    """Whether a module or tensor is named like one; DeBERTa and Jamba have a `max_position_embeddings` without it."""
    for module in model.modules():
        parts = vars(module) | module._parameters | module._buffers | module._modules
        for name, part in parts.items():
            if isinstance(part, Tensor | nn.Module) and _POSITION_TABLE.fullmatch(name):
                return True
    return False


def _flat(features: Float[Tensor, "rows width features"], starts: list[int]) -> HiddenStates:
    return HiddenStates(features.flatten(0, 1), starts, features.shape[0] * features.shape[1])


def _gather(hidden: HiddenStates, inputs: TokenInputs, *, extra: int) -> Float[Tensor, "rows hidden"]:
    """Hidden states that predict the response tokens: positions P_i - 1 ... P_i + T_i - 2 (+ `extra`)."""
    spans = [
        torch.arange(start + len(prompt) - 1, start + len(prompt) + len(response) - 1 + extra)
        for start, prompt, response in zip(hidden.starts, inputs.prompts, inputs.responses, strict=True)
    ]
    return hidden.states.index_select(0, upload(torch.cat(spans), hidden.states.device))
