"""Sampler over vLLM, as a server or in the training process, through TRL's client."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available

from rlhf_ppo.models.merging import preserve_base_weights
from rlhf_ppo.samplers.base import Samples, SamplingConfig, SamplingCounts, check_prompts, unwrap_causal_lm
from rlhf_ppo.samplers.logits_processing import DecodingRules
from rlhf_ppo.samplers.vllm_weights import (
    WeightTransfer,
    check_tied_head,
    choose_transfer,
    compute_dtype,
    open_in_process,
    open_server,
    send_active_adapter_alone,
)

ONE_MODE = {
    "server": ("base_url", "weight_transfer", "transfer_dir", "group_port", "timeout"),
    "colocate": (
        "dtype", "enforce_eager", "gpu_memory_utilization", "max_model_length", "tensor_parallel_size",
        "enable_sleep_mode",
    ),
}  # fmt: skip
"""Mode -> the fields of `VLLMSampler` that it alone reads."""


@dataclass(kw_only=True)
class VLLMSampler:
    """Sampler over vLLM. The first call of `sync_weights` opens the engine and sends the policy's weights.

    `PPOTrainer.train` calls `sync_weights` before every rollout and every evaluation. vLLM ignores the generator: a
    resumed run does not repeat the responses of an uninterrupted one.
    """

    mode: Literal["server", "colocate"] = "server"
    """"server": an engine on other GPUs, reached by HTTP; "colocate": one that shares the training GPUs."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Needed for `stop_strings`, and by TRL's client in both modes."""
    base_url: str = "http://localhost:8000"
    """Address of the server."""
    weight_transfer: WeightTransfer = "auto"
    """Server: how weights get there, "nccl" (GPUs on both sides, vLLM installed on both) or "disk" (files, any device);
    "auto": files if there is a `transfer_dir`, else NCCL where the trainer has a GPU and vLLM."""
    transfer_dir: str | None = None
    """Server: folder for these files, under one path on both machines; None: a temporary one, for a server on this
    machine."""
    group_port: int = 51216
    """Server: port of the NCCL group of trainer and server."""
    timeout: float = 240.0
    """Server: seconds to wait for it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Colocated: dtype that the engine computes in; "auto": that of the trainer's layers."""
    enforce_eager: bool | None = None
    """Colocated: whether nothing is compiled or captured; None: on a CPU."""
    gpu_memory_utilization: float = 0.3
    """Colocated: fraction of each GPU's memory that the engine reserves for weights and cache."""
    max_model_length: int | None = None
    """Colocated: maximum tokens of prompt plus response; None: that of the model's configuration."""
    tensor_parallel_size: int = 1
    """Colocated: GPUs per engine."""
    enable_sleep_mode: bool = False
    """Colocated: free the engine's memory during updates; weights are sent again after each sleep."""
    _engine: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        other = "colocate" if self.mode == "server" else "server"
        defaults = {item.name: item.default for item in fields(self)}
        if unread := [name for name in ONE_MODE[other] if getattr(self, name) != defaults[name]]:
            raise ValueError(
                f"expected settings of mode={self.mode!r}, got {', '.join(unread)}: only mode={other!r} reads them, so "
                "they would be ignored. Leave them out, or choose that mode."
            )

    def sync_weights(self, model: nn.Module, accelerator: Any) -> None:
        """Open the engine on the first call, then send it all weights, adapters merged; see `WeightSyncedSampler`.

        Raises:
            ImportError: vLLM is not installed.
            OSError: No server answers within `timeout` seconds.
            ValueError: A quantized base, or an adapter that sets a tied LM head apart; colocated, and the model has no
                path for the engine to load it from; or a server that cannot see the files.
            NotImplementedError: The trainer is on a CPU, and `weight_transfer` is "nccl".
            RuntimeError: The server did not take the weights.
        """
        policy = unwrap_causal_lm(model)
        check_tied_head(policy)
        if self._engine is None:
            self._engine = self._open_engine(policy, accelerator)
            send_active_adapter_alone(self._engine)
        self._engine.model = policy
        with preserve_base_weights(policy):
            self._engine.sync_weights()

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Int[Tensor, "_"]],
        config: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Sample responses; see `Sampler`. Collective.

        Raises:
            OSError: The server does not answer.
            RuntimeError: `sync_weights` was never called, or the server's results do not match the prompts.
            ValueError: The server's log-probabilities leave out temperature and filters.
        """
        check_prompts(prompts)
        if self._engine is None:
            raise RuntimeError(
                "VLLMSampler has no engine yet: it has received no weights to sample from. Call "
                "`sampler.sync_weights(model, accelerator)` first; `PPOTrainer.train` and `evaluate` do."
            )
        self._check_engine(config)
        num_copies = config.num_return_sequences
        requests = [prompt.tolist() for prompt in prompts for _ in range(num_copies)]
        # TRL's client needs the same number of prompts from every process: pad shorter lists, and cut the results.
        longest = max(gather_object([len(requests)])) if self._engine.accelerator.num_processes > 1 else len(requests)
        padding = requests[:num_copies] * ((longest - len(requests)) // num_copies)
        _configure(self._engine, config)
        returned, tokens, logprobs, _ = self._engine.generate(
            requests + padding, images=None, num_generations=num_copies
        )
        _check_results(requests, returned[: len(requests)], logprobs)
        device = prompts[0].device if prompts else torch.device("cpu")
        rules = DecodingRules.build(config, self.tokenizer, device)
        responses = [torch.tensor(row, device=device) for row in tokens[: len(requests)]]
        return Samples(
            prompts=[prompt for prompt in prompts for _ in range(num_copies)],
            responses=responses,
            logprobs=[
                torch.tensor([position[0] for position in row], dtype=torch.float32, device=device)
                for row in logprobs[: len(requests)]
            ],
            finished=[bool(rules.stopped(response[None])) for response in responses],
            counts=SamplingCounts(
                prompt_tokens=sum(len(prompt) for prompt in prompts),
                response_tokens=sum(len(response) for response in responses),
            ),
        )

    def _open_engine(self, policy: Any, accelerator: Any) -> Any:
        transfer = (
            choose_transfer(self.weight_transfer, accelerator.device, self.transfer_dir)
            if self.mode == "server"
            else None
        )
        if transfer != "disk" and not is_vllm_available():
            raise ImportError(
                f"VLLMSampler(mode={self.mode!r}) needs vLLM, which is not installed here. "
                "`pip install 'rlhf_ppo[vllm]'`, or serve the model elsewhere (mode='server', weight_transfer='disk'), "
                "or use DecodeLoop()."
            )
        if getattr(policy, "is_loaded_in_4bit", False) or getattr(policy, "is_loaded_in_8bit", False):
            raise ValueError(
                "expected unquantized weights to send to vLLM, got a base in 4 or 8 bits: the engine cannot read the "
                "packed bytes. Sample with DecodeLoop(), or load the base in bfloat16."
            )
        if transfer is not None:
            return open_server(
                policy, accelerator, self.tokenizer, transfer=transfer, folder=self.transfer_dir, url=self.base_url,
                server_timeout=self.timeout, group_port=self.group_port,
            )  # fmt: skip
        if not policy.name_or_path:
            raise ValueError(
                "VLLMSampler(mode='colocate') loads the model a second time by its name_or_path, but this one was "
                "built in memory (its name_or_path is empty). Save it with `save_pretrained` and load it from there."
            )
        return open_in_process(
            policy, accelerator, self.tokenizer, dtype=compute_dtype(policy) if self.dtype == "auto" else self.dtype,
            eager=accelerator.device.type == "cpu" if self.enforce_eager is None else self.enforce_eager,
            tensor_parallel_size=self.tensor_parallel_size, gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_length=self.max_model_length, enable_sleep_mode=self.enable_sleep_mode,
        )  # fmt: skip

    def _check_engine(self, config: SamplingConfig) -> None:
        if self.mode != "server" or not self._engine.accelerator.is_main_process:
            return
        self._engine.vllm_client.check_server(0)  # a server that was restarted has other weights: do not wait for it
        if not config.warps_distribution:
            return
        mode = self._engine.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(
                f"the vLLM server runs with --logprobs-mode {mode}: its log-probabilities leave out temperature and "
                "filters, and the ratio of the trainer's probability to the sampler's would be wrong. Restart it with "
                "--logprobs-mode processed_logprobs."
            )


def _configure(engine: Any, config: SamplingConfig) -> None:
    """Set the sampling parameters of TRL's client."""
    engine.temperature = float(config.temperature) if config.do_sample else 0.0
    engine.top_p = float(config.top_p) if config.do_sample else 1.0
    engine.top_k = config.top_k if config.do_sample else 0
    engine.repetition_penalty = float(config.repetition_penalty)
    engine.max_completion_length = config.max_new_tokens
    # Responses end as `SamplingConfig` says, not as the model's generation config does.
    engine.generation_kwargs = {
        "ignore_eos": True,
        "min_tokens": config.min_new_tokens,
        "stop_token_ids": list(config.stops),
        "stop": list(config.stop_strings),
        "skip_special_tokens": False,  # else vLLM searches a text without them, which some stop strings are
    }


def _check_results(
    requests: list[list[int]], returned: list[list[int]], logprobs: list[list[list[float | None]]]
) -> None:
    if [list(prompt) for prompt in returned] != requests:
        raise RuntimeError(
            "vLLM answered other prompts than those sent: its token ids differ from the trainer's, so it serves "
            "another model or adds special tokens. Serve the model that is trained, by token ids."
        )
    if any(position[0] is None or not math.isfinite(position[0]) for row in logprobs for position in row):
        raise RuntimeError(
            "vLLM returned a log-probability that is not a finite number: its weights are broken, or were never sent. "
            "Look at the trainer's last metrics and the server's log."
        )
