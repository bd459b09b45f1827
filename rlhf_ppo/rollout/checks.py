"""Check the inputs of `step()` and the results of samplers before any state changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.samplers.base import Samples


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Batch size, token ids and lengths that model and algorithm accept."""

    batch_size: int | None
    """Expected number of rows; None: any number."""
    vocab_size: int | None
    """Token ids must be below it; None: unknown."""
    max_positions: int | None
    """Maximum tokens of prompt plus response (of each, with an encoder-decoder); None: no limit."""
    needs_groups: bool = False
    """Whether the algorithm compares the responses to one prompt."""
    start_token_id: int | None = None
    """Token that `generate` puts before encoder-decoder responses; it is no action and is removed. None: no token."""


def check_step_inputs(
    queries: list[Tensor],
    responses: list[Tensor],
    scores: list[Tensor],
    masks: list[Tensor] | None,
    *,
    limits: ModelLimits,
    device: torch.device,
    truncated: Sequence[bool] | Tensor | None = None,
    group_size: int = 1,
) -> Responses:
    """Validate a batch and move it to the device.

    Args:
        queries: One Long [P_i] per sample.
        responses: One Long [T_i] per sample, without the prompt.
        scores: One number per sample (0-dim or [1], integers too), or one per response token [T_i].
        masks: One 0/1 [T_i] per sample: 0 marks tokens that the policy did not choose. None: all ones.
        truncated: One flag per sample: it was cut off and its future was not seen. None: every response ended.
        group_size: Number of adjacent responses to one prompt.

    Raises:
        ValueError: Names the first invalid sample, what was expected and what it got.
    """
    inputs_by_name: dict[str, Sequence[Tensor]] = {"queries": queries, "responses": responses, "scores": scores}
    if masks is not None:
        inputs_by_name["response_masks"] = masks
    for name, tensors in inputs_by_name.items():
        _check_list(name, tensors, limits.batch_size if limits.batch_size is not None else len(queries))
    for name in ("queries", "responses"):
        for index, tokens in enumerate(inputs_by_name[name]):
            _check_tokens(name, index, tokens, limits.vocab_size)
    for index, (query, response) in enumerate(zip(queries, responses, strict=True)):
        lengths = len(query), len(response)
        _check_length(index, sum(lengths) if limits.start_token_id is None else max(lengths), limits.max_positions)
    if limits.start_token_id is not None:
        responses, scores, masks = _strip_start_token(limits.start_token_id, responses, scores, masks)
        for index, tokens in enumerate(responses):
            _check_tokens("responses", index, tokens, limits.vocab_size)
    _check_groups(queries, group_size, needs_groups=limits.needs_groups)
    mask_rows = [_check_mask(i, masks[i] if masks else None, response) for i, response in enumerate(responses)]
    checked_scores = [_check_score(i, score, responses[i]) for i, score in enumerate(scores)]
    return Responses(
        inputs=TokenInputs(
            prompts=[query.long().to(device) for query in queries],
            responses=[response.long().to(device) for response in responses],
        ),
        mask=pad_rows([row.float() for row in mask_rows]).bool().to(device),
        scores=_stack_scores(checked_scores, mask_rows).to(device),
        truncated=None if truncated is None else _check_truncated(truncated, len(queries)).to(device),
        group_size=group_size,
    )


def check_count(samples: Samples, expected: int) -> None:
    """Raise ValueError unless every list of `samples` has `expected` entries."""
    counts = {name: len(getattr(samples, name)) for name in ("prompts", "responses", "finished")}
    if samples.logprobs is not None:
        counts["logprobs"] = len(samples.logprobs)
    for name, count in counts.items():
        if count != expected:
            raise ValueError(
                f"expected {expected} {name} from the sampler, got {count}: responses would be scored with the "
                "wrong prompts. A sampler returns `num_return_sequences` adjacent responses to each prompt."
            )


