"""A model as a graph that runs without its Python code: torch.export's own file, ONNX, OpenVINO's IR.

Experimental, as those exporters are. The graph takes `input_ids` [batch, tokens] of any size and gives the logits, in
float32, without a cache of what came before. Whether it still is the model is found out by running it.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from llmos_cli.errors import LlmosError, UsageError
from llmos_cli.export.parity import LENGTH, PROMPTS, Parity, agreement
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.config import load_config, one_line
from llmos_cli.models.heads import head_of
from llmos_cli.models.load import load_model
from llmos_cli.models.quiet import quiet
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store

Run = Callable[[torch.Tensor], torch.Tensor]
_EXAMPLE: Final = (2, 16)


@dataclass(frozen=True)
class Graph:
    """How a program is written as `file`, and run again from it; `packages` do that, the first of them runs it."""

    file: str
    packages: tuple[str, ...]
    write: Callable[[Any, Path], None]
    run: Callable[[Path], Run]


class _Plain(nn.Module):
    """A model as a function of token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids).logits
        return logits


def export_graph(store: Store, manifest: Manifest, fmt: str, folder: Path, *, progress: Progress) -> Parity:
    """Write the graph of a stored model into a folder, run it, and compare. Raises UsageError for a quantized model or
    a missing package, LlmosError for a model that cannot be written so."""
    graph = GRAPHS[fmt]
    check_graph(store, manifest, fmt)
    config = load_config(store, manifest)
    model = load_model(store, manifest, dtype=torch.float32, head=head_of(config), progress=progress)
    model.config.use_cache = False
    plain = _Plain(model.eval())
    draw = torch.Generator().manual_seed(0)
    vocab, length = int(config.vocab_size), min(LENGTH, int(getattr(config, "max_position_embeddings", LENGTH)))
    example = torch.randint(0, vocab, _EXAMPLE, generator=draw)
    prompts = torch.randint(0, vocab, (PROMPTS, length), generator=draw)
    free = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    try:
        with progress.task("tracing", total=None), _silent(), torch.no_grad():
            program = torch.export.export(plain, (example,), dynamic_shapes=free)
            graph.write(program, folder / graph.file)
            theirs = graph.run(folder / graph.file)(prompts)
    except Exception as exc:  # each exporter has errors of its own
        raise LlmosError(
            f"a {config.model_type} model cannot be written as {fmt}: {one_line(exc)[:200]}", hint="use --format hf"
        ) from exc
    with torch.inference_mode(), quiet():
        return agreement(plain(prompts), theirs)


def check_graph(store: Store, manifest: Manifest, fmt: str) -> None:
    """Raise UsageError for what can be known before any work."""
    missing = [package for package in GRAPHS[fmt].packages if find_spec(package) is None]
    if missing:
        raise UsageError(f"--format {fmt} needs the package {missing[0]}", hint=f"pip install 'llmos[{fmt}]'")
    if getattr(load_config(store, manifest), "quantization_config", None) is not None:
        raise UsageError(
            f"the model is quantized, which --format {fmt} cannot hold",
            hint="use --format hf or gguf, or export the model it was made from",
        )


def tools(fmt: str) -> dict[str, str]:
    """What writes and runs a graph, with versions."""
    found = {}
    for package in ("torch", "transformers", *GRAPHS[fmt].packages):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Exporters log what they skip."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet():
            yield
    finally:
        logging.disable(before)


def _write_pt2(program: Any, path: Path) -> None:
    torch.export.save(program, path)


def _run_pt2(path: Path) -> Run:
    module: Run = torch.export.load(path).module()
    return module


def _write_onnx(program: Any, path: Path) -> None:
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    if made is None:
        raise ValueError("the exporter gave nothing")
    for node in made.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    made.save(path)


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


def _write_openvino(program: Any, path: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(program), path, compress_to_fp16=False)


def _run_openvino(path: Path) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU")
    return lambda ids: torch.from_numpy(compiled([ids.numpy()])[0])


GRAPHS: Final = {
    "onnx": Graph("model.onnx", ("onnxruntime", "onnxscript", "onnx"), _write_onnx, _run_onnx),
    "openvino": Graph("model.xml", ("openvino",), _write_openvino, _run_openvino),
    "pt2": Graph("model.pt2", (), _write_pt2, _run_pt2),
}
