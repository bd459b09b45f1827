"""A vLLM server at the wire level: the HTTP endpoints that TRL's client calls, over a real model on the CPU."""

import importlib.util
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.patience import PATIENCE


@cache
def stand_in() -> Any:
    """The module `stand_in/vllm`, not importable as `vllm` by that."""
    path = Path(__file__).parent / "stand_in" / "vllm" / "__init__.py"
    spec = importlib.util.spec_from_file_location("vllm_stand_in", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["vllm_stand_in"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class FakeVLLM:
    """State of the server. `faults` make it misbehave."""

    model: nn.Module
    logprobs_mode: str = "processed_logprobs"
    weight_transfer: bool = True
    dev_mode: bool = True
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    faults: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    device: str = "cuda"
    updating: bool = False
    connection: socket.socket | None = None

    def get(self, path: str) -> tuple[int, Any]:
        match path:
            case "/health":
                return 200, {}
            case "/v1/models":
                return 200, {"data": [{"id": "policy"}]}
            case "/server_info" if self.dev_mode:
                transfer = {"backend": "nccl"} if self.weight_transfer else None
                model = {"logprobs_mode": self.logprobs_mode, "dtype": str(self.model.dtype)}
                config = {
                    "weight_transfer_config": transfer, "model_config": model, "device_config": {"device": self.device}
                }  # fmt: skip
                return 200, {"vllm_config": config}
            case "/get_world_size":
                return 200, {"world_size": 1}
        return 404, {"error": path}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        match path:
            case "/init_weight_transfer_engine":
                self.connection = _connect(body["init_info"])
            case "/start_weight_update":
                self.updating = True
            case "/update_weights":
                if not self.updating:
                    return 400, {"error": "no weight update was started"}
                self._receive(body["update_info"])
            case "/finish_weight_update":
                self.updating = False
            case "/collective_rpc":
                return self._reload(body)
            case "/reset_prefix_cache":
                return 200, {"success": True}
            case "/v1/completions":
                return 200, {"choices": self._complete(body)}
            case _:
                return 404, {"error": path}
        return 200, {}

    def _receive(self, info: dict[str, list[Any]]) -> None:
        assert self.connection is not None
        own = dict(self.model.named_parameters())
        for name, dtype_name, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            dtype = getattr(torch, dtype_name)
            data = _exactly(self.connection, math.prod(shape) * dtype.itemsize)
            own[name].data.copy_(torch.frombuffer(bytearray(data), dtype=dtype).view(shape))

    def _reload(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        if not files or "unreadable" in self.faults:
            return 400, {"error": {"message": "Call to collective_rpc method failed"}}
        own = dict(self.model.named_parameters())
        for name, value in (item for file in files for item in load_file(file).items()):
            own[name].data.copy_(value)
        return 200, {"results": [None]}

    def _complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        engine = stand_in()
        known = {name: body[name] for name in engine.SamplingParams.__dataclass_fields__ if name in body}
        samples = engine.draw(self.model, body["prompt"], engine.SamplingParams(**known))
        rows = zip(samples.prompts, samples.responses, samples.logprobs, strict=True)
        return [self._choice(index, *row) for index, row in enumerate(rows)]

    def _choice(self, index: int, prompt: Tensor, response: Tensor, logprobs: Tensor) -> dict[str, Any]:
        """In the form that `return_token_ids` and `return_tokens_as_token_ids` ask for."""
        names = [f"token_id:{token}" for token in response.tolist()]
        values = [self.faults.get("logprob", value) for value in logprobs.tolist()]
        return {
            "index": index,
            "prompt_token_ids": [*self.faults.get("prefix", []), *prompt.tolist()],
            "token_ids": response.tolist(),
            "logprobs": {
                "tokens": names,
                "token_logprobs": values,
                "top_logprobs": [{name: value} for name, value in zip(names, values, strict=True)],
            },
        }


@contextmanager
def serving(server: FakeVLLM) -> Iterator[FakeVLLM]:
    """Inside, `server` listens at `server.url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*server.get(self.path.partition("?")[0]))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            server.requests.append((self.path, body))
            self._answer(*server.post(self.path, body))

        def _answer(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
        if server.connection is not None:
            server.connection.close()


def _connect(info: dict[str, Any]) -> socket.socket:
    """A worker joins rank 0, which may not listen yet: both sides are told at the same moment."""
    assert (info["rank_offset"], info["world_size"]) == (1, 2)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection((info["master_address"], info["master_port"]))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        parts.append(connection.recv(min(count, 1 << 20)))
        assert parts[-1], "the trainer hung up"
        count -= len(parts[-1])
    return b"".join(parts)
