"""Settings of a run that its memory and time depend on."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rlhf_ppo.utils.field_types import check_fields
from rlhf_ppo.utils.flags import read_settings


class PlanError(ValueError):
    """Settings that cannot be planned."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Settings of the planned run. Sizes are per process, with one process per device."""

    model: str = "gpt2"
    """gpt2, 1b, 7b, 70b, or a folder or file with a config.json."""
    reward_model: str | None = None
    """The same for a reward model beside the policy; None: rewards come from a function or a server."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = "ddp"
    """How processes shard; ddp: not at all."""
    precision: Literal["auto", "float32", "bf16-mixed", "bfloat16", "nf4"] = "auto"
    """Arithmetic; nf4 is QLoRA. auto is bf16-mixed on cuda, float32 on a CPU; bf16-mixed is
    autocast, under DeepSpeed bf16 weights with float32 masters; nf4 is the frozen base's linear layers in 4 bits, the
    rest in bfloat16."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Of the run; on a CPU, chunks of logits are smaller and some layers use other kernels."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers, 0 for none."""
    batch_size: int = 128
    """Responses per iteration, on each process."""
    mini_batch_size: int = 128
    """Maximum responses per forward and backward pass; on a GPU no more tokens than `token_budget`."""
    token_budget: int | None = None
    """Tokens per forward and backward pass; None: on cuda what fits into `memory_gib`, on a CPU no limit."""
    gradient_accumulation_steps: int = 1
    """Passes per optimizer step."""
    ppo_epochs: int = 4
    """Passes over the responses of an iteration."""
    prompt_tokens: int = 64
    """Tokens of the longest prompt."""
    new_tokens: int = 64
    """Tokens of the longest response."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; on cuda also where a row does not fit otherwise."""
    logits_chunk_size: int = 1024
    """Response tokens whose logits are computed at once."""
    decode_rows: int = 512
    """Maximum rows decoded at once (`DecodeLoop.max_rows`)."""
    kv_budget_gib: float | None = None
    """Maximum size of the KV cache; None: on cuda half of what is free, else 4 GiB (`DecodeLoop.kv_budget_bytes`)."""
    memory_gib: float = 80.0
    """Memory of one device, GiB, to check what fits."""

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except (TypeError, ValueError) as error:
            raise PlanError(str(error)) from error
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16-mixed" if self.device == "cuda" else "float32")
        for item in fields(self):
            value, minimum = getattr(self, item.name), 0 if item.name == "lora_rank" else 1
            if isinstance(value, float) and not value > 0:
                raise PlanError(f"{item.name} must be a positive number, got {value!r}")
            if isinstance(value, int) and not isinstance(value, bool) and value < minimum:
                raise PlanError(f"{item.name} must be a whole number of at least {minimum}, got {value!r}")
        if self.precision == "nf4" and not (self.lora_rank and self.strategy in ("ddp", "zero1", "zero2")):
            raise PlanError(
                "precision nf4 is a frozen base under adapters, not sharded: set lora_rank, and strategy "
                f"ddp, zero1 or zero2; got lora_rank {self.lora_rank} and {self.strategy}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response together."""
        return self.prompt_tokens + self.new_tokens


def read_config(path: str | Path, **overrides: Any) -> PlanConfig:
    """Read settings from a YAML or JSON file; those of `overrides` that are not None win.

    Raises:
        PlanError: The file cannot be read, or names a setting that does not exist.
    """
    try:
        content = read_settings(path)
    except ValueError as error:
        raise PlanError(str(error)) from error
    known = {item.name for item in fields(PlanConfig)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise PlanError(f"{path} has {', '.join(unknown)}; the settings of a plan are {', '.join(sorted(known))}")
    return PlanConfig(**content | {name: value for name, value in overrides.items() if value is not None})
