import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    return _beside("harness")


@pytest.fixture(scope="session")
def tracing() -> ModuleType:
    return _beside("tracer")


def _beside(name: str) -> ModuleType:
    """A module beside this file; tests are no package, so it cannot be imported by name."""
    spec = importlib.util.spec_from_file_location(f"crash_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory: hundreds of stores are written and thrown away, and none needs to outlive the machine."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="llmos-crash-", dir=memory) as folder:
        yield Path(folder)
