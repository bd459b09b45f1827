"""Open vLLM through TRL's client, and bring the policy's weights to it.

Three ways: an engine in the training process reloads them layer by layer; a server on GPUs receives them over NCCL; any
server reads them from files, which needs neither a GPU nor vLLM where the trainer runs.
"""

import importlib
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias
from unittest.mock import patch
from urllib.parse import urlparse

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor
from trl.import_utils import is_vllm_available

logger = logging.getLogger(__name__)

WeightTransfer: TypeAlias = Literal["auto", "nccl", "disk"]
FILE_BYTES = 2**30
"""Largest file of weights, and what the trainer holds of them at once."""


def choose_transfer(transfer: WeightTransfer, device: torch.device, folder: str | None) -> Literal["nccl", "disk"]:
    """How weights reach a server: by files if there is a folder for them, else over NCCL from a GPU with vLLM.

    Raises:
        ValueError: NCCL is asked for, and a folder that it would not use.
    """
    if transfer == "nccl" and folder is not None:
        raise ValueError(
            f"expected no transfer_dir with weight_transfer='nccl', got {folder!r}: NCCL sends weights without files, "
            "so the folder would be ignored. Leave it out, or set weight_transfer='disk'."
        )
    if transfer != "auto" or folder is not None:
        return "nccl" if transfer == "nccl" else "disk"
    return "nccl" if device.type == "cuda" and is_vllm_available() else "disk"


