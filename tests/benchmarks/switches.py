"""Each fast path and how to switch it off by itself, so that its plain twin takes its place."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.workloads import SKEW, WORKLOADS, Workload

WORK: dict[str, tuple[Workload, dict[str, Any]]] = {
    name: (WORKLOADS[name], {}) for name in ("cpu-skew", "cpu-full", "cpu-vocab", "rm-pairs")
}
WORK["cpu-gpt2"] = (replace(SKEW, name="cpu-gpt2", model_type="gpt2"), {})
WORK["cpu-bf16"] = (replace(SKEW, name="cpu-bf16"), {"bf16": True})
WORK |= {f"{name}-whole": (WORKLOADS[name], {"ppo_epochs": 4}) for name in ("cpu-full", "cpu-vocab")}
"""What is measured, with the settings of our PPOConfig that are no default. `-whole`: all epochs of an update, in which
memory has more time to fall into pieces."""
USUAL = ("cpu-skew", "cpu-full", "cpu-vocab")
WHOLE = ("cpu-full-whole", "cpu-vocab-whole")


@dataclass(frozen=True)
class Switch:
    """One fast path, off."""

    module: str
    """Where it stands in `rlhf_ppo`."""
    twin: str
    """What is computed instead, in words."""
    patches: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """From the name of an attribute to what makes its plain twin."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of PPOConfig, in place of the default: for what cannot be switched within a process."""
    phases: tuple[str, ...] = ("step",)
    """What it touches: the other phase counts as with the fast path on."""
    workloads: tuple[str, ...] = USUAL
    paired: bool = True
    """Whether optimizer steps with and without it can take turns in one process."""
    equal: bool = True
    """Whether results must be equal; random draws are others."""
    kept_for: str = ""
    """Why it is kept where the figures of this machine do not say so."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context manager: while active, the plain twin is in its place."""
        before = []
        for name, twin in self.patches.items():
            where, _, attribute = name.rpartition(".")
            owner = resolve_name(f"rlhf_ppo.{where}")
            before.append((owner, attribute, vars(owner)[attribute]))
            setattr(owner, attribute, twin())
        try:
            yield
        finally:
            for owner, attribute, fast in before:
                setattr(owner, attribute, fast)


def _always(answer: Any) -> Callable[[], Any]:
    return lambda: lambda *_, **__: answer


def _apart(buffer: Any, chunks: list[slice], capacity: int = 0) -> None:
    """`LogitsBuffer.allocate` with a gradient beside the probabilities, both in pages of their own."""
    from rlhf_ppo.kernels import memory

    rows = max((rows.stop - rows.start for rows in chunks), default=0)
    buffer.memory = memory.empty((buffer.blocks * buffer.block * rows,), like=buffer.head, capacity=capacity)
    buffer.gradient = None
    if buffer.dtype is not None:
        like = buffer.head.detach().new_empty(0, dtype=buffer.dtype)
        buffer.gradient = memory.empty(buffer.head.shape, like=like).zero_()


def _scoring_by_rows() -> Callable[..., Any]:
    from rlhf_ppo.models.scoring import TokenPolicy

    fast = TokenPolicy._statistics

    def statistics(policy: Any, *arguments: Any) -> Any:
        policy.fused_scoring = False
        return fast(policy, *arguments)

    return statistics


def _new_memory(scratch: Any, shape: Any, dtype: torch.dtype) -> Tensor:
    result: Tensor = scratch.memory.new_empty(shape, dtype=dtype)
    return result


def _plain_forward(module: Any, x: Tensor) -> Any:
    from rlhf_ppo.kernels.fused_modules import plain_class

    return (plain_class(module) or type(module)).forward(module, x)


def _plain_gelu(module: Any, x: Tensor) -> Any:
    from transformers.activations import NewGELUActivation

    return NewGELUActivation.forward(module, x)


def _padded(layers: Any, rows: Any, *, first_read: Any = None) -> Any:
    from rlhf_ppo.kernels.packing import padded_hidden

    return padded_hidden(layers, rows, first_read=first_read)


def _all_read(arrange: str) -> Callable[[], Any]:
    def make() -> Any:
        from rlhf_ppo.kernels import packing

        return lambda layers, rows, first_read=None: getattr(packing, arrange)(layers, rows)

    return make


