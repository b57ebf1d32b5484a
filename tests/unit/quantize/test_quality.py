from collections.abc import Callable

import numpy as np
import pytest

from llmos_cli.data.batches import TokenRows
from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Recipe
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.perplexity import perplexity
from llmos_cli.models.schemes import INT8
from llmos_cli.progress import Silent
from llmos_cli.quantize.quality import dataset_of, evaluate
from llmos_cli.quantize.run import Request, quantize
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref

Put = Callable[..., ObjectId]
OTHER = b'{"two": 2}'


def test_a_report_holds_what_was_measured_on_every_token(store: Store, put_model: Put, put_data: Put) -> None:
    model, data = put_model(), put_data()
    ref = parse_ref("tiny-eval")
    found = evaluate(store, model, data, ref=ref, progress=Silent())
    loaded = load_model(store, read_manifest(store, model))
    rows = TokenRows(store, read_manifest(store, data))
    expected = perplexity(loaded, (batch.input_ids for batch in rows.in_order(20)), progress=Silent())
    assert found.tokens == expected.tokens == 20 * 31 + 4
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found.bits_per_byte == pytest.approx(expected.loss / np.log(2) / 2.5, abs=1e-5)
    entry = read_ref(store, ref)
    assert entry is not None
    assert entry.id == found.id
    manifest = read_manifest(store, found.id)
    assert manifest.kind == "report"
    assert manifest.recipe is not None
    assert dict(manifest.recipe.inputs) == {"model": model, "data": data}


def test_the_same_question_is_answered_from_the_store(store: Store, put_model: Put, put_data: Put) -> None:
    model, data = put_model(), put_data()
    first = evaluate(store, model, data, max_rows=4, progress=Silent())
    again = evaluate(store, model, data, max_rows=4, progress=Silent())
    other = evaluate(store, model, data, max_rows=5, progress=Silent())
    assert (first.made_before, again.made_before, other.made_before) == (False, True, False)
    assert first.id == again.id != other.id
    assert (first.tokens, other.tokens, first.rows_total) == (4 * 31, 5 * 31, 20)


def test_a_limit_beyond_the_dataset_is_no_limit(store: Store, put_model: Put, put_data: Put) -> None:
    model, data = put_model(), put_data()
    whole = evaluate(store, model, data, progress=Silent())
    assert evaluate(store, model, data, max_rows=1000, progress=Silent()).id == whole.id


def test_rows_are_spread_over_the_dataset(store: Store, put_model: Put, put_data: Put) -> None:
    model, data = put_model(), put_data()
    found = evaluate(store, model, data, max_rows=3, batch=2, progress=Silent())
    rows = TokenRows(store, read_manifest(store, data)).row_batch(np.array([0, 6, 13]))
    expected = perplexity(load_model(store, read_manifest(store, model)), [rows], progress=Silent())
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)


def test_a_quantized_model_is_evaluated_too(store: Store, put_model: Put, put_data: Put) -> None:
    model, data = put_model(), put_data()
    small = quantize(store, model, Request(INT8), parse_ref("small"), progress=Silent())
    before = evaluate(store, model, data, progress=Silent())
    after = evaluate(store, small.id, data, progress=Silent())
    assert after.id != before.id
    assert after.loss == pytest.approx(before.loss, rel=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokenizer": OTHER}, "another tokenizer"),
        ({"vocab_size": 600}, "600 different tokens"),
        ({"seq_len": 65}, "rows of 65 tokens"),
    ],
)
def test_a_dataset_that_does_not_fit_the_model_is_refused(
    store: Store, put_model: Put, put_data: Put, wrong: dict[str, object], message: str
) -> None:
    model, data = put_model(), put_data(**wrong)
    with pytest.raises(UsageError, match=message):
        evaluate(store, model, data, ref=parse_ref("r"), progress=Silent())
    assert read_ref(store, parse_ref("r")) is None


def test_the_two_roles_cannot_be_swapped(store: Store, put_model: Put, put_data: Put) -> None:
    model, data = put_model(), put_data()
    with pytest.raises(UsageError, match="a dataset cannot be evaluated"):
        evaluate(store, data, model, progress=Silent())
    with pytest.raises(UsageError, match="is a model"):
        evaluate(store, model, model, progress=Silent())


def test_the_dataset_is_found_through_the_lineage(store: Store, put_model: Put, put_data: Put) -> None:
    data = put_data()
    trained = put_model(recipe=Recipe("train", inputs={"data": data}))
    small = quantize(store, trained, Request(INT8), parse_ref("small"), progress=Silent())
    assert dataset_of(store, read_manifest(store, trained)) == data
    assert dataset_of(store, read_manifest(store, small.id)) == data
    assert dataset_of(store, read_manifest(store, put_model("foreign"))) is None