@contextmanager
def _replaced(module: Any, **names: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(patch.object(module, name, value))
        yield


def open_in_process(policy: Any, accelerator: Any, tokenizer: Any, *, dtype: str, eager: bool, **settings: Any) -> Any:
    """TRL's client over an engine in this process, which computes in `dtype`."""
    # Imported late and by name: the module imports vLLM, which takes many seconds.
    client = importlib.import_module("trl.generation.vllm_generation")
    with _replaced(client, LLM=partial(client.LLM, dtype=dtype, enforce_eager=eager)):
        engine = client.VLLMGeneration(policy, accelerator, tokenizer, mode="colocate", **settings)
    engine.sync_weights = partial(_reload_in_process, engine)  # TRL's own has no way back from packed weights
    return engine


def open_server(
    policy: Any, accelerator: Any, tokenizer: Any, *, transfer: Literal["nccl", "disk"], folder: str | None, url: str,
    **settings: Any,
) -> Any:  # fmt: skip
    """TRL's client of a server at `url`.

    Raises:
        OSError: No server answers in time.
        ValueError: The server cannot see the files, or would not take a tied LM head.
    """
    generation = importlib.import_module("trl.generation.vllm_generation")
    client = importlib.import_module("trl.generation.vllm_client")
    make = partial(generation.VLLMGeneration, policy, accelerator, tokenizer, mode="server", server_base_url=url)
    if transfer == "nccl":
        return make(**settings)
    if folder is None and urlparse(url).hostname not in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        raise ValueError(
            f"expected a folder that trainer and vLLM server both see, got none for the server at {url}: weights go "
            "there by files, and a server that cannot read them ends. Pass VLLMSampler(transfer_dir=...), the same "
            "path on both machines, or train on a GPU with vLLM installed, from where they go over NCCL."
        )
    # Files need no communicator, and the client needs vLLM for nothing else.
    with (
        _replaced(client, is_vllm_available=lambda: True),
        _replaced(generation, is_vllm_available=lambda: True),
        _replaced(client.VLLMClient, init_communicator=lambda *_, **__: None),
        _replaced(generation, VLLMClient=client.VLLMClient),
    ):
        engine = make(**settings)
    info = engine.vllm_client.get_server_info() if accelerator.is_main_process else None
    if info is not None:
        _check_head(policy, info)
    dtype = getattr(torch, info["model_config"]["dtype"].removeprefix("torch.")) if info else torch.float32
    engine.sync_weights = partial(_reload_from_files, engine, folder, dtype)
    return engine


def send_active_adapter_alone(engine: Any) -> None:
    """Send the modules that the active adapter saves (`modules_to_save`) by their plain names, and no other adapter's.

    TRL's client takes the adapter "default" for the only one.
    """
    weights, rename, marker = engine._iter_named_params, engine._fix_param_name_to_vllm, "modules_to_save."

    def keep_adapter_name(name: str, extra_prefixes: Sequence[str] = ()) -> str:
        return str(rename(name, [prefix for prefix in extra_prefixes or () if marker not in prefix]))

    def active_weights() -> Iterator[tuple[str, Tensor]]:
        active = getattr(engine.model, "active_adapter", None)
        layers = [layer for layer in engine.model.modules() if isinstance(layer, BaseTunerLayer)]
        of_adapters = {part for layer in layers for part in (*layer.adapter_layer_names, *layer.other_param_names)}
        for long_name, weight in weights():
            name = long_name.replace("token_adapter.", "")  # of `trainable_token_indices`
            if not of_adapters.isdisjoint(name.split(".")):
                continue  # merged already
            place, _, of_adapter = name.partition(marker)
            if marker not in name or of_adapter.startswith(f"{active}."):
                yield place + of_adapter.removeprefix(f"{active}."), weight

    engine._fix_param_name_to_vllm, engine._iter_named_params = keep_adapter_name, active_weights


def check_tied_head(policy: Any) -> None:
    """Raise ValueError if an adapter sets an LM head apart from the embedding it is tied to: an engine has one weight.

    LoRA on one of the two would be merged into both. A head of its own (`modules_to_save`) would not be read.
    """
    if not (isinstance(policy, PeftModel) and policy.config.get_text_config(decoder=True).tie_word_embeddings):
        return
    base: Any = policy.get_base_model()
    parts: list[Any] = [base.get_output_embeddings(), base.get_input_embeddings()]
    copies = any(isinstance(part, ModulesToSaveWrapper) for part in parts) and parts[0].weight is not parts[1].weight
    if copies or any(isinstance(part, BaseTunerLayer) for part in parts):
        raise ValueError(
            "expected adapters that leave a tied embedding and LM head alone, or train whole tokens "
            "(`trainable_token_indices`), got one on the embedding or the head: vLLM keeps a single weight for both, "
            "and would sample from another policy. Use DecodeLoop(), other target_modules, or an untied model."
        )


def _check_head(policy: Any, info: dict[str, Any]) -> None:
    on_cpu = info.get("device_config", {}).get("device") == "cpu"
    if on_cpu and policy.config.get_text_config(decoder=True).tie_word_embeddings:
        raise ValueError(
            "expected an LM head with weights of its own for a vLLM server on a CPU, got one tied to the embedding: "
            "the server multiplies by a packed copy of it that no reload renews, so half of an update would be lost. "
            "Use VLLMSampler(mode='colocate'), which packs it anew, a server on a GPU, or an untied model."
        )


def _reload_in_process(engine: Any) -> None:
    if engine.enable_sleep_mode:
        torch.cuda.empty_cache()
        engine.llm.wake_up(tags=["weights"])
        engine._llm_weights_sleeping = False
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": engine._iter_named_params()})
    engine.llm.collective_rpc(_pack_tied_head)
    engine.llm.reset_prefix_cache()


def _pack_tied_head(worker: Any) -> None:
    """Pack anew the weights by which vLLM's CPU layers multiply: a reload leaves those of a tied head as they are."""
    head = getattr(worker.model_runner.get_model(), "lm_head", None)
    if getattr(head, "cpu_linear", None) is not None:
        layers = importlib.import_module("vllm.model_executor.layers.utils")
        layers.dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _reload_from_files(engine: Any, parent: str | None, dtype: torch.dtype) -> None:
    """Write the weights, let the server read them, delete them. Collective: gathers sharded weights."""
    is_main = engine.accelerator.is_main_process
    start = time.perf_counter()
    with TemporaryDirectory(dir=parent, prefix="weights-") as folder:
        _write(engine._iter_named_params(), Path(folder), dtype, write=is_main)
        if not is_main:
            return
        client = engine.vllm_client
        client.check_server(engine.server_timeout)
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        try:
            answer = client.session.post(f"{client.base_url}/collective_rpc", json=body)
            problem = None if answer.status_code == 200 else answer.text[:300]
        except OSError as error:  # requests gives up after some attempts
            problem = str(error)[:300]
        if problem is not None:
            raise RuntimeError(
                f"expected the vLLM server at {client.base_url} to read the weights in {folder}, got: {problem}. It "
                "may have ended. It must see this folder by this path, and be started with VLLM_SERVER_DEV_MODE=1 and "
                "the model that is trained; VLLMSampler(transfer_dir=...) chooses the folder."
            )
        client.reset_prefix_cache()
    logger.info("the server read the weights in %.1f s", time.perf_counter() - start)


def _write(weights: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, *, write: bool) -> None:
    held: dict[str, Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        save_file(held, folder / f"model-{files:05}.safetensors")
        held.clear()
        files += 1

    for name, weight in weights:
        if write:  # adapters are taken out of the weights again after the last one
            held[name] = weight.detach().to("cpu", dtype, copy=True).contiguous()
            if sum(tensor.nbytes for tensor in held.values()) >= FILE_BYTES:
                flush()
    if held:
        flush()


def compute_dtype(model: Any) -> str:
    """Name of the dtype that a policy's linear layers multiply in: that of autocast, or on a CPU the layers' own."""
    kind = model.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        own = (getattr(layer, "matmul_dtype", None) for layer in model.modules())
        dtype = next((found for found in own if found is not None), model.dtype)
    return str(dtype).removeprefix("torch.")
