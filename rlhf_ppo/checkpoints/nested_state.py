"""Save nested state in one safetensors file: tensors as tensors, all else as JSON metadata. Nothing is pickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_STRUCTURE = "tree"


class DamagedFileError(ValueError):
    """A file is not what `save_nested_state` or a checkpoint writes; the message says what was found."""


def save_nested_state(state: Any, path: Path) -> None:
    """Write nested dicts, lists, tuples, numbers, texts, None and tensors; `load_nested_state` reads them back.

    Raises:
        TypeError: The state holds another type; the message names its position.
        OSError: The file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(state, tensors, "state")
    write_tensors(tensors, path, metadata={_STRUCTURE: json.dumps(structure)})


def load_nested_state(path: Path) -> Any:
    """Load what `save_nested_state` wrote; a DamagedFileError if the file is damaged or of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[_STRUCTURE])
            return _decode(structure, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"{path.name} is no saved state ({error})") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path.name} is no saved state: its description fits neither it nor itself") from error


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.save_file`, with an `OSError` if the disk is full or the folder is not writable."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor], position: str) -> Any:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().contiguous()
        shared = any(other.data_ptr() == tensor.data_ptr() for other in tensors.values())
        tensors[position] = tensor.clone() if shared and tensor.numel() else tensor
        return {"tensor": position}
    if isinstance(value, dict):
        pairs = [[key, _encode(item, tensors, f"{position}.{key}")] for key, item in value.items()]
        if all(isinstance(key, str | int) for key in value):
            return {"dict": pairs}
    elif isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{position}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    elif value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{position} is a {type(value).__name__}, expected tensors, numbers, texts, None, or lists, tuples and dicts "
        "of them: only these are saved, so that no file of a checkpoint can run code. Let state_dict() return these."
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
