import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmos_cli.app import main
from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.schemes import int4
from llmos_cli.progress import Silent
from llmos_cli.quantize.against import hold_against
from llmos_cli.quantize.divergence import diverge
from llmos_cli.quantize.run import Request, quantize
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref

Put = Callable[..., ObjectId]


def test_the_numbers_are_those_of_the_definition(store: Store, put_model: Put) -> None:
    first = load_model(store, read_manifest(store, put_model("a")))
    second = load_model(store, read_manifest(store, put_model("b", change=_scaled)))
    rows = np.random.default_rng(0).integers(0, 512, (3, 16))
    found = diverge(first, second, rows, batch=2, progress=Silent())
    with torch.inference_mode():
        p, q = (model(torch.from_numpy(rows)).logits[:, :-1].double().log_softmax(-1) for model in (first, second))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    targets = torch.from_numpy(rows)[:, 1:, None]
    assert found.tokens == 3 * 15
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_max == found.kl_999 == pytest.approx(float(kl.max()), rel=1e-3)
    assert found.same_top == float((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert found.reference_loss == pytest.approx(-float(p.gather(-1, targets).mean()), rel=1e-5)
    assert found.loss == pytest.approx(-float(q.gather(-1, targets).mean()), rel=1e-5)


def test_what_is_not_learned_does_not_count(store: Store, put_model: Put) -> None:
    first = load_model(store, read_manifest(store, put_model("a")))
    second = load_model(store, read_manifest(store, put_model("b", change=_scaled)))
    rows = np.random.default_rng(0).integers(0, 512, (3, 16))
    learned = np.ones((3, 16), bool)
    learned[:, 10:] = False
    found = diverge(first, second, rows, learned=learned, batch=2, progress=Silent())
    short = diverge(first, second, rows[:, :10], batch=2, progress=Silent())
    assert found.tokens == short.tokens == 3 * 9
    assert found.kl_mean == pytest.approx(short.kl_mean, rel=1e-3)
    assert found.loss == pytest.approx(short.loss, rel=1e-5)


def test_documents_of_a_row_do_not_see_each_other(store: Store, put_model: Put) -> None:
    first = load_model(store, read_manifest(store, put_model("a")))
    second = load_model(store, read_manifest(store, put_model("b", change=_scaled)))
    rows = np.random.default_rng(0).integers(0, 512, (3, 16))
    positions = np.tile(np.arange(8), (3, 2))
    learned = positions > 0
    packed = diverge(first, second, rows, learned=learned, positions=positions, batch=2, progress=Silent())
    apart = diverge(first, second, rows.reshape(6, 8), batch=2, progress=Silent())
    assert packed.tokens == apart.tokens == 6 * 7
    assert packed.kl_mean == pytest.approx(apart.kl_mean, rel=1e-3)
    assert packed.loss == pytest.approx(apart.loss, rel=1e-5)


def _scaled(state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if "mlp" in name:
            tensor.mul_(4)


def test_a_model_is_what_it_is_against_itself(store: Store, put_model: Put, put_data: Put) -> None:
    model, data = put_model(), put_data()
    found = hold_against(store, model, model, data, max_rows=4, progress=Silent())
    assert (found.kl_mean, found.same_top, found.ratio, found.rows) == (0.0, 1.0, 1.0, 4)
    again = hold_against(store, model, model, data, max_rows=4, progress=Silent())
    assert (again.id, again.made_before) == (found.id, True)


def test_a_dataset_must_fit_both(store: Store, put_model: Put, put_data: Put) -> None:
    other = put_model("other", files={"tokenizer.json": b'{"two": 2}'})
    with pytest.raises(UsageError, match="another tokenizer"):
        hold_against(store, put_model(), other, put_data(), max_rows=4, progress=Silent())


def test_a_pipeline_can_gate_on_the_ratio(
    root: Path, store: Store, put_model: Put, put_data: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    source = put_model(change=_scaled)
    put_data()
    quantize(store, source, Request(int4(), "rtn"), parse_ref("small"), progress=Silent())
    call = ["--store", str(root), "eval", "small", "--data", "web", "--against", "tiny", "--max-rows", "8", "--json"]
    assert main([*call, "--max-ppl-ratio", "2"]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["kl_mean"] > 0
    assert read_ref(store, parse_ref("small-eval")) is not None
    assert main([*call, "--max-ppl-ratio", str(report["ppl_ratio"] - 1e-9)]) == 1
    assert "times that of tiny:latest" in capfd.readouterr().err
    assert main(["--store", str(root), "eval", "small", "--data", "web", "--max-ppl-ratio", "2"]) == 2
    assert "--against REF" in capfd.readouterr().err
