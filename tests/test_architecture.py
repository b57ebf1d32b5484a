"""The house rules, read from the source: floors, owners, no circles. Each message is the reason for its rule."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import llmos_cli

ROOT = Path(llmos_cli.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MAX_LINES = 500
FLOORS = {
    "": 0,
    "errors": 0,
    "progress": 0,
    "config": 0,
    "formats": 1,
    "store": 2,
    "remote": 3,
    "models": 3,
    "data": 4,
    "train": 5,
    "quantize": 5,
    "export": 5,
    "serve": 5,
    "ui": 6,
    "commands": 6,
    "app": 7,
    "__main__": 8,
}
TORCH_ROOMS = {"models", "data", "train", "quantize", "export", "serve"}
HEAVY = {"torch", "transformers", "accelerate", "fastapi", "uvicorn", "numba", "numpy", "rich", "sqlite3", "zstandard"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text("utf-8"), module)


def room(module: str) -> str:
    """The folder of a module, or its own name at the top: "store/refs/refs.py" -> "store", "app.py" -> "app"."""
    first = module.partition("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(module: str, *, typing: bool = True, functions: bool = True) -> Iterator[tuple[str, int]]:
    """The dotted names a module imports and their lines; `typing` counts those under TYPE_CHECKING."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def ours(name: str) -> str | None:
    """The file that a dotted name of ours comes from."""
    parts = name.split(".")
    if parts[0] != "llmos_cli":
        return None
    for length in range(len(parts), 0, -1):
        base = "/".join(parts[1:length])
        for file in (f"{base}.py", f"{base}/__init__.py" if base else "__init__.py"):
            if file in MODULES:
                return file
    return None


@cache
def attributes(module: str) -> list[tuple[str, int]]:
    """Every dotted name that is used ("os.environ", "path.unlink") and its line."""
    return [(ast.unparse(node), node.lineno) for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)]


@cache
def calls(module: str) -> list[tuple[str, int]]:
    """What is called, by its dotted name ("os.replace", "print"), and where."""
    found = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node.lineno) for node in found if isinstance(node.func, ast.Name | ast.Attribute)]


def test_a_module_imports_only_from_lower_floors_or_its_own_folder() -> None:
    broken = []
    for module in MODULES:
        here = room(module)
        for name, line in imports(module):
            target = ours(name)
            if target is None:
                continue
            there = room(target)
            allowed = there == here or FLOORS[there] < FLOORS[here] or (here, there) == ("commands", "ui")
            if FLOORS[here] == 0 and FLOORS[there] == 0:
                allowed = True
            if not allowed:
                broken.append(f"{module}:{line} imports {name}")
    assert not broken, f"floors keep every room usable and testable without those above it: {broken}"


def test_every_room_stands_on_a_floor() -> None:
    unknown = sorted({room(module) for module in MODULES} - FLOORS.keys())
    assert not unknown, f"a room without a floor escapes the rules; name it in FLOORS or move it: {unknown}"


def test_there_are_no_circles() -> None:
    graph = {
        module: {target for name, _ in imports(module, typing=False) if (target := ours(name)) and target != module}
        for module in MODULES
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle has no first module to understand: {' -> '.join((*path, module))}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_commands_do_not_import_each_other() -> None:
    broken = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        if room(module) == "commands"
        for name, line in imports(module)
        if name.startswith("llmos_cli.commands")
    ]
    assert not broken, f"what two verbs share belongs on a lower floor: {broken}"


OWNERS = {
    "blake3": ("formats/ids.py", "ids must come from one place"),
    "xxhash": ("formats/ids.py", "checksums must come from one place"),
    "zstandard": ("formats/codec.py", "one codec decides parameters and limits"),
    "numba": ("formats/loops.py", "it costs half a second to import, and numpy must be able to stand in"),
    "llvmlite": ("formats/kernels.py", "native code enters the process through one door"),
    "rich": ("ui/", "one place draws, so that everything else works without a terminal"),
    "typer": (
        ("app.py", "commands/", "ui/session.py", "ui/settings.py"),
        "below the commands nobody knows how llmos is called",
    ),
    "sqlite3": ("store/packs/index.py", "the index is a cache behind one door"),
    "accelerate": ("train/", "one loop prepares devices"),
    "obstore": ("remote/transports/objectstore.py", "what it does and how it fails is known in one place"),
    "cryptography": (("store/refs/keys.py", "store/oms.py"), "what counts as a good signature is decided once"),
    "model_signing": ("store/oms.py", "it brings its own keys, formats and errors"),
    "ray": ("data/on_ray.py", "how a cluster is begun, asked and left is decided once"),
    "fastapi": ("serve/", "HTTP stays in one room"),
}


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str) -> None:
    owners, why = OWNERS[library]
    broken = [
        f"{module}:{line}"
        for module in MODULES
        if not module.startswith(owners)
        for name, line in imports(module)
        if name.split(".")[0] == library
    ]
    assert not broken, f"{library} belongs to {owners}: {why}. Found in {broken}"


