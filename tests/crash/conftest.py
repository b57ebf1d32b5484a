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
    """`harness.py` beside this file; tests are no package, so it cannot be imported by name."""
    spec = importlib.util.spec_from_file_location("crash_harness", Path(__file__).with_name("harness.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crash_harness"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory: hundreds of stores are written and thrown away, and none needs to outlive the machine."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="llmos-crash-", dir=memory) as folder:
        yield Path(folder)
