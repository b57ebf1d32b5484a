import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmos_cli.data.make import Request, make_dataset
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.train.config import Options
from llmos_cli.train.plan import make_plan
from llmos_cli.train.run import run

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Steps of a tiny model take longer to hand out to threads than to compute, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the datasets `text` (rows of 32) and `other` (another tokenizer) and the model `parent`."""
    root = tmp_path_factory.mktemp("made") / ".llmos"
    init_store(root)
    source = root.parent / "text.txt"
    source.write_text("\n".join(f"{n} squared is {n * n}, and {n} halved is {n / 2}." for n in range(600)))
    with open_store(root) as store:
        for name, vocab in (("text", 300), ("other", 290)):
            request = Request((str(source),), f"train:{vocab}", 32, 1 << 20)
            make_dataset(store, parse_ref(name), request, progress=Silent())
        plan = make_plan(store, "parent", data="text", model=None, options=Options(steps=2, batch=2, config=LLAMA))
        run(store, plan, progress=Silent())
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copytree(made, tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened
