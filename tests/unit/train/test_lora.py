"""Adapters end to end: what is trained and stored, exact resume, what loads it, and merging."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from llmos_cli.data.make import Request, make_dataset
from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.weights import load_state_dict
from llmos_cli.progress import Silent
from llmos_cli.store.checkout import execute_checkout, plan_checkout
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.train.build import build
from llmos_cli.train.config import Options
from llmos_cli.train.evaluate import evaluate_task
from llmos_cli.train.merge import merge
from llmos_cli.train.plan import Plan, make_plan
from llmos_cli.train.result import Trained
from llmos_cli.train.run import Started, run

SEQ = 24
LORA = Options(steps=6, batch=4, lora=2, lr=1e-2)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets `text` and `moods`, a Llama `base` and a BERT `body` that knows masked tokens."""
    root = tmp_path_factory.mktemp("lora") / ".llmos"
    init_store(root)
    text = root.parent / "text.txt"
    text.write_text("\n".join(f"{n} squared is {n * n}." for n in range(400)))
    moods = root.parent / "moods.csv"
    moods.write_text("text,label\n" + "".join(f"{'good' if n % 2 else 'bad'} {n % 5},{n % 2}\n" for n in range(60)))
    with open_store(root) as store:
        for name, source, tokenizer, task in (
            ("text", text, "train:270", "lm"),
            ("masked", moods, "train:270", "mlm"),
            ("moods", moods, "masked", "classify"),
        ):
            request = Request((str(source),), tokenizer, SEQ, 1 << 20, task=task)
            make_dataset(store, parse_ref(name), request, progress=Silent())
        go(store, "base", "text", Options(steps=3, batch=4, config=LLAMA))
        go(store, "body", "masked", Options(steps=2, batch=4, depth=1))
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copytree(made, tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened


def plan_of(store: Store, name: str, data: str, options: Options, **more: Any) -> Plan:
    return make_plan(store, name, data=data, model=more.pop("model", None), options=options, **more)


def go(store: Store, name: str, data: str, options: Options, **more: Any) -> Trained:
    return run(store, plan_of(store, name, data, options, **more), progress=Silent())


def at(store: Store, name: str) -> Manifest:
    return read_manifest(store, oid(store, name))


def oid(store: Store, name: str) -> ObjectId:
    entry = read_ref(store, parse_ref(name))
    assert entry is not None
    return entry.id


def test_only_the_adapter_is_trained_and_stored(store: Store) -> None:
    told: list[Started] = []
    done = run(store, plan_of(store, "small", "text", LORA, model="base"), progress=Silent(), started=told.append)
    manifest = read_manifest(store, done.id)
    assert manifest.kind == "adapter"
    assert manifest.meta["adapter_of"] == str(oid(store, "base"))
    names = {entry.path for entry in manifest.files}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "base/model.safetensors"} <= names
    assert "model.safetensors" not in names
    assert manifest.file("base/model.safetensors").chunks == at(store, "base").file("model.safetensors").chunks  # type: ignore[union-attr]
    state = load_state_dict(store, manifest)
    assert manifest.meta["trained"] == sum(tensor.numel() for tensor in state.values()) < 3000
    assert told[0].trained == manifest.meta["trained"] < told[0].parameters
    assert manifest.recipe is not None
    assert {"peft", "torch"} <= set(manifest.recipe.tools)
    checkpoint = at(store, "small:checkpoint")
    optimizer = load_state_dict(store, checkpoint, "training")
    assert {name.split(".")[-3] for name in optimizer if name.startswith("exp_avg.")} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(("data", "parent"), [("text", "base"), ("moods", "body")])
