"""An engine straight out of the store: no checkout, and the time each part took."""

import time
from dataclasses import dataclass

from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.device import pick_device
from llmos_cli.models.load import load_model
from llmos_cli.models.tokenizers import load_tokenizer
from llmos_cli.progress import Progress
from llmos_cli.serve.engine import Engine
from llmos_cli.store.local import Store


@dataclass(frozen=True)
class Loaded:
    """An engine, the manifest it came from, where it computes, and the seconds for weights and tokenizer."""

    engine: Engine
    manifest: Manifest
    device: str
    model_seconds: float
    tokenizer_seconds: float


def load_engine(store: Store, manifest: Manifest, progress: Progress) -> Loaded:
    """Load weights and tokenizer."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(store, manifest)
    between = time.perf_counter()
    device = pick_device()
    model = load_model(store, manifest, device=device, progress=progress)
    engine = Engine(model, tokenizer)
    return Loaded(engine, manifest, str(device), time.perf_counter() - between, between - started)
