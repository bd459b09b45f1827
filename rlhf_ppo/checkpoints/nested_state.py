"""Nested state in one safetensors file: tensors as tensors, the rest as JSON beside them. Nothing is unpickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_SKELETON = "tree"


class DamagedFileError(ValueError):
    """A file does not hold what `save_nested_state` or the checkpoint writes; the message says what was found."""


def save_nested_state(tree: Any, path: Path) -> None:
    """Write nested dicts, lists, tuples, numbers, texts, None and tensors; `load_nested_state` reads them back.

    Raises:
        TypeError: Something else is in there; its place is named.
        OSError: The file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _encode(tree, tensors, "state")
    write_tensors(tensors, path, metadata={_SKELETON: json.dumps(skeleton)})


def load_nested_state(path: Path) -> Any:
    """What `save_nested_state` wrote.

    Raises:
        DamagedFileError: The file holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})[_SKELETON])
            return _decode(skeleton, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"{path.name} is no saved state ({error})") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path.name} is no saved state: its description fits neither it nor itself") from error


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """`save_file`, whose own error for a full disk or a forbidden folder is no `OSError`."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor], place: str) -> Any:
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous()
        shared = any(other.data_ptr() == whole.data_ptr() for other in tensors.values())
        tensors[place] = whole.clone() if shared and whole.numel() else whole
        return {"tensor": place}
    if isinstance(value, dict):
        pairs = [[key, _encode(item, tensors, f"{place}.{key}")] for key, item in value.items()]
        if all(isinstance(key, str | int) for key in value):
            return {"dict": pairs}
    elif isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{place}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    elif value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{place} is a {type(value).__name__}, expected tensors, numbers, texts, None, or lists, tuples and dicts of "
        "them: only these are saved, so that no file of a checkpoint can run code. Let its state_dict() return these."
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind of entry {kind!r}")
