"""Checkpoints that are either whole or absent: written aside, flushed, then renamed.

A checkpoint is a folder `checkpoint-<iteration>` of safetensors files and one JSON file. `manifest.json` is written
last and lists every file with its SHA-256, and its own: a folder without it, or with a file that does not match, is
passed over, and the one before is used. What a name begins with a dot for is unfinished or on its way out.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 2
"""1: optimizer and random states by `torch.save`. 2: safetensors only, with a checksum of the manifest itself."""
MANIFEST, STATE = "manifest.json", "state.json"
"""Every checkpoint has both."""
_NAME = re.compile(r"checkpoint-(\d{1,12})")


class CheckpointError(ValueError):
    """A checkpoint cannot be used in this run; the message says why and what helps. Nothing has changed."""


def write_json(path: Path, content: Any) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def begin_checkpoint(folder: Path, iteration: int) -> Path:
    """An empty folder aside, for the files of a checkpoint; `commit_checkpoint` makes it one."""
    for left in [*folder.glob(".checkpoint-*.partial"), *folder.glob(".checkpoint-*.removed")]:
        shutil.rmtree(left)  # of a run that was killed
    aside = folder / f".checkpoint-{iteration}.partial"
    aside.mkdir(parents=True)
    return aside


def commit_checkpoint(aside: Path, *, keep_last: int) -> Path:
    """Flush, write the manifest, rename to `checkpoint-<iteration>`, then remove what is not to be kept.

    Kept are the newest `keep_last` up to this one. Those of later iterations belong to a run that this one has
    replaced, or are damaged: this run was resumed from before them.
    """
    content = {"format": FORMAT, "files": _digests(aside)}
    for path in (*aside.rglob("*"), aside):
        flush(path)
    write_json(aside / MANIFEST, content | {"sha256": _digest_of(content)})
    flush(aside)
    final = aside.with_name(aside.name.removeprefix(".").removesuffix(".partial"))
    replace_folder(aside, final)
    number = _iteration(final)
    earlier = [path for path in checkpoints(final.parent) if _iteration(path) <= number]
    for path in checkpoints(final.parent):
        if path not in earlier[-keep_last:]:
            remove_folder(path)
    return final


def replace_folder(aside: Path, final: Path) -> None:
    """Rename a finished folder into place; what stood there gives way only then."""
    old = final.with_name(f".{final.name}.removed")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    aside.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_replaced_folder(final: Path) -> None:
    """Undo a `replace_folder` that was killed between its two renames."""
    old = final.with_name(f".{final.name}.removed")
    if old.is_dir() and not final.exists():
        old.rename(final)


def remove_folder(path: Path) -> None:
    """Take a folder away in one step for every reader, then delete it; a failure to delete is no harm."""
    gone = path.with_name(f".{path.name}.removed")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        warnings.warn(f"{path.name} could not be deleted ({error}); it takes up space, no more.", stacklevel=2)


def flush(path: Path) -> None:
    """Have a file or folder written to the disk itself: a rename must not be there before what it names."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; folders with other names are left alone."""
    return [path for path in _named(folder) if (path / MANIFEST).is_file()]


def _named(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_iteration)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, None if there never was one; damaged ones are named and passed over.

    Nothing is renamed to `checkpoint-<iteration>` before its manifest is there: one that has lost it is damaged.

    Raises:
        CheckpointError: The newest whole one was written by a newer version, or there are damaged ones only.
    """
    found = [path for path in _named(folder) if any((path / name).exists() for name in (MANIFEST, STATE))]
    for path in reversed(found):
        if (damage := find_damage(path)) is None:
            if (written := format_of(path)) > FORMAT:
                raise CheckpointError(
                    f"{path.name} has format {written}, this version of rlhf_ppo reads 1 to {FORMAT}: going on from "
                    "an older one would throw work away. Update rlhf_ppo, or choose another output_dir."
                )
            return path
        warnings.warn(f"{path.name} cannot be used: {damage}. Trying the one before.", stacklevel=2)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} can be used: to begin again would throw the run away. "
            "Restore one from a copy, choose another output_dir, or begin again with resume=False."
        )
    return None


def format_of(path: Path) -> int:
    """The format of a checkpoint without damage."""
    return int(read_json(path / MANIFEST)["format"])


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(path / MANIFEST)
        written, files = int(manifest["format"]), dict(manifest["files"])
        if written < 1 or STATE not in files:
            return f"{MANIFEST} is none of a checkpoint: format {written}, files {', '.join(files) or 'none'}"
        signed = written > 1 or "sha256" in manifest
        if signed and manifest["sha256"] != _digest_of({"format": written, "files": files}):
            return f"{MANIFEST} has changed since it was written"
        return next((found for name, digest in files.items() if (found := _file_damage(path, name, digest))), None)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is unreadable ({error})"


def _file_damage(path: Path, name: str, digest: str) -> str | None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return f"{MANIFEST} names {name!r}, which is no file of this folder"
    try:
        if not (path / name).is_file():
            return f"{name} is missing"
        return None if _digest(path / name) == digest else f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
