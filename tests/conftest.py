"""What every test may rely on: one thread, fixed seeds, no network, a cache of its own.

Set before anything imports torch or a Hugging Face library, because both read their environment once.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    ACCELERATE_USE_CPU=os.environ.get("ACCELERATE_USE_CPU", "1"),
    GLOO_SOCKET_IFNAME="lo",
    MPLBACKEND="Agg",
)

import gc
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings

import tests.support.typechecking  # noqa: F401  the type checker that pyproject.toml names, which is looked up as an attribute
from rlhf_ppo.models import scoring
from rlhf_ppo.models.fast_paths import FastPaths, prove_fast_paths

torch.set_num_threads(1)

# No clock turns a test red: another job on the machine may make any example slow.
settings.register_profile("rlhf_ppo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rlhf_ppo")

SHAPES_CHECKED = {"functional", "kernels", "models", "rewards", "rollout", "updates"}
"""Folders with checks of shapes and types; in the others, whose tests take many steps, they took 37 % of the time."""

PROOFS: dict[object, FastPaths] = {}
"""Of fast paths, by what a model is made of."""

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or written to the user's caches."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_PPO_CACHE", str(root / "rlhf_ppo"))
        patch.setenv("HF_HOME", str(root / "huggingface"))
        patch.setenv("MPLCONFIGDIR", str(_made(root / "matplotlib")))
        yield


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_unless_local(host: object) -> None:
    if host and not str(host).startswith(LOOPBACK) and host != socket.gethostname():
        raise RuntimeError(f"This test wants to reach {host!r}: tests use no network. Build what it needs in code.")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A connection that leaves this machine is an error naming its address, not a slow or flaky test."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            _refuse_unless_local(address[0])
        connect(self, address)

    def local_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_unless_local(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket, "getaddrinfo", local_look_up)
        yield


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> None:
    """Libraries collect garbage in each training. What a module finds alive is not searched: it took half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _own_precision() -> None:
    """Accelerate keeps one precision for a whole process; a module's bfloat16 must not reach the next module."""
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True, scope="module")
def _shape_checks(request: pytest.FixtureRequest) -> None:
    """Check shapes and types at run time where functions are tested one by one."""
    jaxtyping.config.update("jaxtyping_disable", _folder(request) not in SHAPES_CHECKED)


def _folder(request: pytest.FixtureRequest) -> str:
    return request.path.relative_to(Path(__file__).parent).parts[0]


@pytest.fixture(autouse=True, scope="module")
def _one_proof_per_architecture(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where functions are not tested one by one, the fast paths of a model are proved once, not for each trainer."""

    def proved(model: Any, wanted: FastPaths, *arguments: Any, **settings: Any) -> FastPaths:
        kinds = tuple((type(module), module.training) for module in model.modules())
        tensors = tuple((p.shape, p.dtype, p.device, p.requires_grad) for p in model.parameters())
        key = kinds, tensors, model.config.to_json_string(), str(wanted), str(settings)
        if key not in PROOFS:
            PROOFS[key] = prove_fast_paths(model, wanted, *arguments, **settings)
        return PROOFS[key]

    with pytest.MonkeyPatch.context() as patch:
        if _folder(request) not in SHAPES_CHECKED:
            patch.setattr(scoring, "prove_fast_paths", proved)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # third parties draw from the global state
    torch.manual_seed(0)
