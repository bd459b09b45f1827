"""Stands in for vLLM, which needs a GPU: the names that TRL's client imports from it, and nothing else.

The engine below answers with a real model on the CPU, drawn by the project's own loop. What it shares with vLLM is its
interface; kernels, scheduler and NCCL are not in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop

__version__ = "0.31.0"


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    skip_special_tokens: bool = True


class RequestOutput:
    pass


def draw(model: Any, prompts: list[list[int]], params: SamplingParams) -> Any:
    """Responses of the project's own loop under vLLM's names of the settings."""
    assert params.ignore_eos, "the model's own end-of-sequence token would end responses"
    assert not params.skip_special_tokens, "stop strings that are special tokens would not be seen"
    config = SamplingConfig(
        max_new_tokens=params.max_tokens, min_new_tokens=params.min_tokens, top_p=params.top_p, top_k=params.top_k,
        temperature=params.temperature or 1.0, do_sample=params.temperature > 0, num_return_sequences=params.n,
        repetition_penalty=params.repetition_penalty, stop_token_ids=tuple(params.stop_token_ids),
    )  # fmt: skip
    return DecodeLoop()(model, [torch.tensor(prompt) for prompt in prompts], config)


class LLM:
    """A colocated engine: it loads the model from its folder and takes weights as `reload_weights` gives them."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.cache_resets = 0
        self.calls: list[str] = []

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, value in weights_iterator:
            own[name].data.copy_(value)

    def collective_rpc(self, method: str | Callable[[Any], None], kwargs: dict[str, Any] | None = None) -> None:
        """On the only worker, which stands for itself."""
        self.calls.append(method if isinstance(method, str) else method.__name__)
        getattr(self, method)(**kwargs) if isinstance(method, str) else method(self)

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append("wake_up")

    def sleep(self, level: int) -> None:
        self.calls.append("sleep")

    def reset_prefix_cache(self) -> None:
        self.cache_resets += 1

    def generate(self, prompts: list[dict[str, list[int]]], *, sampling_params: SamplingParams, use_tqdm: bool) -> Any:
        samples = draw(self.model, [prompt["prompt_token_ids"] for prompt in prompts], sampling_params)
        return [
            SimpleNamespace(
                prompt_token_ids=prompt.tolist(),
                outputs=[
                    SimpleNamespace(
                        token_ids=tokens.tolist(),
                        logprobs=[
                            {token: SimpleNamespace(rank=1, logprob=logprob)}
                            for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True)
                        ],
                    )
                ],
            )
            for prompt, tokens, logprobs in zip(samples.prompts, samples.responses, samples.logprobs, strict=True)
        ]
