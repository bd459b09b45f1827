"""Run prompts and responses through a language model's layers below the LM head: packed, padded, or encoder-decoder."""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.kernels.packing import HiddenStates, can_be_packed, can_skip_unread, packed_hidden, padded_hidden
from rlhf_ppo.utils.transfer import upload


class Trunk:
    """Forward pass through the layers below the LM head.

    The model is an argument of each call, not an attribute: wrappers of a policy may replace its modules.

    Args:
        packing: Skip positions whose output is unused, where results are the same: pack rows of unequal length instead
            of padding them, and run the last layer only from a prompt's last token on.
    """

    def __init__(self, *, packing: bool) -> None:
        self.packs: bool | None = None if packing else False
        """Whether rows are packed; None: not tested yet."""
        self.skips_unread: bool | None = None if packing else False
        """Whether the last layer skips prompts; None: not tested yet."""
        self.work: Counter[str] = Counter()
        """Deterministic counters of tokens and rows, summed until the caller clears them."""

    def __call__(
        self, model: Any, inputs: TokenInputs
    ) -> tuple[Float[Tensor, "actions features"], Float[Tensor, "states hidden"]]:
        """The LM head's inputs at each action, and the value head's inputs for V(s_0) ... V(s_T)."""
        if model.config.is_encoder_decoder:
            return self._decoder_states(model, inputs)
        hidden = self._hidden(model.base_model, inputs)
        return _gather(hidden, inputs, extra=0), _gather(hidden, inputs, extra=1)

    def _decoder_states(
        self, model: Any, inputs: TokenInputs
    ) -> tuple[Float[Tensor, "actions features"], Float[Tensor, "states hidden"]]:
        """The same for an encoder-decoder, with logits in place of the LM head's inputs.

        The operations before the LM head (a scale, a bias) differ by architecture, so the model computes its logits.
        """
        prompts = list(inputs.prompts)
        starts = [prompt.new_full((1,), decoder_start_token(model)) for prompt in prompts]
        decoded = pad_rows([torch.cat(pair) for pair in zip(starts, inputs.responses, strict=True)])
        input_ids = pad_rows(prompts)
        self.work["trunk_tokens"] += input_ids.numel() + decoded.numel()
        self.work["real_tokens"] += int(inputs.costs().sum()) + len(starts)
        output = model(
            input_ids=input_ids, attention_mask=pad_rows([torch.ones_like(prompt) for prompt in prompts]),
            decoder_input_ids=decoded, use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        decoder_inputs = TokenInputs(prompts=starts, responses=inputs.responses)
        row_starts = [decoded.shape[1] * row for row in range(len(starts))]

        def flat(features: Tensor) -> HiddenStates:
            return HiddenStates(features.flatten(0, 1), row_starts, decoded.numel())

        states = flat(output.decoder_hidden_states[-1])
        logits = _gather(flat(output.logits), decoder_inputs, extra=0)
        return logits, _gather(states, decoder_inputs, extra=1)

    def _hidden(self, layers: Any, inputs: TokenInputs) -> HiddenStates:
        rows = [torch.cat(pair) for pair in zip(inputs.prompts, inputs.responses, strict=True)]
        ragged = len({len(row) for row in rows}) > 1
        if ragged and self.packs is None:
            self.packs = can_be_packed(layers, rows)
        if self.skips_unread is None:
            self.skips_unread = can_skip_unread(layers, rows)
        # A checkpointed layer is recomputed in the backward pass, with the model's own attention and last layer.
        recomputed = layers.training
        first_read = [len(prompt) - 1 for prompt in inputs.prompts] if self.skips_unread and not recomputed else None
        compute_hidden = packed_hidden if ragged and self.packs and not recomputed else padded_hidden
        hidden = compute_hidden(layers, rows, first_read=first_read)
        self.work["trunk_tokens"] += hidden.positions
        real = sum(len(row) for row in rows)
        self.work["real_tokens"] += real
        self.work["last_layer_tokens"] += hidden.positions if first_read is None else real - sum(first_read)
        return hidden


def decoder_start_token(model: Any) -> int:
    """The token id that an encoder-decoder's decoder starts with.

    Raises:
        ValueError: Neither its configuration nor its generation settings have one.
    """
    for settings in (model.config, model.generation_config):
        token: int | None = getattr(settings, "decoder_start_token_id", None)
        if token is not None:
            return token
    raise ValueError(
        f"{type(model).__name__} has no decoder_start_token_id: its decoder cannot start a response. "
        "Set `model.config.decoder_start_token_id`."
    )


def _gather(hidden: HiddenStates, inputs: TokenInputs, *, extra: int) -> Float[Tensor, "rows hidden"]:
    """Hidden states that predict the response tokens: positions P_i - 1 ... P_i + T_i - 2 (+ `extra`)."""
    spans = [
        torch.arange(start + len(prompt) - 1, start + len(prompt) + len(response) - 1 + extra)
        for start, prompt, response in zip(hidden.starts, inputs.prompts, inputs.responses, strict=True)
    ]
    return hidden.states.index_select(0, upload(torch.cat(spans), hidden.states.device))
