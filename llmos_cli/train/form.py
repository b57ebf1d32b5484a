"""In what form a run's weights are stored: a whole model's, or an adapter's beside the files of its base."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from llmos_cli.formats.canonical import Json
from llmos_cli.formats.manifest import FileEntry
from llmos_cli.models.weights import drop_tied


@dataclass(frozen=True)
class Form:
    """`weights` gives the tensors of `file` as they are now; `entries` are files that never change, `meta` what the
    manifest says besides."""

    file: str = "model.safetensors"
    weights: Callable[[PreTrainedModel], dict[str, torch.Tensor]] = drop_tied
    entries: tuple[FileEntry, ...] = ()
    meta: Mapping[str, Json] = field(default_factory=dict)
