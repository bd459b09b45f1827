"""The default device of models that Accelerate does not prepare, such as reward models, and its free memory."""

import os

import torch


def default_device() -> torch.device:
    """This process's GPU (LOCAL_RANK) under a launcher; else the first GPU, else the CPU.

    Without LOCAL_RANK the reward models of all processes would be on the first GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that tensors can still take, those that torch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
