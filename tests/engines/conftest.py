"""The real client of TRL over a stand-in for vLLM."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_IN = Path(__file__).parent / "stand_in"
OWN = ("vllm", "trl.generation")


def _forget() -> None:
    for name in [name for name in sys.modules if name in OWN or name.startswith(tuple(f"{own}." for own in OWN))]:
        del sys.modules[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`trl.generation.vllm_client`, imported anew while a package `vllm` can be found."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # a colocated engine sets them; they go when the test does
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    _forget()
    import trl.generation.vllm_client as client

    yield client
    _forget()


@pytest.fixture
def without_nccl(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client believes that the trainer has a CUDA device: it refuses any other before it opens the transfer."""
    opened = stand_in.VLLMClient.init_communicator
    monkeypatch.setattr(stand_in.VLLMClient, "init_communicator", lambda self, device: opened(self, device="cuda"))
    return stand_in


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