def test_only_durable_changes_names_on_disk() -> None:
    steps = {"fsync", "fdatasync", "rename", "renames", "unlink", "link", "symlink", "remove", "rmdir", "removedirs"}
    methods = {"unlink", "rename", "hardlink_to", "symlink_to", "rmdir"}
    broken = []
    for module in MODULES:
        if module == "store/disk/durable.py":
            continue
        for call, line in calls(module):
            if call == "self._client.rename" and module == "remote/transports/hdfs.py":
                continue  # on another machine
            owner, _, name = call.rpartition(".")
            if (owner == "os" and name in steps | {"replace"}) or (owner and name in methods):
                broken.append(f"{module}:{line} {call}")
            if owner == "shutil" and name in ("move", "rmtree", "copyfile", "copy", "copy2", "copytree"):
                broken.append(f"{module}:{line} {call}")
    assert not broken, f"the crash test stops at every step of store/disk/durable.py and sees no others: {broken}"


def test_only_app_reads_the_environment_and_exits() -> None:
    forbidden = {"os.environ", "os.getenv", "os.environb", "sys.exit", "os._exit", "os.putenv"}
    broken = [
        f"{module}:{line} {name}"
        for module in MODULES
        if module != "app.py"
        for name, line in attributes(module)
        if name in forbidden
    ]
    broken += [
        f"{module}:{line} {call}()"
        for module in MODULES
        if module != "app.py"
        for call, line in calls(module)
        if call in ("exit", "quit")
    ]
    assert not broken, f"plain values go in and errors come out; only app.py talks to the process: {broken}"


def test_only_ui_writes_to_the_console() -> None:
    broken = [f"{module}:{line} print" for module in MODULES for call, line in calls(module) if call == "print"]
    broken += [
        f"{module}:{line} {name}"
        for module in MODULES
        if room(module) not in ("ui", "app")
        for name, line in attributes(module)
        if name in ("sys.stdout", "sys.stderr")
    ]
    assert not broken, f"data and messages go through ui/, or --json and -q are lies: {broken}"


def test_accelerate_is_set_up_once() -> None:
    found = [f"{module}:{line}" for module in MODULES for call, line in calls(module) if call.endswith("Accelerator")]
    assert len(found) <= 1, f"two Accelerators disagree about device and precision: {found}"


def test_torch_stays_in_its_rooms() -> None:
    broken = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        if room(module) not in TORCH_ROOMS and module != "commands/doctor.py"
        for name, line in imports(module, typing=False)
        if name.split(".")[0] in ("torch", "transformers")
    ]
    assert not broken, f"the store works where torch is not wanted: {broken}"


def test_commands_import_nothing_heavy_at_the_top() -> None:
    broken = []
    for module in MODULES:
        if room(module) not in ("commands", "ui", "app", "errors", "progress"):
            continue
        for name, line in imports(module, typing=False, functions=False):
            target = ours(name)
            ours_heavy = target is not None and room(target) in TORCH_ROOMS | {"store", "remote"}
            if name.split(".")[0] in HEAVY or ours_heavy:
                broken.append(f"{module}:{line} imports {name}")
    assert not broken, f"--help and TAB must not wait for what they do not use; import it inside the function: {broken}"


def test_imports_are_absolute_and_name_what_they_take() -> None:
    broken = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names)):
                broken.append(f"{module}:{node.lineno}")
        broken += [
            f"{module}:{line}"
            for name, line in imports(module)
            if name.split(".")[0] == "click" or name.startswith("typer._")
        ]
    assert not broken, f"a reader must see where a name comes from, and private names of typer change: {broken}"


def test_folders_have_empty_init_files() -> None:
    broken = [
        module for module in MODULES if module.endswith("/__init__.py") and (ROOT / module).read_text("utf-8").strip()
    ]
    assert not broken, f"importing a folder must cost nothing: {broken}"


def test_modules_have_a_purpose_a_docstring_and_an_end() -> None:
    vague = [module for module in MODULES if Path(module).stem in ("utils", "util", "helpers", "misc", "common")]
    assert not vague, f"a module is named for what it knows: {vague}"
    silent = [
        module for module in MODULES if not module.endswith("__init__.py") and ast.get_docstring(tree(module)) is None
    ]
    assert not silent, f"a module says in one sentence what it is: {silent}"
    long = [
        f"{module}: {lines}"
        for module in MODULES
        if (lines := (ROOT / module).read_text("utf-8").count("\n")) > MAX_LINES
    ]
    assert not long, f"a module that does not fit in a head should be two (limit {MAX_LINES} lines): {long}"
