"""Checks of the settings of `PPOConfig`, one by one; what they are together is checked where they are read."""

import json
import math
from typing import Any

from rlhf_ppo.learner.importance_correction import resolve_correction
from rlhf_ppo.rollout.kl_placement import check_kl_placement
from rlhf_ppo.utils.field_types import check_fields


def check_settings(config: Any) -> None:
    """Check the type (TypeError) and the range (ValueError) of every field of a `PPOConfig`."""
    check_fields(config)
    if not 0 <= config.seed < 2**32:
        raise ValueError(
            f"seed must be in [0, 2^32), got {config.seed}: NumPy's generator takes no other. Use e.g. seed=0."
        )
    counts = ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "logits_chunk_size")
    for name in (*counts, "most_skips_in_a_row"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}: nothing would be done. Use 1.")
    for name in ("temperature", "cliprange", "horizon", "ratio_threshold", "adam_eps", "kv_budget_gib"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ValueError(
                f"{name} must be positive, got {getattr(config, name)}: it is a divisor or a bound. Use 1.0."
            )
    resolve_correction(
        config.importance_sampling, config.importance_sampling_level, config.importance_sampling_floor,
        config.importance_sampling_cap,
    )  # fmt: skip
    _check_norm_and_kl(config)
    check_kl_placement(config.kl_penalty, config.kl_placement, config.init_kl_coef)
    is_read_in_update = config.kl_penalty == "full" and config.kl_placement != "reward"
    if config.reference_placement == "offloaded" and is_read_in_update:
        raise ValueError(
            "reference_placement='offloaded' keeps the reference off the device during the update, where "
            f"kl_penalty='full' with kl_placement={config.kl_placement!r} reads it in every pass. Use "
            "reference_placement='whole', or kl_penalty='mse' with kl_placement='loss'."
        )
    if config.learning_rate < 0 or not math.isfinite(config.learning_rate):
        raise ValueError(
            f"learning_rate must be finite and not negative, got {config.learning_rate}: steps would go "
            "uphill. Use 1e-5."
        )


def check_sizes(config: Any) -> None:
    """Check that `batch_size` is a multiple of the responses of an optimizer step."""
    size = config.mini_batch_size * config.gradient_accumulation_steps
    if config.batch_size % size:
        raise ValueError(
            "`batch_size` must be a multiple of `mini_batch_size * gradient_accumulation_steps`, inexact division: "
            f"{config.batch_size} / {size} = {config.batch_size / size}. "
            "A remainder would be dropped or weigh more than the others; choose sizes that divide."
        )


def _check_norm_and_kl(config: Any) -> None:
    if config.max_grad_norm is not None and not config.max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm must be positive or None, got {config.max_grad_norm}: every gradient would be clipped to "
            "0 and nothing would move. Use None for no clipping."
        )
    if not config.init_kl_coef >= 0:
        raise ValueError(
            f"init_kl_coef must not be negative, got {config.init_kl_coef}: it would reward distance from the "
            "reference. Use 0 for no penalty."
        )


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """Parse a JSON object given on the command line."""
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"PPOConfig.{name} must be a dict or its JSON, got {text!r:.80} ({error}): nothing could be passed on. "
            'Write e.g. {"key": "value"}.'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"PPOConfig.{name} must be a dict or its JSON, got JSON of a {type(content).__name__}: it names no "
            'settings. Write e.g. {"key": "value"}.'
        )
    return content
