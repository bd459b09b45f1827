"""Checkpoints that are either whole or absent: written aside, flushed, then renamed.

A checkpoint is a folder `checkpoint-<iteration>` with the model (safetensors), the optimiser, the random states of
every process, and `state.json`. `manifest.json` is written last and lists every file with its SHA-256: a folder
without it, or with a file that does not match, is passed over and the one before is used.
"""

import hashlib
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = 1
MANIFEST = "manifest.json"


def rng_state(generator: torch.Generator) -> dict[str, Any]:
    """Random states of this process: torch, CUDA, NumPy, Python, and the sampler's own generator."""
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (numpy_state[0], torch.as_tensor(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
        "python": random.getstate(),
        "sampler": generator.get_state(),
    }


def set_rng_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Continue every random stream where `rng_state` was taken."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    generator.set_state(state["sampler"])


def write_json(path: Path, content: Any) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def begin(folder: Path, iteration: int) -> Path:
    """An empty folder aside, for the files of a checkpoint; `commit` makes it one."""
    aside = folder / f".checkpoint-{iteration}.partial"
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, *, keep_last: int) -> Path:
    """Write the manifest, flush, rename to `checkpoint-<iteration>`, then remove all but the newest `keep_last`."""
    files = {str(path.relative_to(aside)): _digest(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    write_json(aside / MANIFEST, {"format": FORMAT, "files": files})
    final = aside.with_name(aside.name.removeprefix(".").removesuffix(".partial"))
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    for old in checkpoints(final.parent)[:-keep_last]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named in a warning and passed over."""
    for path in reversed(checkpoints(folder)):
        if (damage := find_damage(path)) is None:
            return path
        warnings.warn(f"{path.name} cannot be used: {damage}. Trying the one before.", stacklevel=2)
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version reads {FORMAT}"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} has changed since it was written"
    return None


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