def test_a_run_that_was_stopped_ends_in_the_same_id(store: Store, data: str, parent: str) -> None:
    root = store.root.with_name("again")
    shutil.copytree(store.root, root)
    straight = go(store, "a", data, LORA, model=parent, save_every=2)
    with open_store(root, Silent()) as again:
        half = plan_of(again, "a", data, LORA, model=parent, save_every=2)
        saved: list[int] = []

        class Killed(Exception):
            pass

        def stop(event: Any) -> None:
            saved.append(event.step)
            if event.step == 4:
                raise Killed

        with pytest.raises(Killed):
            run(again, half, progress=Silent(), saved=stop)
        plan = plan_of(again, "a", data, LORA, model=parent, resume=True)
        assert plan.start == 4
        assert run(again, plan, progress=Silent()).id == straight.id


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 of transformers 5.24
def test_peft_loads_it_over_its_base(store: Store, tmp_path: Path) -> None:
    done = go(store, "small", "text", LORA, model="base")
    folder = tmp_path / "out"
    manifest = read_manifest(store, done.id)
    execute_checkout(store, plan_checkout(manifest, folder, force=False), Silent())
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", local_files_only=True)
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        ours = load_model(store, manifest)(input_ids=ids).logits
        assert not torch.equal(ours, load_model(store, at(store, "base"))(input_ids=ids).logits)
        torch.testing.assert_close(ours, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_merging_changes_only_what_the_adapter_touches(store: Store) -> None:
    go(store, "small", "text", dataclasses.replace(LORA, lora_targets=("q_proj", "v_proj")), model="base")
    merged = merge(store, oid(store, "small"), parse_ref("whole"), progress=Silent())
    manifest = read_manifest(store, merged.commit.id)
    assert manifest.kind == "model"
    assert manifest.recipe is not None
    assert manifest.recipe.inputs == {"model": oid(store, "base"), "adapter": oid(store, "small")}
    before, after = load_state_dict(store, at(store, "base")), load_state_dict(store, manifest)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"q_proj", "v_proj"}
    assert merged.changed == len(changed)
    ids = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        whole, beside = (load_model(store, at(store, name))(input_ids=ids).logits for name in ("whole", "small"))
    assert torch.equal(whole, beside)
    again = merge(store, oid(store, "small"), parse_ref("other"), progress=Silent())
    assert (again.commit.id, again.made_before) == (merged.commit.id, True)


def test_a_new_head_is_part_of_the_adapter(store: Store) -> None:
    go(store, "judge", "moods", dataclasses.replace(LORA, steps=60, batch=16), model="body")
    assert {"base_model.model.classifier.weight", "base_model.model.bert.pooler.dense.weight"} <= set(
        load_state_dict(store, at(store, "judge"))
    )
    beside = evaluate_task(store, oid(store, "judge"), oid(store, "moods"), progress=Silent())
    assert beside.metrics["accuracy"] == 1.0
    merge(store, oid(store, "judge"), parse_ref("whole"), progress=Silent())
    merged = evaluate_task(store, oid(store, "whole"), oid(store, "moods"), progress=Silent())
    assert merged.metrics == beside.metrics


def test_what_makes_no_sense_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="--lora trains an adapter for a model"):
        plan_of(store, "x", "text", Options(lora=4))
    with pytest.raises(UsageError, match="are for an adapter"):
        plan_of(store, "x", "text", Options(lora_alpha=4.0), model="base")
    with pytest.raises(UsageError, match="no linear layer named 'nope'"):
        build(store, plan_of(store, "x", "text", Options(lora=4, lora_targets=("nope",)), model="base"), Silent())
    go(store, "small", "text", LORA, model="base")
    with pytest.raises(UsageError, match="is of kind adapter, not a model"):
        plan_of(store, "x", "text", Options(), model="small")
    with pytest.raises(UsageError, match="is no adapter"):
        merge(store, oid(store, "base"), parse_ref("y"), progress=Silent())


def test_runs_without_an_adapter_keep_their_recipes(store: Store) -> None:
    recipe = plan_of(store, "x", "text", Options()).recipe
    assert not {"lora", "optimizer", "schedule", "ema"} & set(recipe.params)
    assert json.loads(json.dumps(recipe.params)) == recipe.params
