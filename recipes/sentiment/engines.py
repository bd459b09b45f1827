"""Settings of the recipe's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available

from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Sampler
from rlhf_ppo.samplers.make_sampler import SamplerName, default_importance_cap, make_sampler


@dataclass(frozen=True, kw_only=True)
class VLLMSettings:
    """Settings of vLLM (docs/engines.md)."""

    gpu_memory_utilization: float = 0.3
    """Colocated: fraction of each GPU's memory that the engine reserves."""
    enable_sleep_mode: bool = False
    """Colocated: free the engine's memory during updates; --sampler auto does."""
    max_model_length: int | None = None
    """Colocated: largest number of tokens of prompt and response; default: that of this run's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Colocated: dtype that the engine computes in; auto: the trainer's."""
    weight_transfer: Literal["auto", "nccl", "disk"] = "auto"
    """Server: how weights get there; auto: over NCCL from a GPU with vLLM, else by files."""
    transfer_dir: str | None = None
    """Server: folder for these files that trainer and server both see; default: a temporary one."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Who draws."""

    sampler: SamplerName = "loop"
    """Who draws: the own loop, generate or continuous batching of transformers, vLLM (docs/engines.md)."""
    vllm_url: str = "http://localhost:8000"
    """Of the server of --sampler vllm-server."""
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    """Of --sampler vllm-server, vllm-colocate and auto."""
    kv_budget_gib: float | None = None
    """Largest KV cache of the own loop and continuous batching, GiB; default: half of a GPU's free memory, else 4."""

    def __post_init__(self) -> None:
        if self.sampler == "vllm-colocate" and not is_vllm_available():
            raise ValueError(
                "--sampler vllm-colocate needs vLLM, which is not installed here: `pip install 'rlhf_ppo[vllm]'`, "
                "serve the model elsewhere (--sampler vllm-server), or leave --sampler at loop"
            )

    def make_sampler(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[PromptDataset], new_tokens: int
    ) -> Sampler:
        """The chosen sampler, for responses of up to `new_tokens` to these prompts."""
        longest = max(length for dataset in prompts for length in dataset.lengths) + new_tokens
        budget = None if self.kv_budget_gib is None else int(self.kv_budget_gib * 2**30)
        given = {name: value for name, value in asdict(self.vllm).items() if value != getattr(VLLMSettings(), name)}
        vllm = {"max_model_length": longest, **given}
        return make_sampler(self.sampler, tokenizer, vllm_url=self.vllm_url, kv_budget_bytes=budget, vllm=vllm)

    @property
    def importance_sampling_cap(self) -> float | None:
        """The cap that suits it."""
        return default_importance_cap(self.sampler)
