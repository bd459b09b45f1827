"""Choose a sampler by name."""

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available
from typing_extensions import assert_never

from rlhf_ppo.models.precision import accelerate_device
from rlhf_ppo.samplers.base import Sampler
from rlhf_ppo.samplers.continuous import ContinuousBatching
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.transformers_generate import TransformersGenerate
from rlhf_ppo.samplers.vllm import VLLMSampler

logger = logging.getLogger(__name__)

SamplerName: TypeAlias = Literal[
    "auto", "loop", "generate", "generate-static", "continuous", "vllm-server", "vllm-colocate"
]


def make_sampler(
    name: SamplerName,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    vllm_url: str = "http://localhost:8000",
    kv_budget_bytes: int | None = None,
    vllm: Mapping[str, Any] | None = None,
) -> Sampler:
    """Make the sampler called `name`, with its default settings.

    Args:
        name: "loop" is `DecodeLoop`; "generate", "generate-static" and "continuous" run in transformers; "vllm-server"
            and "vllm-colocate" run in vLLM; "auto" is `best_sampler()`.
        tokenizer: The policy's tokenizer; needed for stop strings and by vLLM.
        vllm_url: Address of the server, for "vllm-server".
        kv_budget_bytes: Largest KV cache, for "loop" and "continuous"; None: half of a GPU's free memory, else 4 GiB.
        vllm: Further fields of `VLLMSampler`.
    """
    settings = {"tokenizer": tokenizer, **(vllm or {})}
    match name:
        case "auto":
            best = best_sampler()
            settings = {"enable_sleep_mode": True, **settings}
            logger.warning("sampler: %s", "own loop" if best == "loop" else "vLLM in this process, asleep in updates")
            return make_sampler(best, tokenizer, kv_budget_bytes=kv_budget_bytes, vllm=settings)
        case "loop":
            return DecodeLoop(tokenizer, kv_budget_bytes=kv_budget_bytes)
        case "generate":
            return TransformersGenerate(tokenizer=tokenizer)
        case "generate-static":
            return TransformersGenerate(tokenizer=tokenizer, static_cache=True)
        case "continuous":
            return ContinuousBatching(kv_budget_bytes=kv_budget_bytes)
        case "vllm-server":
            return VLLMSampler(mode="server", base_url=vllm_url, **settings)
        case "vllm-colocate":
            return VLLMSampler(mode="colocate", **settings)
        case _:
            assert_never(name)


def best_sampler() -> Literal["loop", "vllm-colocate"]:
    """Name of the fastest sampler: vLLM where it is installed and there is a GPU, else the own loop."""
    on_gpu = accelerate_device(cpu=False).type == "cuda"
    return "vllm-colocate" if on_gpu and is_vllm_available() else "loop"


def default_importance_cap(name: SamplerName) -> float | None:
    """Default `PPOConfig.importance_sampling_cap`: 2 for samplers whose log-probabilities differ from the trainer's.

    None for "loop", which agrees with the trainer, and for `generate`, which returns no log-probabilities.
    """
    name = best_sampler() if name == "auto" else name
    return 2.0 if name in ("continuous", "vllm-server", "vllm-colocate") else None


def why_it_differs(sampler: object) -> str | None:
    """Why a sampler's distribution differs from the policy's though it has its weights; None: it is not known to."""
    match sampler:
        case VLLMSampler():
            return "vLLM computes with its own kernels and precision"
        case ContinuousBatching():
            return "continuous batching computes with a paged cache"
        case _:
            return None
