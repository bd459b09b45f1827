"""Settings of the sampler that a recipe generates with."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available

from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Sampler
from rlhf_ppo.samplers.make_sampler import SamplerName, default_importance_cap, make_sampler
from rlhf_ppo.samplers.vllm import ONE_MODE


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
    """Settings of the sampler, which generates responses."""

    sampler: SamplerName = "loop"
    """Own loop, generate or continuous batching of transformers, or vLLM (docs/engines.md)."""
    vllm_url: str = "http://localhost:8000"
    """Address of the server for --sampler vllm-server."""
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    """Settings of --sampler vllm-server, vllm-colocate and auto."""
    kv_budget_gib: float | None = None
    """Largest KV cache of the own loop and continuous batching, GiB; default: half of a GPU's free memory, else 4."""

    def __post_init__(self) -> None:
        if unread := [name for name, readers in self._given().items() if self.sampler not in readers]:
            raise ValueError(
                f"--sampler {self.sampler} does not read {', '.join(unread)}, which would be ignored: leave that out, "
                f"or choose --sampler {' or '.join(self._given()[unread[0]])}"
            )
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
        vllm = {} if self.sampler == "vllm-server" else {"max_model_length": longest}
        vllm |= self._given_to_vllm()
        return make_sampler(self.sampler, tokenizer, vllm_url=self.vllm_url, kv_budget_bytes=budget, vllm=vllm)

    def _given_to_vllm(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.vllm).items() if value != getattr(VLLMSettings(), name)}

    def _given(self) -> dict[str, tuple[str, ...]]:
        """Flags that are not at their defaults -> the samplers that read them."""
        server, colocated = ("vllm-server",), ("vllm-colocate", "auto")
        given: dict[str, tuple[str, ...]] = {
            f"--vllm.{name.replace('_', '-')}": server if name in ONE_MODE["server"] else colocated
            for name in self._given_to_vllm()
        }
        if self.vllm_url != EngineSettings.vllm_url:
            given["--vllm-url"] = server
        if self.kv_budget_gib is not None:
            given["--kv-budget-gib"] = ("loop", "continuous", "auto")
        return given

    @property
    def importance_sampling_cap(self) -> float | None:
        """The cap that suits it."""
        return default_importance_cap(self.sampler)