def _dynamic_cache(config: Any, _: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _by_multinomial(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.multinomial(torch.softmax(logits, dim=1), 1)
    return tokens.squeeze(1), torch.log_softmax(logits, dim=1).gather(1, tokens).squeeze(1)


BOTH, GENERATE = ("generate", "step"), ("generate",)
SWITCHES = {
    "fused_head": Switch(
        "kernels/fused_linear_logprobs", "the LM head by autograd, chunk by chunk",
        {"models.scoring.is_plain_head": _always(False)},
    ),
    "fused_scoring": Switch(
        "models/scoring", "log-probabilities without a gradient from whole rows of logits",
        {"models.scoring.TokenPolicy._statistics": _scoring_by_rows}, paired=False,
    ),
    "entropy_by_product": Switch(
        "kernels/linear_logprobs", "the entropy from each block's softmax",
        {"kernels.linear_logprobs.FusedLinearLogprobs._entropy_can_wait": _always(False)},
    ),
    "logits_buffer": Switch(
        "kernels/logits_buffer", "the head's gradient beside the probabilities",
        {
            "kernels.logits_buffer.LogitsBuffer.allocate": lambda: _apart,
            "kernels.logits_buffer.LogitsBuffer.shared_rows": lambda: property(lambda _: 0),
        },
        workloads=USUAL + WHOLE,
    ),
    "scratch_buffer": Switch(
        "kernels/scratch_buffer", "a new tensor for each block's results",
        {"kernels.scratch_buffer.ScratchBuffer.empty": lambda: _new_memory}, workloads=(*USUAL, *WHOLE, "cpu-bf16"),
    ),
    "memory": Switch(
        "kernels/memory", "large tensors on the heap", {"kernels.memory.MIN_BYTES": lambda: math.inf},
        workloads=(*USUAL, *WHOLE, "cpu-bf16"),
        kept_for="kept: 719 and 646 MiB to 580 and 584 at cpu-vocab on a Zen 4 (decision 0022)",
    ),
    "tied_embedding": Switch(
        "kernels/tied_embedding", "two gradients of [vocabulary, width], added by autograd",
        {"models.scoring.tied_embedding_gradient": lambda: lambda _: nullcontext()},
    ),
    "rms_norm": Switch(
        "kernels/fused_layers", "transformers' RMSNorm",
        {"kernels.fused_modules._FusedNorm.forward": lambda: _plain_forward}, phases=BOTH,
    ),
    "swiglu": Switch(
        "kernels/fused_layers", "transformers' gated MLP",
        {"kernels.fused_modules._FusedGatedMLP.forward": lambda: _plain_forward}, phases=BOTH,
    ),
    "rotary": Switch(
        "kernels/fused_rotary", "transformers' apply_rotary_pos_emb",
        {"kernels.fused_rotary.is_eager_float32_on_cpu": _always(False)}, phases=BOTH,
    ),
    "gelu": Switch(
        "kernels/linear_layers", "transformers' NewGELUActivation",
        {"kernels.linear_layers.FusedGELU.forward": lambda: _plain_gelu}, workloads=("cpu-gpt2",), phases=BOTH,
    ),
    "packing": Switch("kernels/packing", "padded rows", {"models.trunk.packed_hidden": lambda: _padded}),
    "last_layer": Switch(
        "kernels/last_layer", "the whole last layer",
        {f"models.trunk.{name}": _all_read(name) for name in ("packed_hidden", "padded_hidden")},
        kept_for="kept: 4 % of an update at cpu-skew on a Zen 5",
    ),
    "keep_freed_memory": Switch(
        "kernels/allocator", "glibc's defaults", settings={"keep_freed_memory": False}, phases=BOTH, paired=False,
        workloads=USUAL + WHOLE,
        kept_for="kept for earlier single runs: 5 % of the time at cpu-vocab; processor not recorded",
    ),
    "kernel_caches": Switch(
        "kernels/allocator", "1,024 compiled products", {"kernels.matmul.limit_kernel_caches": _always(None)},
        phases=BOTH, workloads=("cpu-bf16",), paired=False,
        kept_for="kept for earlier single runs: 1,006 to 648 MiB at cpu-skew; processor not recorded",
    ),
    "fused_adam": Switch(
        "learner/optimizer", "Adam over lists of tensors", settings={"fused_adam": False}, paired=False
    ),
    "kv_cache": Switch(
        "samplers/kv_cache", "transformers' DynamicCache", {"samplers.batch_decoder.new_cache": lambda: _dynamic_cache},
        phases=GENERATE, paired=False,
    ),
    "token_sampling": Switch(
        "samplers/token_sampling", "torch.multinomial",
        {"samplers.batch_decoder.sample_tokens": lambda: _by_multinomial},
        phases=GENERATE, paired=False, equal=False,
    ),
    "reuse_logprobs": Switch(
        "rollout/sampler_reuse", "a pass of the policy over its own rollout", settings={"reuse_logprobs": False},
        paired=False,
    ),
    "low_precision_linear": Switch(
        "kernels/low_precision_linear", "torch's autocast", workloads=("cpu-bf16",), paired=False,
        settings={"bf16": False, "accelerator_kwargs": {"mixed_precision": "bf16"}},
    ),
    "low_precision_copies": Switch(
        "kernels/linear_layers", "weights cast at every decode step",
        {"samplers.decode_loop.fast_layers": lambda: lambda _: nullcontext()},
        workloads=("cpu-bf16",), phases=GENERATE, paired=False,
    ),
    "bf16": Switch(
        "learner/prepare", "float32 products", settings={"bf16": False}, workloads=("cpu-bf16",), phases=BOTH,
        paired=False,
    ),
    "unpadded": Switch(
        "kernels/unpadded", "padded rows", {"kernels.packing.packing_matches": _always(False)}, workloads=("rm-pairs",),
        phases=("epoch",), paired=False,
    ),
}  # fmt: skip


def switches_on(workload: str) -> dict[str, Switch]:
    """The fast paths that are measured on a workload."""
    return {name: switch for name, switch in SWITCHES.items() if workload in switch.workloads}
