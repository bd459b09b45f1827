"""Checkpoints as earlier versions wrote them."""

import hashlib
from pathlib import Path

import torch

from rlhf_ppo.checkpoints.folders import MANIFEST, read_json, write_json
from rlhf_ppo.checkpoints.nested_state import load_nested_state


def as_format_1(folder: Path) -> None:
    """Rewrite a checkpoint of format 2 in the layout of format 1: pickled tensors, one JSON file for the rest."""
    loop, own = load_nested_state(folder / "loop.safetensors"), load_nested_state(folder / "processes.safetensors")
    state = {
        "iteration": read_json(folder / "state.json")["iteration"], "best": loop["best"]["best"],
        "kl_controller": loop["kl_controller"], "update": loop["update"], "prompts": loop["prompts"],
        "running": {name: value.tolist() for name, value in loop["running"].items()},
        "lr_scheduler": loop.get("lr_scheduler"),
    }  # fmt: skip
    torch.save(load_nested_state(folder / "optimizer.safetensors"), folder / "optimizer.pt")
    for rank, each in enumerate(own):
        torch.save(each["random"], folder / f"rng-{rank}.pt")
    for name in ("optimizer.safetensors", "loop.safetensors", "processes.safetensors", MANIFEST):
        (folder / name).unlink()
    write_json(folder / "state.json", state)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    write_json(folder / MANIFEST, {"format": 1, "files": files})
