"""What a card computes at most, dense, as its maker says: for the share of it that a run makes use of."""

from typing import Final

import torch

# Name of the card, as torch gives it: operations a second in bf16 and, on plain float32 units, in fp32.
_PEAKS: Final = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, 35e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The most operations a second, or None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(card: str, precision: str) -> float | None:
    """The same by the name of a card: the longest that is part of it."""
    known = [name for name in _PEAKS if name in card]
    if not known or precision not in ("bf16", "fp32"):
        return None
    return _PEAKS[max(known, key=len)][0 if precision == "bf16" else 1]
