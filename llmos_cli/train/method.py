"""How weights are moved, as names and numbers: optimizer, schedule, average, adapter. Checked without torch."""

import math
from typing import Any, Final

from llmos_cli.errors import UsageError

OPTIMIZERS: Final = ("adamw", "muon", "adafactor", "sgd", "schedule-free")
SCHEDULES: Final = ("cosine", "linear", "wsd", "constant")
DEFAULTS: Final[dict[str, Any]] = {
    "optimizer": "adamw",
    "schedule": "cosine",
    "ema": None,
    "checkpointing": False,
    "compile": False,
    "lora": None,
    "lora_alpha": None,
    "lora_targets": (),
}
MOST_RANK: Final = 4096


def check_method(values: dict[str, Any], *, from_model: bool) -> None:
    """Raise UsageError for a choice that is not there or that does not go with another."""
    for flag, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if values[flag] not in known:
            raise UsageError(f"--{flag} {values[flag]} is not offered", hint=f"use one of {', '.join(known)}")
    if values["optimizer"] == "schedule-free" and values["schedule"] not in ("constant", "cosine"):
        raise UsageError(
            f"--schedule {values['schedule']} does not go with schedule-free, which needs none", hint="leave it out"
        )
    if values["optimizer"] == "schedule-free" and values["ema"] is not None:
        raise UsageError("--ema does not go with schedule-free, which averages by itself", hint="leave it out")
    ema = values["ema"]
    if ema is not None and (type(ema) is not float or not 0 < ema < 1):
        raise UsageError(f"--ema {ema} is not a number between 0 and 1", hint="0.999 is usual")
    rank, alpha = values["lora"], values["lora_alpha"]
    if rank is None:
        if alpha is not None or values["lora_targets"]:
            raise UsageError("--lora-alpha and --lora-targets are for an adapter", hint="give its rank: --lora 8")
        return
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise UsageError(f"--lora {rank} is not a whole number from 1 to {MOST_RANK:,}")
    if alpha is not None and (type(alpha) is not float or not math.isfinite(alpha) or alpha <= 0):
        raise UsageError(f"--lora-alpha {alpha} is not a finite number above 0")
    if not from_model:
        raise UsageError("--lora trains an adapter for a model", hint="name it: --model REF")


def parse_targets(text: str) -> tuple[str, ...]:
    """Read --lora-targets: names of layers with commas between them."""
    return tuple(sorted({word.strip() for word in text.split(",") if word.strip()}))
