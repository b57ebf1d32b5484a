from collections.abc import Callable
from functools import partial

import pytest
from stored_models import put_data, root, store, tokenizer
from stored_models import put_model as put_plain

from llmos_cli.formats.ids import ObjectId

__all__ = ["put_data", "put_plain", "root", "store", "tokenizer"]


@pytest.fixture
def put_model(put_plain: Callable[..., ObjectId]) -> Callable[..., ObjectId]:
    """Commit a random model with weights of a size that matters."""
    return partial(put_plain, noise=0.05)
