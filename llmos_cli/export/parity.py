"""Whether what was exported still is the model: both answer the same prompts, and the answers are compared.

The exported file is read by transformers, which unpacks it; llama.cpp itself is asked where its Python package is
installed and the tests say so.
"""

import contextlib
import copy
import io
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

from llmos_cli.formats.canonical import Json
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.config import one_line
from llmos_cli.models.load import load_model
from llmos_cli.models.quiet import quiet
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store

PROMPTS: Final = 8
LENGTH: Final = 64
MOST_PARAMETERS: Final = 1_000_000_000  # both models are held in float32 at once


@dataclass(frozen=True)
class Parity:
    """Of the next tokens the share that both hold most likely, and the mean KL divergence in nats of what was exported
    from the model; or the `reason` why it was not measured."""

    same_top: float | None = None
    kl: float | None = None
    reason: str | None = None

    def facts(self) -> dict[str, Json]:
        return {"same_top": self.same_top, "kl": self.kl, "reason": self.reason}


def compare(store: Store, manifest: Manifest, file: Path, *, parameters: int, progress: Progress) -> Parity:
    """Compare the stored model with a GGUF file on PROMPTS rows of LENGTH random token ids."""
    if parameters > MOST_PARAMETERS:
        return Parity(reason=f"the model has more than {MOST_PARAMETERS:,} parameters")
    if find_spec("accelerate") is None or find_spec("gguf") is None:
        return Parity(reason="the packages to read it back are not installed")
    from transformers import AutoModelForCausalLM

    ours = load_model(store, manifest, dtype=torch.float32, progress=progress)
    config = ours.config
    length = min(LENGTH, int(getattr(config, "max_position_embeddings", LENGTH)))
    ids = torch.randint(0, config.vocab_size, (PROMPTS, length), generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    theirs, problem = None, ""
    for known in ({}, {"config": plain}):  # its reader overlooks some settings of some kinds, and then wants them told
        # It also draws a bar of its own.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
            try:
                theirs = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True, **known
                )
                break
            except (ValueError, NotImplementedError, KeyError, OSError, ImportError, RuntimeError) as exc:
                problem = one_line(exc)
    if theirs is None:
        return Parity(reason=f"transformers does not read it: {problem}")
    with torch.inference_mode(), quiet():
        return agreement(*(model(input_ids=ids, use_cache=False).logits for model in (ours, theirs)))


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> Parity:
    """Compare logits."""
    a, b = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    kl = float((a.exp() * (a - b)).sum(-1).mean())
    same = float((a.argmax(-1) == b.argmax(-1)).float().mean())
    return Parity(round(same, 4), float(f"{kl:.3g}") if math.isfinite(kl) else None)
