"""`llmos doctor`: what this machine has, ready to be pasted into a report."""

from typing import TYPE_CHECKING, Any

import typer

from llmos_cli import __version__
from llmos_cli.errors import LlmosError, NotFound
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural, size

if TYPE_CHECKING:
    from llmos_cli.store.disk.features import Disk

LIBRARIES = (
    "accelerate",
    "blake3",
    "fastapi",
    "numpy",
    "pyfastcdc",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
    "xxhash",
    "zstandard",
)


def doctor(ctx: typer.Context) -> None:
    """Check Python, libraries, devices, memory, disk and file system.

    Nothing is guessed: each feature of the file system under the store (or the current folder) is tried in a temporary
    folder. Exits 1 if something that llmos needs does not work. The report holds no secrets.

    Examples:
      llmos doctor
      llmos --store /mnt/nfs/store doctor
      llmos doctor --json
    """
    import platform

    from llmos_cli.store.disk.features import probe_disk, probe_machine

    here = session(ctx)
    try:
        store = here.find_store()
    except NotFound:
        store = None
    machine = probe_machine()
    libraries = {name: _version(name) for name in LIBRARIES}
    devices, problems = _devices()
    problems += [f"the library {name} is not installed" for name, version in libraries.items() if version is None]
    disk: Disk | None = None
    try:
        disk = probe_disk(store / "tmp" if store else here.cwd)
        problems += [f"{item.name}: {item.detail}" for item in disk.features if item.needed and not item.works]
    except LlmosError as exc:
        problems.append(exc.message)
    report: dict[str, Any] = {
        "llmos": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": machine.cores,
        "usable_cores": machine.usable_cores,
        "memory": machine.memory,
        "memory_available": machine.available,
        "libraries": libraries,
        "devices": devices,
        "store": str(store) if store else None,
        "disk": _disk(disk) if disk else None,
        "problems": problems,
    }
    here.out.result(report)
    line = here.out.line
    line(f"llmos    {__version__}, Python {platform.python_version()}")
    line(f"system   {platform.platform()}")
    line(f"cores    {machine.usable_cores} usable of {machine.cores}")
    line(f"memory   {size(machine.available)} available of {size(machine.memory)}")
    for device in devices:
        detail = f", {size(device['memory'])}" if device["memory"] else ""
        line(f"device   {device['type']}: {device['name']}{detail}")
    line(f"store    {store or 'none found; llmos init makes one'}")
    if disk:
        line(f"disk     {size(disk.free)} free of {size(disk.total)}, {disk.filesystem}, at {disk.folder}")
        for feature in disk.features:
            mark = "ok" if feature.works else "NO" if feature.needed else "no"
            line(f"  {mark}  {feature.name}" + (f" ({feature.detail})" if feature.detail else ""))
    line("libraries")
    for name, version in libraries.items():
        line(f"  {name:<12}  {version or 'MISSING'}")
    if problems:
        raise LlmosError(f"{plural(len(problems), 'problem')}: {'; '.join(problems)}")
    here.out.say("all that llmos needs works here")


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> tuple[list[dict[str, Any]], list[str]]:
    """What torch can compute on; a torch that does not load is a problem, not a crash."""
    import platform

    devices: list[dict[str, Any]] = [{"type": "cpu", "name": platform.machine(), "memory": None}]
    try:
        import torch
    except (ImportError, OSError) as exc:
        return devices, [f"torch does not load: {exc}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        devices.append({"type": f"cuda:{index}", "name": found.name, "memory": found.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"type": "mps", "name": "Apple GPU", "memory": None})
    return devices, []


def _disk(disk: "Disk") -> dict[str, Any]:
    return {
        "folder": str(disk.folder),
        "filesystem": disk.filesystem,
        "total": disk.total,
        "free": disk.free,
        "features": {
            item.name: {"works": item.works, "needed": item.needed, "detail": item.detail} for item in disk.features
        },
    }
