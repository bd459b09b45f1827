"""Where a model of this process's own belongs, when nobody prepares it."""

import os

import torch


def default_device() -> torch.device:
    """This process's GPU under a launcher that starts one process a GPU; else the first GPU, else the CPU.

    Without asking the launcher, the reward models of all processes would meet on the first GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
