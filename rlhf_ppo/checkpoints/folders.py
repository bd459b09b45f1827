"""Checkpoint folders, written atomically: into a temporary folder, flushed, then renamed.

A checkpoint is a folder `checkpoint-<iteration>` of safetensors files and one JSON file. `manifest.json` is written
last and lists the SHA-256 of every file, and its own: a folder without it, or with a file that does not match, is
skipped, and the previous one is used. Folders whose name begins with a dot are unfinished or being deleted.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf_ppo.utils.digests import file_sha256

FORMAT = 2
"""1: optimizer and random states by `torch.save`. 2: safetensors only, with a checksum of the manifest itself."""
MANIFEST, STATE = "manifest.json", "state.json"
"""Every checkpoint has both."""
_NAME = re.compile(r"checkpoint-(\d{1,12})")


class CheckpointError(ValueError):
    """A checkpoint cannot be used in this run; the message has reason and remedy. Nothing has changed."""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def begin_checkpoint(folder: Path, iteration: int) -> Path:
    """Make an empty temporary folder for the files of a checkpoint, which `commit_checkpoint` completes."""
    for leftover in [*folder.glob(".checkpoint-*.partial"), *folder.glob(".checkpoint-*.removed")]:
        shutil.rmtree(leftover)  # of a run that was killed
    partial = folder / f".checkpoint-{iteration}.partial"
    partial.mkdir(parents=True)
    return partial


def commit_checkpoint(partial: Path, *, keep_last: int) -> Path:
    """Flush, write the manifest, rename to `checkpoint-<iteration>`, and remove old checkpoints.

    The latest `keep_last` up to this one are kept. Those of later iterations are removed: they are damaged or of a run
    that was resumed from an earlier checkpoint.
    """
    write_manifest(partial)
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    replace_folder(partial, final)
    number = _iteration(final)
    earlier = [path for path in list_checkpoints(final.parent) if _iteration(path) <= number]
    for path in list_checkpoints(final.parent):
        if path not in earlier[-keep_last:]:
            remove_folder(path)
    return final


def write_manifest(folder: Path) -> None:
    """Flush all files of `folder`, and write the manifest that makes it an intact checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    content = {"format": FORMAT, "files": _files_sha256(folder)}
    for path in (*folder.rglob("*"), folder):
        flush(path)
    write_json(folder / MANIFEST, content | {"sha256": _json_sha256(content)})
    flush(folder)


def replace_folder(partial: Path, final: Path) -> None:
    """Rename a finished folder to `final`, and only then remove the previous one."""
    old = final.with_name(f".{final.name}.removed")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_replaced_folder(final: Path) -> None:
    """Undo a `replace_folder` that was killed between its two renames."""
    old = final.with_name(f".{final.name}.removed")
    if old.is_dir() and not final.exists():
        old.rename(final)


def remove_folder(path: Path) -> None:
    """Remove a folder atomically (rename, then delete); warn if it cannot be deleted."""
    renamed = path.with_name(f".{path.name}.removed")
    try:
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed)
    except OSError as error:
        warnings.warn(f"{path.name} could not be deleted ({error}); it only takes up space.", stacklevel=2)


def flush(path: Path) -> None:
    """Write a file or folder through to disk (fsync), so that a rename is not there before the content."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; other folders are ignored."""
    return [path for path in _checkpoint_folders(folder) if (path / MANIFEST).is_file()]


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_iteration)


def latest_checkpoint(folder: Path) -> Path | None:
    """The latest intact checkpoint; None if there are none. Warns of damaged ones and skips them.

    A `checkpoint-<iteration>` without a manifest is damaged: folders get this name with the manifest in them.

    Raises:
        CheckpointError: The latest intact one was written by a newer version, or all are damaged.
    """
    candidates = [
        path for path in _checkpoint_folders(folder) if any((path / name).exists() for name in (MANIFEST, STATE))
    ]
    for path in reversed(candidates):
        if (damage := find_damage(path)) is None:
            if (written := checkpoint_format(path)) > FORMAT:
                raise CheckpointError(
                    f"{path.name} has format {written}, this version of rlhf_ppo reads 1 to {FORMAT}: resuming "
                    "from an older one would lose work. Update rlhf_ppo, or choose another output_dir."
                )
            return path
        warnings.warn(f"{path.name} cannot be used: {damage}. Trying the previous one.", stacklevel=2)
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} can be used: starting again would lose the run. "
            "Restore one from a copy, choose another output_dir, or start again with resume=False."
        )
    return None


def checkpoint_format(path: Path) -> int:
    """The format of a checkpoint without damage."""
    return int(read_json(path / MANIFEST)["format"])


def find_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint (missing or changed files); None if it is intact."""
    try:
        manifest = read_json(path / MANIFEST)
        written, files = int(manifest["format"]), dict(manifest["files"])
        if written < 1 or STATE not in files:
            return f"{MANIFEST} is not that of a checkpoint: format {written}, files {', '.join(files) or 'none'}"
        has_checksum = written > 1 or "sha256" in manifest
        if has_checksum and manifest["sha256"] != _json_sha256({"format": written, "files": files}):
            return f"{MANIFEST} has changed since it was written"
        return next((damage for name, digest in files.items() if (damage := _file_damage(path, name, digest))), None)
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
        return None if file_sha256(path / name) == digest else f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _files_sha256(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
