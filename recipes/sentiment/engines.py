"""Which engine draws the responses: settings that recipes share."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available

from rlhf_ppo.samplers.base import Sampler
from rlhf_ppo.samplers.make_sampler import SamplerName, default_importance_cap, make_sampler


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Who draws."""

    sampler: SamplerName = "loop"
    """Who draws: the own loop, generate or continuous batching of transformers, vLLM (docs/engines.md)."""
    vllm_url: str = "http://localhost:8000"
    """Of the server of --sampler vllm-server."""

    def __post_init__(self) -> None:
        if self.sampler.startswith("vllm") and not is_vllm_available():
            raise ValueError(
                f"--sampler {self.sampler} needs vLLM, which is not installed here (the client of a server uses its "
                "NCCL code too): `pip install 'rlhf_ppo[vllm]'` on a machine with a GPU, or leave --sampler at loop"
            )

    def make_sampler(self, tokenizer: PreTrainedTokenizerBase) -> Sampler:
        """The chosen sampler."""
        return make_sampler(self.sampler, tokenizer, vllm_url=self.vllm_url)

    @property
    def importance_sampling_cap(self) -> float | None:
        """The cap that suits it."""
        return default_importance_cap(self.sampler)
