"""Each fast path and how to switch it off by itself: its plain twin takes its place before the model is built."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
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
"""What is measured, with the settings of our PPOConfig that are no default."""
USUAL = ("cpu-skew", "cpu-full", "cpu-vocab")


@dataclass(frozen=True)
class Switch:
    """One fast path, off."""

    module: str
    """Where it stands in `rlhf_ppo`."""
    twin: str
    """What is computed instead, in words."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of PPOConfig, in place of the default."""
    patches: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """From the name of an attribute to what makes its plain twin."""
    phases: tuple[str, ...] = ("generate", "step")
    """What it touches: the other phase counts as with the fast path on."""
    workloads: tuple[str, ...] = USUAL
    equal: bool = True
    """Whether results must be equal; random draws are others."""

    def switch_off(self, put: Callable[[Any, str, Any], None] = setattr) -> None:
        """For the whole process, or as `put` does it."""
        for name, twin in self.patches.items():
            where, _, attribute = name.rpartition(".")
            put(resolve_name(f"rlhf_ppo.{where}"), attribute, twin())


def _always(answer: Any) -> Callable[[], Any]:
    return lambda: lambda *_, **__: answer


def _apart(room: Any, chunks: list[slice], room_for: int = 0) -> None:
    """`Room.make` with a gradient beside the probabilities, both in pages of their own."""
    from rlhf_ppo.kernels import memory

    rows = max((rows.stop - rows.start for rows in chunks), default=0)
    room.memory = memory.empty((room.blocks * room.block * rows,), like=room.head, room_for=room_for)
    room.gradient = None
    if room.dtype is not None:
        room.gradient = memory.empty(room.head.shape, like=room.head.detach().new_empty(0, dtype=room.dtype)).zero_()


def _scoring_by_rows() -> Callable[..., Any]:
    from rlhf_ppo.models.scoring import TokenPolicy

    plain = TokenPolicy._statistics

    def statistics(policy: Any, *arguments: Any) -> Any:
        policy.fused_scoring = False
        return plain(policy, *arguments)

    return statistics


def _new_memory(scratch: Any, shape: Any, dtype: torch.dtype) -> Tensor:
    result: Tensor = scratch.memory.new_empty(shape, dtype=dtype)
    return result


