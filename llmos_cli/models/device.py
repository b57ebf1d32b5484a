"""Where tensors live: the accelerator if there is one, else the CPU. Knows nothing of models."""

import torch


def pick_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
