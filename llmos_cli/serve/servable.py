"""Whether a stored object can answer at all: asked of its manifest, before anything heavy is loaded. No torch."""

from typing import Final

from llmos_cli.errors import UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.resolve import Resolved

KINDS: Final = ("model", "checkpoint", "adapter")
KERNELS: Final = ("dynamic", "packed", "dense")
DTYPES: Final = ("fp32", "bf16")


def check_servable(store: Store, found: Resolved) -> Manifest:
    """The manifest, if it holds something that answers; raises UsageError naming what it is instead."""
    manifest = read_manifest(store, found.id)
    if manifest.kind not in KINDS:
        raise UsageError(
            f"{found.label} is of kind {manifest.kind}, and only a model or a checkpoint can answer",
            hint="llmos ls shows what is what",
        )
    return manifest


def check_pins(kernel: str | None, dtype: str | None) -> None:
    """Raise UsageError for names of kernels and dtypes that there are not."""
    for option, value, known in (("--kernel", kernel, KERNELS), ("--dtype", dtype, DTYPES)):
        if value is not None and value not in known:
            raise UsageError(f"{option} {value!r} is unknown", hint=f"choose one of {', '.join(known)}")
