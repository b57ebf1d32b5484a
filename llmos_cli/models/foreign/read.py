"""Files of TensorFlow and Keras as arrays by name: HDF5 (.h5), Keras archives (.keras), checkpoints (.index)."""

import io
import json
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmos_cli.errors import Damaged, LlmosError, NotFound, UsageError, from_os_error
from llmos_cli.formats.tfbundle import Variable, read_bundle

_WEIGHTS: Final = "model.weights.h5"
_MOST_BYTES: Final = 1 << 36
_NUMPY: Final = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Foreign:
    """`kind` is "keras" or "tensorflow"; `folder` is where its config.json and vocabulary lie."""

    kind: str
    tensors: dict[str, np.ndarray]
    folder: Path


def read_foreign(kind: str, path: Path) -> Foreign:
    """Read weights; raises NotFound, UsageError or Damaged naming the file."""
    try:
        if kind == "tf":
            return _checkpoint(path)
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
        if zipfile.is_zipfile(path):
            return Foreign("keras", _archive(path), path.parent)
        return Foreign("keras", read_hdf5(path, str(path)), path.parent)
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc


def need_h5py() -> Any:
    """h5py, or the line that installs it."""
    if find_spec("h5py") is None:
        raise LlmosError("Keras' files need h5py, which is not installed", hint="pip install 'llmos[keras]'")
    import h5py

    return h5py


def read_hdf5(source: Any, where: str) -> dict[str, np.ndarray]:
    """Every dataset of numbers in an HDF5 file, by its path."""
    h5py = need_h5py()
    found: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            if item.external or item.is_virtual:
                raise Damaged(f"{where} keeps {name} in another file")
            found[name] = np.asarray(item[()], np.float32)

    try:
        with h5py.File(source, "r") as file:
            file.visititems(visit)  # follows neither links to other files nor any link twice
    except (OSError, KeyError, RuntimeError, ValueError) as exc:
        raise Damaged(f"{where} is not a readable HDF5 file: {' '.join(str(exc).split())[:200]}") from exc
    return found


def _archive(path: Path) -> dict[str, np.ndarray]:
    """The weights in a .keras archive, which is a zip; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            if _WEIGHTS not in archive.namelist():
                raise Damaged(f"{path} holds no {_WEIGHTS}")
            info = archive.getinfo(_WEIGHTS)
            if info.file_size > _MOST_BYTES:
                raise Damaged(f"{path}: {_WEIGHTS} would take {info.file_size:,} bytes")
            return read_hdf5(io.BytesIO(archive.read(info)), str(path))
    except (zipfile.BadZipFile, NotImplementedError) as exc:
        raise Damaged(f"{path} is not a readable archive: {exc}") from exc


def _checkpoint(path: Path) -> Foreign:
    """PREFIX, PREFIX.index, or a folder with one checkpoint in it."""
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            raise UsageError(f"{path} holds {len(found)} checkpoints", hint=f"name one: tf:{path}/NAME.ckpt")
        path = found[0]
    prefix = path.with_name(path.name.removesuffix(".index"))
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        raise NotFound(f"there is no checkpoint {prefix}: no {index.name}")
    bundle = read_bundle(index.read_bytes(), str(index))
    files = [prefix.with_name(f"{prefix.name}.data-{n:05}-of-{bundle.shards:05}") for n in range(bundle.shards)]
    tensors = {
        variable.name: _variable(files[variable.shard], variable)
        for variable in bundle.variables
        if variable.dtype in _NUMPY
    }
    return Foreign("tensorflow", tensors, prefix.parent)


def _variable(file: Path, variable: Variable) -> np.ndarray:
    if not file.is_file():
        raise NotFound(f"there is no {file}, where {variable.name} lies")
    with open(file, "rb") as opened:
        opened.seek(variable.offset)
        data = opened.read(variable.size)
    if len(data) < variable.size:
        raise Damaged(f"{file} ends within {variable.name}")
    values = np.frombuffer(data, _NUMPY[variable.dtype]).reshape(variable.shape)
    if variable.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def read_table(folder: Path, *names: str) -> dict[str, Any]:
    """The first of these JSON files that lies there."""
    for name in names:
        path = folder / name
        if path.is_file():
            try:
                table = json.loads(path.read_text("utf-8"))
            except ValueError as exc:
                raise Damaged(f"{path} is not JSON: {exc}") from exc
            if not isinstance(table, dict):
                raise Damaged(f"{path} is not a table")
            return table
    raise UsageError(f"{folder} holds no {' or '.join(names)}, which says how large the model is")
