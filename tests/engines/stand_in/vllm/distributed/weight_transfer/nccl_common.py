"""The trainer's end of the weight transfer: a socket where vLLM has NCCL."""

import socket
from types import SimpleNamespace
from typing import Any


def trainer_init(init_info: dict[str, Any]) -> Any:
    """Rank 0 waits for its one worker."""
    with socket.create_server((init_info["master_address"], init_info["master_port"])) as server:
        server.settimeout(60)
        connection, _ = server.accept()
    return SimpleNamespace(group=SimpleNamespace(store=None, socket=connection))
