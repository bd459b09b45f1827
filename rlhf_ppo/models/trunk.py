"""Prompts and responses through a language model's layers, up to its head: side by side, padded, or encoded."""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.kernels.packing import Hidden, can_be_packed, can_skip_unread, packed_hidden, padded_hidden


class Trunk:
    """One pass through the layers below the LM head.

    The model is passed each time, never kept: whoever wraps a policy may exchange its modules.

    Args:
        packing: Compute nothing for positions that nobody reads, where the model computes the same: run rows of
            unequal length side by side instead of padded, and the last layer from a prompt's last token on.
    """

    def __init__(self, *, packing: bool) -> None:
        self.packs: bool | None = None if packing else False
        """Whether rows go side by side; None: not tried yet."""
        self.skips_unread: bool | None = None if packing else False
        """Whether the last layer leaves prompts out; None: not tried yet."""
        self.work: Counter[str] = Counter()
        """Deterministic work counters, summed until the owner clears them."""

    def __call__(
        self, model: Any, inputs: TokenInputs
    ) -> tuple[Float[Tensor, "actions features"], Float[Tensor, "states hidden"]]:
        """What the head of `model` turns into logits at each action, and the states behind V(s_0) ... V(s_T)."""
        if model.config.is_encoder_decoder:
            return self._decoder_rows(model, inputs)
        hidden = self._hidden(model.base_model, inputs)
        return _gather(hidden, inputs, extra=0), _gather(hidden, inputs, extra=1)

    def _decoder_rows(
        self, model: Any, inputs: TokenInputs
    ) -> tuple[Float[Tensor, "actions features"], Float[Tensor, "states hidden"]]:
        """The same of an encoder-decoder, whose features are logits already.

        What stands before the LM head (a scale, a bias) differs by architecture, so the model makes its logits itself.
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
        shown = TokenInputs(prompts=starts, responses=inputs.responses)
        first = [decoded.shape[1] * row for row in range(len(starts))]

        def flat(features: Tensor) -> Hidden:
            return Hidden(features.flatten(0, 1), first, decoded.numel())

        states = flat(output.decoder_hidden_states[-1])
        return _gather(flat(output.logits), shown, extra=0), _gather(states, shown, extra=1)

    def _hidden(self, layers: Any, inputs: TokenInputs) -> Hidden:
        rows = [torch.cat(pair) for pair in zip(inputs.prompts, inputs.responses, strict=True)]
        ragged = len({len(row) for row in rows}) > 1
        if ragged and self.packs is None:
            self.packs = can_be_packed(layers, rows)
        if self.skips_unread is None:
            self.skips_unread = can_skip_unread(layers, rows)
        # A checkpointed layer runs again in the backward pass, where attention and last layer are the model's own.
        again = layers.training
        first_read = [len(prompt) - 1 for prompt in inputs.prompts] if self.skips_unread and not again else None
        arrange = packed_hidden if ragged and self.packs and not again else padded_hidden
        hidden = arrange(layers, rows, first_read=first_read)
        self.work["trunk_tokens"] += hidden.positions
        real = sum(len(row) for row in rows)
        self.work["real_tokens"] += real
        self.work["last_layer_tokens"] += hidden.positions if first_read is None else real - sum(first_read)
        return hidden


def decoder_start_token(model: Any) -> int:
    """What an encoder-decoder's decoder reads before a response.

    Raises:
        ValueError: If neither its configuration nor its generation settings name one.
    """
    for settings in (model.config, model.generation_config):
        token: int | None = getattr(settings, "decoder_start_token_id", None)
        if token is not None:
            return token
    raise ValueError(
        f"{type(model).__name__} names no decoder_start_token_id: its decoder has nothing to begin a response with. "
        "Set `model.config.decoder_start_token_id`."
    )


def _gather(hidden: Hidden, inputs: TokenInputs, *, extra: int) -> Float[Tensor, "rows hidden"]:
    """Hidden states at which the response tokens were drawn: positions P_i - 1 ... P_i + T_i - 2 (+ `extra`)."""
    spans = [
        torch.arange(start + len(prompt) - 1, start + len(prompt) + len(response) - 1 + extra)
        for start, prompt, response in zip(hidden.starts, inputs.prompts, inputs.responses, strict=True)
    ]
    return hidden.states.index_select(0, torch.cat(spans).to(hidden.states.device))
