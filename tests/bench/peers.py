"""Who else can keep models, each behind the same three calls: start afresh, add a model, say how much is stored.

A model is a folder with safetensors files. Tools that can compare with a base are told which; llmos finds it by itself.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import Cost, missing, size_of, spend, version

LLMOS = [str(Path(sys.executable).with_name("llmos")), "-q"]

COPY = 'cp -r "$1" "$2" && find "$2" -exec sync {} +'
Add = Callable[[Path, str, Path | None], Cost]  # folder, label, the base's folder


@dataclass(frozen=True)
class Contender:
    """`start` makes its empty store in `folder`; of that, `stored` is what counts."""

    folder: Path
    start: Callable[[], object]
    add: Add
    stored: Path

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.start()

    def size(self) -> int:
        return size_of(self.stored)


def contenders(work: Path, venv: Path | None) -> dict[str, Contender]:
    """Those that are installed, the yardstick first; says which versions, and who is missing."""
    found = {"cp + fsync": _copy(work / "copy"), "llmos": _llmos(work / "llmos")}
    if not missing("restic"):
        print(version(["restic", "version"]))
        found["restic"] = _restic(work / "restic")
    if not missing("borg"):
        print(version(["borg", "--version"]), "with zstd,3")
        found["borg"] = _borg(work / "borg")
    if not missing("git-lfs"):
        print(version(["git-lfs", "version"]))
        found["git-lfs"] = _git_lfs(work / "git-lfs")
    for name, make in (("dvc", _dvc), ("zipnn", _zipnn)):
        if venv and (venv / "lib").is_dir() and any(venv.glob(f"lib/python*/site-packages/{name}")):
            python = str(venv / "bin/python")
            asked = f"from importlib.metadata import version; print('{name}', version('{name}'))"
            print(version([python, "-c", asked]))
            found[name] = make(work / name, venv / "bin")
        else:
            print(f"skipped: {name} is not in a virtual environment named by --peers-venv")
    found["XOR + zstd-3"] = _xor(work / "xor")
    found["XOR + planes + zstd-3"] = _xor(work / "bitx", "--planes")
    return found


def _copy(folder: Path) -> Contender:
    def add(model: Path, label: str, base: Path | None) -> Cost:
        return spend(["sh", "-c", COPY, "sh", str(model), str(folder / label)])

    return Contender(folder, lambda: None, add, folder)


def _llmos(folder: Path) -> Contender:
    llmos = [*LLMOS, "--store", str(folder / "store")]

    def add(model: Path, label: str, base: Path | None) -> Cost:
        return spend([*llmos, "add", str(model), label])

    return Contender(folder, lambda: spend([*llmos, "init"]), add, folder / "store")


def _restic(folder: Path) -> Contender:
    env = {"RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": str(folder / "cache")}
    restic = ["restic", "--repo", str(folder / "repository")]

    def add(model: Path, label: str, base: Path | None) -> Cost:
        return spend([*restic, "backup", "--tag", label, str(model)], env=env)

    return Contender(folder, lambda: spend([*restic, "init"], env=env), add, folder / "repository")


def _borg(folder: Path) -> Contender:
    env = {"BORG_BASE_DIR": str(folder / "base"), "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}
    repository = folder / "repository"

    def add(model: Path, label: str, base: Path | None) -> Cost:
        return spend(["borg", "create", "--compression", "zstd,3", f"{repository}::{label}", str(model)], env=env)

    return Contender(
        folder, lambda: spend(["borg", "init", "--encryption=none", str(repository)], env=env), add, repository
    )


def _git_lfs(folder: Path) -> Contender:
    tree = folder / "tree"

    def start() -> None:
        _git(tree)
        spend(["git", "lfs", "install", "--local"], tree)
        spend(["git", "lfs", "track", "*.safetensors"], tree)

    def add(model: Path, label: str, base: Path | None) -> Cost:
        _bring(model, tree / label)
        return spend(["sh", "-c", f"git add '{label}' && git commit -m '{label}'"], tree)

    return Contender(folder, start, add, tree / ".git")


def _dvc(folder: Path, programs: Path) -> Contender:
    tree, env = folder / "tree", {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / "site")}

    def start() -> None:
        _git(tree)
        spend([str(programs / "dvc"), "init"], tree, env)

    def add(model: Path, label: str, base: Path | None) -> Cost:
        _bring(model, tree / label)
        return spend([str(programs / "dvc"), "add", label], tree, env)

    return Contender(folder, start, add, tree / ".dvc")


def _git(tree: Path) -> None:
    tree.mkdir()
    spend(["git", "init"], tree)
    for key, value in {"user.name": "nobody", "user.email": "nobody@example.org", "gc.auto": "0"}.items():
        spend(["git", "config", key, value], tree)


def _bring(model: Path, target: Path) -> None:
    """Into a work tree, as these tools want it; not their work, so not in their time."""
    spend(["sh", "-c", COPY, "sh", str(model), str(target)])


def _zipnn(folder: Path, programs: Path) -> Contender:
    script = Path(__file__).with_name("with_zipnn.py")

    def add(model: Path, label: str, base: Path | None) -> Cost:
        dtype = "float32" if "fp32" in label else "bfloat16"
        python = str(programs / "python")
        words = [python, "-W", "ignore", str(script), str(folder / label), str(model), dtype]
        return spend([*words, *([str(base)] if base else [])])

    return Contender(folder, lambda: None, add, folder)


def _xor(folder: Path, *options: str) -> Contender:
    def add(model: Path, label: str, base: Path | None) -> Cost:
        against = ["--base", str(base)] if base else []
        words = [sys.executable, "-m", "tests.bench.xor", str(folder / label), str(model)]
        return spend([*words, *against, *options])

    return Contender(folder, lambda: None, add, folder)


def named(found: Mapping[str, Contender], names: str | None) -> dict[str, Contender]:
    """The yardstick, and those of a comma-separated list (all if none)."""
    wanted = {"cp + fsync", *(names.split(",") if names else found)}
    if unknown := wanted - found.keys():
        raise SystemExit(f"no such contender: {', '.join(sorted(unknown))}")
    return {name: contender for name, contender in found.items() if name in wanted}
