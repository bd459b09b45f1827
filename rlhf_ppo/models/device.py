"""The default device of models that Accelerate does not prepare, such as reward models."""

import os

import torch


def default_device() -> torch.device:
    """This process's GPU (LOCAL_RANK) under a launcher; else the first GPU, else the CPU.

    Without LOCAL_RANK the reward models of all processes would be on the first GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
