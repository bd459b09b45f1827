"""What a checkpoint of the training loop holds, and how it comes back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from rlhf_ppo import checkpoint

if TYPE_CHECKING:
    import rlhf_ppo.training


_ENGINE = "engine"
"""Folder of a DeepSpeed engine's own files: parameters and optimiser states, in parts."""


def save_checkpoint(loop: "rlhf_ppo.training.TrainingLoop", folder: Path) -> None:
    """Write a whole checkpoint of the loop into `folder`; all processes call it, the main one writes the weights."""
    accelerator = loop.trainer.accelerator
    aside = folder / f".checkpoint-{loop.state.iteration}.partial"
    if accelerator.is_main_process:
        aside = checkpoint.begin(folder, loop.state.iteration)
        if not _has_engine(loop):
            save_file(_trained(loop), aside / "model.safetensors")
            torch.save(loop.trainer.optimizer.state_dict(), aside / "optimizer.pt")
        checkpoint.write_json(aside / "state.json", _state(loop))
    accelerator.wait_for_everyone()
    if _has_engine(loop):
        loop.trainer.policy.save_checkpoint(str(aside), tag=_ENGINE)
    torch.save(checkpoint.rng_state(loop.generator), aside / f"rng-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.commit(aside, keep_last=loop.config.keep_last)
    accelerator.wait_for_everyone()


def restore_checkpoint(loop: "rlhf_ppo.training.TrainingLoop", folder: Path) -> Path | None:
    """Bring the loop to the newest whole checkpoint in `folder`, if there is one."""
    path = checkpoint.latest(folder)
    if path is None:
        return None
    trainer = loop.trainer
    if _has_engine(loop) != (path / _ENGINE).is_dir():
        raise ValueError(
            f"{path.name} was written {'without' if _has_engine(loop) else 'by'} DeepSpeed, this run differs: the "
            "optimiser's parts and whole do not replace each other. Resume with the first run's launch configuration."
        )
    if _has_engine(loop):
        trainer.policy.load_checkpoint(str(path), tag=_ENGINE)
    else:
        _load_whole(loop, path)
    state = checkpoint.read_json(path / "state.json")
    trainer.kl_ctl.load_state_dict(state["kl_controller"])
    trainer.running.load_state_dict({name: torch.tensor(value) for name, value in state["running"].items()})
    trainer.algorithm.update.load_state_dict(state["update"])
    loop.order.load_state_dict(state["prompts"])
    if trainer.lr_scheduler is not None and state["lr_scheduler"] is not None:
        trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    loop.state.iteration, loop.state.best = state["iteration"], state["best"]
    rng = path / f"rng-{trainer.accelerator.process_index}.pt"
    if rng.is_file():
        checkpoint.set_rng_state(torch.load(rng, weights_only=True), loop.generator)
    if loop.folder is not None and trainer.accelerator.is_main_process:
        loop.folder.resume_from(state["iteration"])
    trainer.accelerator.wait_for_everyone()
    return path


def _has_engine(loop: "rlhf_ppo.training.TrainingLoop") -> bool:
    return bool(loop.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _load_whole(loop: "rlhf_ppo.training.TrainingLoop", path: Path) -> None:
    parameters = dict(loop.trainer.model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(path / "model.safetensors").items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(
                    f"{path.name} holds {name} of shape {tuple(tensor.shape)}, which this model does not have: it was "
                    "written by a run of another model. Choose another output_dir, or resume=False."
                )
            parameters[name].copy_(tensor)
    loop.trainer.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))


def _trained(loop: "rlhf_ppo.training.TrainingLoop") -> dict[str, torch.Tensor]:
    named = loop.trainer.model.named_parameters()
    return {name: parameter.detach().contiguous() for name, parameter in named if parameter.requires_grad}


def _state(loop: "rlhf_ppo.training.TrainingLoop") -> dict[str, Any]:
    trainer = loop.trainer
    scheduler = trainer.lr_scheduler
    return {
        "iteration": loop.state.iteration,
        "best": loop.state.best,
        "kl_controller": trainer.kl_ctl.state_dict(),
        "running": {name: value.tolist() for name, value in trainer.running.state_dict().items()},
        "update": trainer.algorithm.update.state_dict(),
        "prompts": loop.order.state_dict(),
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
    }