def _dynamic_cache(config: Any, _: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _by_multinomial(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.multinomial(torch.softmax(logits, dim=1), 1)
    return tokens.squeeze(1), torch.log_softmax(logits, dim=1).gather(1, tokens).squeeze(1)


def _candidate_without(left_out: str) -> Callable[[], Any]:
    def make() -> Any:
        from rlhf_ppo.kernels import fused_modules

        plain, unwanted = fused_modules._candidate, getattr(fused_modules, left_out)

        def candidate(module: Any) -> Any:
            found = plain(module)
            return None if found is unwanted else found

        return candidate

    return make


def _without_gelu() -> dict[Any, Any]:
    from rlhf_ppo.kernels import linear_layers

    return dict(linear_layers.PRODUCTS)


_ANEW: dict[str, Callable[[], Any]] = {"kernels.fused_modules._FUSED": dict}
"""Without what was found out about classes of modules before."""
STEP, GENERATE = ("step",), ("generate",)
SWITCHES = {
    "fused_head": Switch(
        "kernels/fused_linear_logprobs", "the LM head by autograd, chunk by chunk", settings={"fused_head": False},
        phases=STEP,
    ),
    "fused_scoring": Switch(
        "models/scoring", "log-probabilities without a gradient from whole rows of logits", phases=STEP,
        patches={"models.scoring.TokenPolicy._statistics": lambda: _scoring_by_rows()},
    ),
    "entropy_by_product": Switch(
        "kernels/head_walk", "the entropy from each block's softmax", phases=STEP,
        patches={"kernels.head_walk.HeadWalk._entropy_can_wait": _always(False)},
    ),
    "logits_buffer": Switch(
        "kernels/logits_buffer", "the head's gradient beside the probabilities", phases=STEP,
        patches={
            "kernels.logits_buffer.Room.make": lambda: _apart,
            "kernels.logits_buffer.Room.rows": lambda: property(lambda _: 0),
        },
    ),
    "scratch_buffer": Switch(
        "kernels/scratch_buffer", "a new tensor for each block's results", phases=STEP,
        patches={"kernels.scratch_buffer.Scratch.empty": lambda: _new_memory},
    ),
    "memory": Switch(
        "kernels/memory", "large tensors on the heap", phases=STEP,
        patches={"kernels.memory.LEAST": lambda: math.inf},
    ),
    "write_in_place": Switch(
        "kernels/matmul", "products into a tensor of their own, then added or copied", phases=STEP,
        patches={
            "kernels.matmul.writes_in_place": _always(False), "kernels.head_walk.writes_in_place": _always(False),
        },
    ),
    "tiles": Switch(
        "kernels/matmul", "a block's product in one piece", phases=STEP,
        patches={"kernels.matmul._tiles": lambda: lambda _: [(slice(None), slice(None))]},
    ),
    "tied_embedding": Switch(
        "kernels/tied_embedding", "two gradients of [vocabulary, width], added by autograd", phases=STEP,
        patches={"models.scoring.shared_with_head": lambda: lambda _: nullcontext()},
    ),
    "rms_norm": Switch(
        "kernels/fused_layers", "transformers' RMSNorm",
        patches={"kernels.fused_modules._candidate": _candidate_without("_FusedNorm"), **_ANEW},
    ),
    "swiglu": Switch(
        "kernels/fused_layers", "transformers' gated MLP",
        patches={"kernels.fused_modules._candidate": _candidate_without("_FusedGatedMLP"), **_ANEW},
    ),
    "through_swiglu": Switch(
        "kernels/fused_layers", "the last product's input kept", phases=STEP,
        patches={"kernels.fused_modules.through_swiglu": lambda: _plainly_through},
    ),
    "rotary": Switch(
        "kernels/fused_rotary", "transformers' apply_rotary_pos_emb",
        patches={"kernels.fused_modules.rotating_forward": _always(None), **_ANEW},
    ),
    "gelu": Switch(
        "kernels/linear_layers", "transformers' NewGELUActivation", workloads=("cpu-gpt2",),
        patches={"kernels.linear_layers.FASTER": _without_gelu},
    ),
    "packing": Switch("kernels/packing", "padded rows", settings={"packing": False}, phases=STEP),
    "packed_attention": Switch(
        "kernels/packed_attention", "scaled_dot_product_attention once a length, with autograd", phases=STEP,
        patches={"kernels.packing.fits_kernel": _always(False)},
    ),
    "last_layer": Switch(
        "kernels/last_layer", "the whole last layer", phases=STEP,
        patches={"models.trunk.can_skip_unread": _always(False)},
    ),
    "keep_freed_memory": Switch(
        "kernels/allocator", "glibc's defaults", settings={"keep_freed_memory": False}
    ),
    "bound_kernel_caches": Switch(
        "kernels/allocator", "1,024 compiled products", workloads=("cpu-skew", "cpu-full", "cpu-bf16"),
        patches={"kernels.matmul.bound_kernel_caches": _always(None)},
    ),
    "fused_adam": Switch(
        "learner/arguments", "Adam over lists of tensors", settings={"fused_adam": False}, phases=STEP
    ),
    "create_moments": Switch(
        "updates/optimizers", "moments at the first step", phases=STEP,
        patches={"updates.steps.create_moments": _always(None)},
    ),
    "kv_cache": Switch(
        "samplers/kv_cache", "transformers' DynamicCache", phases=GENERATE,
        patches={"samplers.decode_loop.new_cache": lambda: _dynamic_cache},
    ),
    "token_sampling": Switch(
        "samplers/token_sampling", "torch.multinomial", phases=GENERATE, equal=False,
        patches={"samplers.decode_loop.draw_tokens": lambda: _by_multinomial},
    ),
    "reuse_logprobs": Switch(
        "rollout/sampler_reuse", "a pass of the policy over its own rollout", settings={"reuse_logprobs": False},
        phases=STEP,
    ),
    "low_precision_linear": Switch(
        "kernels/low_precision_linear", "torch's autocast", workloads=("cpu-bf16",), phases=STEP,
        settings={"bf16": False, "accelerator_kwargs": {"mixed_precision": "bf16"}},
    ),
    "low_precision_copies": Switch(
        "kernels/linear_layers", "weights cast at every decode step", workloads=("cpu-bf16",), phases=GENERATE,
        patches={"samplers.decode_loop.fast_layers": lambda: lambda _: nullcontext()},
    ),
    "bf16": Switch("learner/prepare", "float32 products", workloads=("cpu-bf16",), settings={"bf16": False}),
    "unpadded": Switch(
        "kernels/unpadded", "padded rows", workloads=("rm-pairs",), phases=("epoch",),
        patches={"kernels.packing.can_be_packed": _always(False)},
    ),
}  # fmt: skip


def _plainly_through(layer: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    from rlhf_ppo.kernels.fused_layers import swiglu

    return layer(swiglu(gate, up))


def on(workload: str) -> dict[str, Switch]:
    """The fast paths that are measured on a workload."""
    return {name: switch for name, switch in SWITCHES.items() if workload in switch.workloads}


def answer(connection: Any, folder: str, workload: str, name: str | None) -> None:
    """Run commands of `connection` on our side of `workload` in this process, with one fast path off."""
    from pathlib import Path

    from tests.benchmarks import pair_sides
    from tests.benchmarks.sides import Ours, cost, count_cpu_seconds, memory
    from tests.benchmarks.workloads import Task

    torch.set_num_threads(1)
    count_cpu_seconds("ours")
    options = WORK[workload][1] | {"ppo_epochs": 1}
    if name is not None:
        SWITCHES[name].switch_off()
        options |= SWITCHES[name].settings
    start = partial(pair_sides.Ours, Path(folder)) if workload == "rm-pairs" else partial(Ours, Task.read(Path(folder)))
    side: Any = start(options)
    connection.send({"resident_mib": memory("VmRSS")})
    for command, *arguments in iter(connection.recv, None):
        connection.send(cost(getattr(side, command), *arguments))