def check_samples(samples: Samples, limits: ModelLimits, *, device: torch.device) -> None:
    """Check sampled responses as `step()` checks its inputs, and their log-probabilities.

    Raises:
        ValueError: A token outside the vocabulary, an empty response, too many tokens, an invalid log-probability.
    """
    zeros = [torch.tensor(0.0)] * len(samples.responses)
    any_batch_size = replace(limits, batch_size=None, needs_groups=False)
    check_step_inputs(samples.prompts, samples.responses, zeros, None, limits=any_batch_size, device=device)
    for index, (row, response) in enumerate(zip(samples.logprobs or (), samples.responses, strict=False)):
        if row.shape != response.shape or not bool((row.isfinite() & (row <= 1e-3)).all()):
            raise ValueError(
                f"expected a log-probability <= 0 for each of the {len(response)} tokens of response {index} from the "
                f"sampler, got {_abbreviate(row)}: probability ratios would be nan or wrong. Return log-probabilities "
                "in nats of the sampled tokens, or logprobs=None."
            )


def _strip_start_token(
    token: int, responses: list[Tensor], scores: list[Tensor], masks: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Remove the decoder's start token from responses, and its entries from masks and token scores."""
    offsets = [int(bool(response[0] == token)) for response in responses]
    stripped_scores = [
        score[offset:] if score.shape == response.shape and score.numel() > 1 else score
        for offset, score, response in zip(offsets, scores, responses, strict=True)
    ]
    if masks is not None:
        masks = [
            mask[offset:] if mask.shape == response.shape else mask
            for offset, mask, response in zip(offsets, masks, responses, strict=True)
        ]
    return [response[offset:] for offset, response in zip(offsets, responses, strict=True)], stripped_scores, masks


def _check_list(name: str, tensors: object, expected: int) -> None:
    if not isinstance(tensors, list):
        raise ValueError(
            f"{name} must be a list of tensors - got {type(tensors)}: samples differ in length, so one tensor cannot "
            "hold them. Pass one tensor per sample, e.g. `list(tensor)`."
        )
    if len(tensors) != expected:
        raise ValueError(
            f"Batch size ({expected}) does not match number of examples - but got {len(tensors)} for: {name}. "
            "Pass as many as `config.batch_size`, or set that to your number."
        )
    if not tensors:
        raise ValueError(f"{name} must hold at least one sample, got an empty list: there is nothing to learn from")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"Elements in {name} must be tensors - got {type(tensor)} (sample {index}): nothing could be computed "
                "with it. Wrap it: `torch.tensor(...)`."
            )
        if tensor.dtype in _UNSUPPORTED_DTYPES:
            raise ValueError(
                f"{name}[{index}] must hold plain numbers, got {tensor.dtype}: such numbers cannot be compared or used "
                "as indices. Convert the tensor to whole numbers or floats."
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            raise ValueError(
                f"{name}[{index}] must be a dense tensor with values, got layout {tensor.layout} of {tensor.dtype} on "
                f"{tensor.device}: its numbers cannot be read. Use `.to_dense()`, or a tensor that is not on 'meta'."
            )


_UNSUPPORTED_DTYPES = frozenset(
    {torch.complex32, torch.complex64, torch.complex128, torch.quint8, torch.qint8, torch.qint32}
)


def _check_tokens(name: str, index: int, tokens: Tensor, vocab_size: int | None) -> None:
    if tokens.dim() != 1 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError(
            f"{name}[{index}] must be a 1-D tensor of token ids, got shape {tuple(tokens.shape)} of {tokens.dtype}: "
            "the model could not look them up. Pass one integer tensor per sample, without batch dimension."
        )
    if len(tokens) == 0:
        raise ValueError(
            f"{name}[{index}] is empty: a sample needs at least one prompt token (give it the BOS token) and one "
            "response token. Drop the sample or raise min_new_tokens."
        )
    tokens = tokens.long()  # few operations support unsigned tensors
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(
            f"{name}[{index}] holds token ids from {low} to {high}, but the model knows 0 to "
            f"{'its vocabulary' if vocab_size is None else vocab_size - 1}: it would look up rows that do not exist. "
            "Was it made by another tokenizer, or padded with -100? Encode it with the model's own, without padding."
        )


def _check_length(index: int, length: int, max_positions: int | None) -> None:
    if max_positions is not None and length > max_positions:
        raise ValueError(
            f"sample {index} has {length} tokens of prompt and response, but the model has {max_positions} positions: "
            "it has no embeddings for the positions beyond. Shorten the prompt or max_new_tokens."
        )


def _check_mask(index: int, mask: Tensor | None, response: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(len(response), dtype=torch.bool)
    if mask.shape != response.shape:
        raise ValueError(
            f"response_masks[{index}] must have one entry for each of the {len(response)} response tokens, "
            f"got shape {tuple(mask.shape)}: it is unknown which tokens the policy chose. Omit the prompt's entries."
        )
    values = mask.detach().cpu().double()
    if not torch.isin(values, torch.tensor([0.0, 1.0], dtype=torch.double)).all():
        raise ValueError(
            f"response_masks[{index}] must hold zeros and ones, got {_abbreviate(mask)}: it selects tokens and does "
            "not weight them. Use 1 where the policy chose the token, else 0."
        )
    if not values.any():
        raise ValueError(
            f"response_masks[{index}] masks every token: there is no action to learn from. Drop the sample."
        )
    return values.bool()


def _check_groups(queries: list[Tensor], group_size: object, *, needs_groups: bool) -> None:
    if not isinstance(group_size, int) or group_size < 1 or (needs_groups and group_size < 2):
        remedy = "Pass group_size=n with the n responses to each prompt side by side"
        remedy += ", or learn with PPOClip, PPOPenalty, TRPO or Reinforce." if needs_groups else "; 1: no groups."
        raise ValueError(
            f"group_size must be a whole number of at least {2 if needs_groups else 1}, got {group_size!r}: it is "
            f"unknown which responses share a prompt and are compared. {remedy}"
        )
    if len(queries) % group_size:
        raise ValueError(
            f"expected whole groups of {group_size} responses, got {len(queries)} samples: responses to different "
            "prompts would be compared. Drop incomplete groups."
        )
    for index, query in enumerate(queries):
        first = index - index % group_size
        if not torch.equal(query.long(), queries[first].long()):
            raise ValueError(
                f"queries[{index}] must be the prompt of its group, queries[{first}] (group_size={group_size}), got "
                "other tokens: responses to different prompts would be compared. Put the responses to a prompt side "
                "by side."
            )


def _check_truncated(truncated: Sequence[bool] | Tensor, rows: int) -> Tensor:
    try:
        flags = truncated.double().cpu() if isinstance(truncated, Tensor) else torch.tensor(list(truncated)).double()
    except (TypeError, ValueError, RuntimeError):
        flags = torch.tensor(float("nan"))
    if flags.shape != (rows,) or not torch.isin(flags, torch.tensor([0.0, 1.0], dtype=torch.double)).all():
        raise ValueError(
            f"truncated must hold True or False for each of the {rows} samples, got {truncated!r:.80}: it is unknown "
            f"whose future was cut off. Pass e.g. [False] * {rows}."
        )
    return flags.bool()


def _check_score(index: int, score: Tensor, response: Tensor) -> Tensor:
    if score.dim() > 1:
        raise ValueError(
            f"Scores must be 1-dimensional - got {score.dim()} for {_abbreviate(score)} (sample {index}): expected one "
            "number, or one for each response token. Use `score.squeeze()`."
        )
    if score.numel() != 1 and score.shape != response.shape:
        raise ValueError(
            f"scores[{index}] must be one number, or one for each of the {len(response)} response tokens, "
            f"got {score.numel()} numbers: it is unknown which token earns what. Sum them, or score each token."
        )
    if not torch.isfinite(score.detach().float()).all():
        raise ValueError(
            f"scores[{index}] must be finite in float32 (up to 3.4e38), got {_abbreviate(score)}: one such score would "
            "turn every weight into nan. Fix the reward source or drop the sample."
        )
    return score.detach().cpu().float()


def _abbreviate(tensor: Tensor) -> str:
    text = str(tensor.tolist())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _stack_scores(scores: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Stack scores to [B] if each is one number, else pad them to [B, T], single numbers at the last action."""
    if all(score.dim() == 0 or score.numel() == 1 for score in scores):
        return torch.stack([score.reshape(()) for score in scores])
    rows = []
    for score, mask in zip(scores, masks, strict=True):
        row = score
        if score.numel() == 1:
            row = torch.zeros(len(mask))
            row[mask.nonzero()[-1]] = score
        rows.append(row)
    return pad_rows(rows)
