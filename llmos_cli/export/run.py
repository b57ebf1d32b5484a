"""Export: a stored model in the form that another program reads. A derived object: the second time it is there.

Imports no torch until there is something to compute.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Final

from llmos_cli import __version__
from llmos_cli.errors import Damaged, UsageError, from_os_error
from llmos_cli.export.card import CARD_FILE, FRONT_MATTER, Report, card, reports_of
from llmos_cli.export.markup import to_markdown
from llmos_cli.formats import canonical
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress
from llmos_cli.store.disk.durable import TEMP_PREFIX
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import Transaction, begin

GRAPHS: Final = ("onnx", "openvino", "pt2")  # graphs.py
FORMATS: Final = ("hf", "gguf", "keras", *GRAPHS)
LIBRARIES: Final = ("gguf", "transformers")
TEXTS: Final = (".json", ".jinja", ".txt", ".model", ".md")


@dataclass(frozen=True)
class Exported:
    """What was made: its id and manifest, and whether it was there before."""

    id: ObjectId
    manifest: Manifest
    made_before: bool


def export(
    store: Store, source: ObjectId, label: str, fmt: str, kind: str | None, ref: RefName | None, *, progress: Progress
) -> Exported:
    """Make (or find) the export of a model; `kind` is the type of GGUF weights. Raises UsageError, LlmosError or
    Damaged; nothing changes then."""
    manifest = read_manifest(store, source)
    if manifest.kind not in ("model", "checkpoint"):
        raise UsageError(f"{label} is a {manifest.kind}, not a model", hint="llmos ls shows what there is")
    params: dict[str, Json] = {"format": fmt}
    if kind:
        params["type"] = kind
    libraries = {name: version(name) for name in LIBRARIES if fmt == "gguf" and _installed(name)}
    if fmt in GRAPHS:
        from llmos_cli.export.graphs import tools

        libraries = tools(fmt)
    inputs = {"model": source}
    reports = reports_of(store, source) if fmt == "hf" and manifest.file(CARD_FILE) is None else ()
    inputs |= {f"report {number}": report.id for number, report in enumerate(reports)}
    recipe = Recipe("export", params=params, inputs=inputs, tools={"llmos": __version__} | libraries)
    with begin(store, purpose="export", ref=ref) as tx:
        made = find_made(store, recipe)
        if made is not None:
            result = read_manifest(store, made)
        elif fmt == "hf":
            result = Manifest("model", _hf_files(tx, source, manifest, label, reports), {"format": "hf"}, recipe)
        elif fmt == "keras":
            result = _keras(tx, manifest, recipe, progress)
        elif fmt in GRAPHS:
            result = _graph(tx, manifest, fmt, recipe, progress)
        else:
            result = _gguf(tx, manifest, kind, recipe, progress)
        commit = tx.commit(result, message=f"export: {fmt}")
    return Exported(commit.id, result, made is not None)


def _hf_files(
    tx: Transaction, source: ObjectId, manifest: Manifest, label: str, reports: tuple[Report, ...]
) -> tuple[FileEntry, ...]:
    """The folder as others load it: without what only training needs, with a card if the model brings none."""
    files = [entry for entry in manifest.files if not entry.path.startswith("training/")]
    if manifest.file(CARD_FILE) is None:
        text = FRONT_MATTER + to_markdown(card(tx.store, source, label, reports))
        files.append(tx.add_bytes(CARD_FILE, text.encode()))
    return tuple(files)


def _keras(tx: Transaction, manifest: Manifest, recipe: Recipe, progress: Progress) -> Manifest:
    """A folder as TensorFlow's BERT of transformers was saved; its weights are read back and compared."""
    from llmos_cli.export.keras import KERAS_FILE, keras_file
    from llmos_cli.models.weights import load_state_dict

    config = canonical.loads(_text(tx.store, manifest, "config.json") or b"{}", "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "bert":
        raise UsageError("--format keras is for BERT", hint="use --format hf")
    state = {
        name: value.float().numpy() for name, value in load_state_dict(tx.store, manifest, progress=progress).items()
    }
    files = [entry for entry in manifest.files if "/" not in entry.path and not entry.path.startswith("model")]
    files.append(tx.add_bytes(KERAS_FILE, keras_file(state)))
    parameters = sum(value.size for value in state.values())
    return Manifest("model", tuple(files), {"format": "keras", "parameters": parameters}, recipe)


def _graph(tx: Transaction, manifest: Manifest, fmt: str, recipe: Recipe, progress: Progress) -> Manifest:
    """The graph, and the texts that go with a model."""
    from llmos_cli.export.graphs import export_graph

    store = tx.store
    texts = [entry for entry in manifest.files if "/" not in entry.path and entry.path.endswith(TEXTS)]
    try:
        with TemporaryDirectory(dir=store.tmp, prefix=TEMP_PREFIX) as name:
            parity = export_graph(store, manifest, fmt, Path(name), progress=progress)
            files = [tx.add_path(path.name, path) for path in sorted(Path(name).iterdir())]
    except OSError as exc:
        raise from_os_error(exc, f"writing in {store.tmp}") from exc
    meta: dict[str, Json] = {"format": fmt, "parity": parity.facts(), "loads_in": dict(recipe.tools)}
    return Manifest("model", (*texts, *files), meta, recipe)


def _gguf(tx: Transaction, manifest: Manifest, kind: str | None, recipe: Recipe, progress: Progress) -> Manifest:
    from llmos_cli.export.gguf import plan_gguf, write_gguf
    from llmos_cli.export.parity import compare
    from llmos_cli.export.tokens import read_vocabulary

    store = tx.store
    plan = plan_gguf(store, manifest, kind)
    texts = {name: _text(store, manifest, name) for name in ("tokenizer.json", "tokenizer_config.json")}
    if texts["tokenizer.json"] is None:
        raise UsageError("the model has no tokenizer.json, which a GGUF file holds", hint="add one, or use --format hf")
    settings = canonical.loads(texts["tokenizer_config.json"] or b"{}", "tokenizer_config.json")
    if not isinstance(settings, dict):
        raise Damaged("tokenizer_config.json is not a table")
    template = _text(store, manifest, "chat_template.jinja")
    chat = template.decode("utf-8") if template else settings.get("chat_template")
    vocabulary = read_vocabulary(
        canonical.loads(texts["tokenizer.json"], "tokenizer.json"),
        settings,
        chat if isinstance(chat, str) else None,
        plan.config.vocab_size,
    )
    try:
        with NamedTemporaryFile(dir=store.tmp, prefix=TEMP_PREFIX, suffix=".gguf") as file:
            path = Path(file.name)
            with progress.task("exporting", total=plan.nbytes) as task:
                write_gguf(store, manifest, plan, vocabulary, path, name=plan.family.arch.lower(), task=task)
            parameters = sum(_count(weight.shape) for weight in plan.weights)
            parity = compare(store, manifest, path, parameters=parameters, progress=progress)
            entry = tx.add_path(f"model-{plan.type}.gguf", path)
    except OSError as exc:
        raise from_os_error(exc, f"writing in {store.tmp}") from exc
    if parity.reason:
        progress.warn(f"what was exported was not compared with the model: {parity.reason}")
    meta: dict[str, Json] = {"format": "gguf", "type": plan.type, "parameters": parameters, "parity": parity.facts()}
    return Manifest("model", (entry,), meta, recipe)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _text(store: Store, manifest: Manifest, name: str) -> bytes | None:
    entry = manifest.file(name)
    return None if entry is None else read_file(store, entry)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
