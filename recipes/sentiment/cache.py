"""Folders that are built once, however many processes ask for them and wherever they are interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

CACHE_VARIABLE = "RLHF_PPO_CACHE"
"""Environment variable that moves the cache away from `~/.cache/rlhf_ppo`."""


def cache_root() -> Path:
    """The folder that holds everything fetched or built by the recipe; it may be deleted at any time."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rlhf_ppo").expanduser()


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits that change whenever a configuration or a piece of data changes.

    Args:
        parts: Anything JSON can hold; the order of dictionary keys does not matter.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def build_once(folder: Path, build: Callable[[Path], None], *, valid: Callable[[Path], bool] = Path.is_dir) -> Path:
    """Return `folder`, after building it if it is missing or no longer valid.

    `build` fills an empty folder beside it, which is renamed into place when `build` returns: a reader sees the whole
    result or nothing, and what a killed process leaves half-filled is emptied. What a build saves on its way, in
    `kept_beside` the folder that it fills, stays until the result is in place. Of several processes one builds; the
    others wait for it.

    Args:
        folder: Where the result lives.
        build: Fills the folder that it is given.
        valid: Says whether an existing `folder` may be used as it is.

    Raises:
        OSError: When the cache cannot be written.
    """
    if folder.is_dir() and valid(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache folder {folder.parent} cannot be created ({error}), so nothing can be kept there. "
            f"Set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    with _waiting_lock(folder):
        if folder.is_dir() and valid(folder):  # another process has built it while this one waited
            return folder
        target = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(target, ignore_errors=True)  # left by a killed build; the lock is ours
        target.mkdir()
        try:
            build(target)
            shutil.rmtree(folder, ignore_errors=True)
            target.replace(folder)
        finally:
            shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(kept_beside(target), ignore_errors=True)
    return folder


def kept_beside(target: Path) -> Path:
    """Where the build that fills `target` keeps what an interrupted one goes on from."""
    return target.with_name(f"{target.name}.kept")


@contextmanager
def _waiting_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` across processes; say once that it waits when another process has it."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        print(f"Waiting for another process that prepares {folder.name} ...", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
