"""Every task in a store: what is asked of a model, that parts do not change it, that runs end in one id, that the
results load in transformers."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator

from llmos_cli.data.make import Request, make_dataset
from llmos_cli.errors import Interrupted, LlmosError, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.tokenizers import load_tokenizer
from llmos_cli.models.weights import load_state_dict
from llmos_cli.progress import Silent
from llmos_cli.store.checkout import execute_checkout, plan_checkout
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.train.build import build
from llmos_cli.train.config import Options
from llmos_cli.train.device import open_accelerator
from llmos_cli.train.loop import accumulate_gradients
from llmos_cli.train.plan import Plan, make_plan
from llmos_cli.train.result import Trained
from llmos_cli.train.run import Started, run
from llmos_cli.train.tasks.masked import Masking
from llmos_cli.train.tasks.opened import open_task
from llmos_cli.train.tasks.work import IGNORED, Task

SEQ = 24
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "dropout_rate": 0.1,
}
TASKS = ("mlm", "classify", "pair", "scores", "seq2seq")


def records() -> dict[str, list[dict[str, Any]]]:
    """Small worlds that can be learned: good words and bad ones, equal texts, digits spelled out."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    good, bad = ("fine", "lovely", "clean"), ("awful", "dirty", "broken")
    draw = np.random.default_rng(0)
    plain, pairs, scores, spelled = [], [], [], []
    for number in range(240):
        kind = number % 2
        said = (bad, good)[kind][number % 3]
        plain.append(
            {"text": f"the room {number % 7} was {said} " + "x " * int(draw.integers(0, 4)), "label": str(kind)}
        )
        said = words[number % 8]
        pairs.append({"first": f"say {said}", "second": ("no", "yes")[kind], "label": ("refused", "said")[kind]})
        scores.append({"first": f"say {said}", "second": "high" if kind else "low", "label": ("0.25", "0.75")[kind]})
        digits = [number % 8, (number // 8) % 8]
        spelled.append({"source": " ".join(map(str, digits)), "target": " ".join(words[d] for d in digits)})
    return {"classify": plain, "pair": pairs, "scores": scores, "seq2seq": spelled}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks") / ".llmos"
    init_store(root)
    worlds = records()
    for name, rows in worlds.items():
        (root.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root.parent / "mlm.txt").write_text("\n\n".join(row["text"] for row in worlds["classify"]))
    with open_store(root) as store:
        request = Request((str(root.parent / "classify.jsonl"),), "train:300", SEQ, 1 << 20, task="mlm")
        make_dataset(store, parse_ref("mlm"), request, progress=Silent())
        for name in worlds:
            task = "pair" if name == "scores" else name
            tokenizer = "train:270" if name == "seq2seq" else "mlm"
            request = Request((str(root.parent / f"{name}.jsonl"),), tokenizer, SEQ, 1 << 20, task=task)
            make_dataset(store, parse_ref(name), request, progress=Silent())
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copytree(made, tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with open_accelerator("fp32") as built:
        yield built


def plan_of(store: Store, data: str, options: Options, **more: Any) -> Plan:
    return make_plan(store, more.pop("name", "m"), data=data, model=more.pop("model", None), options=options, **more)


def options_for(task: str, **more: Any) -> Options:
    new = {"config": T5} if task == "seq2seq" else {"depth": 1}
    return Options(**({"steps": 4, "batch": 8, "lr": 3e-3} | new | more))


def opened(store: Store, data: str, **more: Any) -> tuple[Plan, Any, Task]:
    plan = plan_of(store, data, options_for(data), **more)
    model = build(store, plan, Silent()).model.eval()  # without dropout
    return plan, model, open_task(store, plan.data, model, seed=0, progress=Silent())


def go(store: Store, data: str, options: Options, **more: Any) -> Trained:
    return run(store, plan_of(store, data, options, **more), progress=Silent())


@pytest.mark.parametrize("task", TASKS)
def test_parts_do_not_change_loss_or_gradient(store: Store, accelerator: Accelerator, task: str) -> None:
    _, model, opened_task = opened(store, task)
    work = opened_task.work(8, np.arange(8))
    found = []
    for parts in (1, 4):
        model.zero_grad()
        loss = accumulate_gradients(accelerator, model, work, parts)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(grads)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_what_transformers_computes(store: Store, accelerator: Accelerator, task: str) -> None:
    """On one example, where every way of weighting agrees."""
    _, model, opened_task = opened(store, task)
    work = opened_task.work(0, np.arange(1))
    loss = accumulate_gradients(accelerator, model, work, 1)
    inputs = {name: torch.from_numpy(value) for name, value in work.inputs.items()}
    assert loss.item() == pytest.approx(model(**inputs, labels=torch.from_numpy(work.targets)).loss.item(), abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_ends_in_the_same_id(store: Store, task: str) -> None:
    root = store.root.with_name("again")
    shutil.copytree(store.root, root)
    steps = options_for(task, steps=8, accumulate=2)
    straight = go(store, task, steps, save_every=3)
    with open_store(root, Silent()) as again:
        with pytest.raises(Interrupted):
            run(again, plan_of(again, task, steps, save_every=2), progress=_Stops(3))
        plan = plan_of(again, task, steps, resume=True)
        assert plan.start == 3
        resumed = run(again, plan, progress=Silent())
    assert (resumed.id, resumed.loss) == (straight.id, straight.loss)


@pytest.mark.parametrize("task", TASKS)
def test_it_learns(store: Store, task: str) -> None:
    done = go(store, task, options_for(task, steps=40))
    assert done.log is not None
    losses = [json.loads(line)["loss"] for line in done.log.read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])


class _Stops(Silent):
    """Asks for a stop while the `at`-th step is reported."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> Any:
        return nullcontext(self) if label == "training" else super().task(label, total=total, unit=unit)

    def advance(self, amount: int = 1) -> None:
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        pass


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        ("mlm", transformers.AutoModelForMaskedLM),
        ("classify", transformers.AutoModelForSequenceClassification),
        ("scores", transformers.AutoModelForSequenceClassification),
        ("seq2seq", transformers.AutoModelForSeq2SeqLM),
    ],
)
def test_transformers_loads_what_is_committed(store: Store, tmp_path: Path, task: str, auto: Any) -> None:
    done = go(store, task, options_for(task, steps=1))
    folder = tmp_path / "out"
    execute_checkout(store, plan_checkout(read_manifest(store, done.id), folder, force=False), Silent())
    model, report = auto.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    if task == "classify":
        assert model.config.id2label == {0: "0", 1: "1"}
    if task == "scores":
        assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)


def test_masks_are_those_of_bert_and_a_function_of_seed_and_slot() -> None:
    masking = Masking(7, mask_id=4, vocab_size=1000, special=(0, 1, 2, 3, 4))
    ids = np.random.default_rng(0).integers(5, 1000, (64, 512))
    ids[:, 0], ids[:, -1] = 2, 3
    real = np.ones_like(ids, bool)
    real[:, 500:] = False
    shown, targets = masking.apply(ids, 100, real)
    chosen = targets != IGNORED
    assert not chosen[:, 0].any()
    assert not chosen[:, 500:].any()
    assert (targets[chosen] == ids[chosen]).all()
    assert (shown[~chosen] == ids[~chosen]).all()
    assert 0.14 < chosen.sum() / (64 * 499) < 0.16
    assert 0.78 < (shown[chosen] == 4).mean() < 0.82
    assert 0.08 < (shown[chosen] == ids[chosen]).mean() < 0.12
    # row 3 of this batch is the first of one that starts at slot 103, whatever else is in either
    alone = masking.apply(ids[3:5], 103, real[3:5])
    assert (alone[0] == shown[3:5]).all()
    assert (alone[1] == targets[3:5]).all()
    assert (masking.apply(ids, 164, real)[1] != targets).any()  # another epoch
    assert (dataclasses.replace(masking, seed=8).apply(ids, 100, real)[1] != targets).any()


def test_a_row_of_few_tokens_is_asked_for_one() -> None:
    masking = Masking(0, mask_id=4, vocab_size=10, special=(0,))
    targets = masking.apply(np.array([[0, 5, 0]] * 50), 0)[1]
    assert (targets == [[IGNORED, 5, IGNORED]] * 50).all()


def test_masked_documents_of_one_row_do_not_see_each_other(store: Store, accelerator: Accelerator) -> None:
    _, model, task = opened(store, "mlm")
    work = task.work(0, np.arange(4))
    documents = work.inputs["attention_mask"][:, 0]
    row, first = next((row, end) for row in range(4) for end in [int(documents[row, 0].sum())] if end < SEQ - 4)
    inputs = {name: torch.from_numpy(value[[row]]) for name, value in work.inputs.items()}
    with torch.no_grad():
        packed = model(**inputs).logits[0, :first]
        alone = model(input_ids=inputs["input_ids"][:, :first]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_a_pretrained_body_gets_a_new_head_by_the_seed(store: Store) -> None:
    go(store, "mlm", options_for("mlm", steps=2), name="pretrained")
    told: list[Started] = []
    heads = []
    for seed in (0, 0, 1):
        plan = plan_of(store, "classify", Options(steps=1, batch=4, seed=seed), model="pretrained")
        built = build(store, plan, Silent())
        heads.append(built.model.classifier.weight.detach().clone())
        body = built.model.bert.encoder.layer[0].output.dense.weight
        parent = load_model(store, read_manifest(store, head(store, "pretrained")), head="masked")
        assert torch.equal(body, parent.bert.encoder.layer[0].output.dense.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    run(store, plan, progress=Silent(), started=told.append)
    assert set(told[0].new) == {
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight",
    }  # fmt: skip


def test_a_classifier_goes_on_with_its_own_head(store: Store) -> None:
    first = go(store, "classify", options_for("classify", steps=2), name="first")
    plan = plan_of(store, "classify", Options(steps=1, batch=4), model="first")
    built = build(store, plan, Silent())
    assert built.new == ()
    stored = load_model(store, read_manifest(store, first.id), head="classify")
    assert torch.equal(built.model.classifier.weight, stored.classifier.weight)
    other = build(store, plan_of(store, "pair", Options(steps=1, batch=4), model="first"), Silent())
    assert other.model.config.id2label == {0: "refused", 1: "said"}


def test_seq2seq_on_a_decoder_learns_the_target_alone(store: Store) -> None:
    plan = plan_of(store, "seq2seq", Options(steps=1, batch=4, depth=1))
    model = build(store, plan, Silent()).model
    work = open_task(store, plan.data, model, seed=0, progress=Silent()).work(0, np.arange(4))
    tokenizer = load_tokenizer(store, plan.data)
    said = ["".join(tokenizer.convert_ids_to_tokens(row[row != IGNORED].tolist())) for row in work.targets]
    wanted = [row["target"].replace(" ", "Ġ") for row in records()["seq2seq"][:4]]
    assert [text.removesuffix(tokenizer.eos_token) for text in said] == wanted
    assert all(text.endswith(tokenizer.eos_token) for text in said)


def test_what_cannot_be_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="encoder-decoder"):
        plan_of(store, "mlm", Options(config=T5 | {"is_encoder_decoder": True}))
    for task in ("classify", "mlm"):  # told by the family alone
        with pytest.raises(UsageError, match="a t5 model is an encoder-decoder"):
            build(store, plan_of(store, task, Options(config=T5)), Silent())
    llama = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(LlmosError, match="llama model does not fill in masked tokens"):
        build(store, plan_of(store, "mlm", Options(config=llama)), Silent())
    done = go(store, "classify", options_for("classify", steps=1))
    with pytest.raises(LlmosError, match="classifies texts; it does not write on"):
        load_model(store, read_manifest(store, done.id))


def head(store: Store, name: str) -> ObjectId:
    entry = read_ref(store, parse_ref(name))
    assert entry is not None
    return entry.id


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("classify", {"optimizer": "muon", "ema": 0.9}),
        ("mlm", {"optimizer": "schedule-free"}),
        ("pair", {"optimizer": "adafactor", "schedule": "wsd", "lr": 1e-2, "checkpointing": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value.values())),
)
def test_other_methods_stop_and_go_on_as_well(store: Store, task: str, method: dict[str, Any]) -> None:
    root = store.root.with_name("again")
    shutil.copytree(store.root, root)
    options = options_for(task, steps=6, **method)
    straight = go(store, task, options)
    with open_store(root, Silent()) as again:
        with pytest.raises(Interrupted):
            run(again, plan_of(again, task, options, save_every=2), progress=_Stops(3))
        resumed = run(again, plan_of(again, task, options, resume=True), progress=Silent())
    assert resumed.id == straight.id
    manifest = read_manifest(store, straight.id)
    assert manifest.recipe is not None
    assert method.items() <= manifest.recipe.params.items()


def test_recomputed_activations_change_nothing(store: Store) -> None:
    plain, saved = (
        load_state_dict(store, read_manifest(store, go(store, "classify", options, name=name).id))
        for name, options in (("a", options_for("classify")), ("b", options_for("classify", checkpointing=True)))
    )
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
