import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmos_cli.data.batches import TokenRows
from llmos_cli.data.make import Made, Request, make_dataset
from llmos_cli.data.slices import VERSION
from llmos_cli.data.tokenizer import make_encoding
from llmos_cli.errors import Conflict, Damaged, LlmosError, NotFound, UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent, Task
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.refs import read_ref, ref_history, update_ref
from llmos_cli.store.transaction import begin

WEB = RefName("web")
DocumentsOf = Callable[..., list[np.ndarray]]


def request(*inputs: object, **changes: object) -> Request:
    plain = Request(tuple(str(item) for item in inputs), "train:300", seq_len=16, shard_size=256)
    return replace(plain, **changes)  # type: ignore[arg-type]


def make(store: Store, asked: Request, ref: RefName = WEB, stdin: bytes | None = None) -> Made:
    stream = None if stdin is None else io.BytesIO(stdin)
    return make_dataset(store, ref, asked, progress=Silent(), stdin=stream)


def texts(store: Store, made: Made, documents_of: DocumentsOf) -> list[str]:
    """The documents of a dataset, from its tokens alone."""
    manifest = read_manifest(store, made.id)
    files = {
        name: read_file(store, entry)
        for name in ("tokenizer.json", "tokenizer_config.json")
        if (entry := manifest.file(f"tokenizer/{name}"))
    }
    encoding = make_encoding(files, "it")
    parts = documents_of(manifest)
    assert all(part[-1] == encoding.eos_id for part in parts)
    return [encoding.tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def test_the_dataset_holds_every_document_and_says_so(store: Store, folder: Path, documents_of: DocumentsOf) -> None:
    made = make(store, request(folder))
    files = [folder / "a.txt", folder / "b.md", folder / "sub" / "c.py"]
    assert texts(store, made, documents_of) == [path.read_text() for path in files]
    manifest = read_manifest(store, made.id)
    meta = manifest.meta
    rows = TokenRows(store, manifest)
    assert manifest.kind == "dataset"
    assert meta["task"] == "lm"
    assert meta["documents"] == 3
    assert meta["rows"] == rows.rows
    assert meta["tokens"] == sum(ids.size for ids in documents_of(manifest))
    assert meta["text_bytes"] == sum(path.stat().st_size for path in files)
    assert meta["shards"] == sum(entry.path.startswith("tokens-") for entry in manifest.files)
    assert "skipped" not in meta
    found = read_ref(store, WEB)
    assert found is not None
    assert found.id == made.id


def test_the_recipe_names_inputs_parameters_and_tools(store: Store, folder: Path) -> None:
    recipe = make(store, request(folder)).manifest.recipe
    assert recipe is not None
    assert recipe.command == "shard"
    assert [source.name for source in recipe.sources] == ["corpus/a.txt", "corpus/b.md", "corpus/sub/c.py"]
    assert recipe.params == {
        "tokenizer": "train:300",
        "seq_len": 16,
        "shard_size": 256,
        "task": "lm",
        "method": "bpe",
        "fields": {"text": "text"},
        "encoding": VERSION,
        "skip_bad": False,
        "layout": 2,
    }
    assert set(recipe.tools) == {"llmos", "tokenizers"}


def test_a_repeat_makes_nothing_and_gives_the_same_id(store: Store, folder: Path) -> None:
    first = make(store, request(folder))
    again = make(store, request(folder))
    assert (first.cached, again.cached) == (False, True)
    assert again.id == first.id
    assert again.stored == 0
    assert len(ref_history(store, WEB)) == 1


def test_a_repeat_under_another_name_points_it_to_the_same_dataset(store: Store, folder: Path) -> None:
    first = make(store, request(folder))
    again = make(store, request(folder), RefName("other"))
    assert again.cached
    found = read_ref(store, RefName("other"))
    assert found is not None
    assert found.id == first.id


def test_the_same_work_in_another_store_and_place_gives_the_same_id(store: Store, folder: Path, tmp_path: Path) -> None:
    from llmos_cli.store.local import init_store, open_store

    elsewhere = tmp_path / "else" / "corpus"
    elsewhere.parent.mkdir()
    first = make(store, request(folder))
    folder.rename(elsewhere)
    init_store(tmp_path / "second")
    with open_store(tmp_path / "second") as second:
        assert make(second, request(elsewhere)).id == first.id


@pytest.mark.parametrize(
    "change", [{"seq_len": 8}, {"shard_size": 64}, {"tokenizer": "train:290"}, {"skip_bad": True}, {"field": "body"}]
)
def test_other_parameters_make_another_dataset(store: Store, folder: Path, change: dict[str, object]) -> None:
    first = make(store, request(folder))
    other = make(store, request(folder, **change))
    assert not other.cached
    assert other.id != first.id


def test_changed_text_makes_another_dataset(store: Store, folder: Path) -> None:
    first = make(store, request(folder))
    (folder / "a.txt").write_text("another text\n")
    other = make(store, request(folder))
    assert not other.cached
    assert other.id != first.id


def test_a_tokenizer_is_taken_from_a_dataset_by_its_ref(store: Store, folder: Path, documents_of: DocumentsOf) -> None:
    first = make(store, request(folder))
    (folder.parent / "new.txt").write_text("the cat sat\n")
    other = make(store, request(folder.parent / "new.txt", tokenizer="web"), RefName("test"))
    assert texts(store, other, documents_of) == ["the cat sat\n"]
    recipe = other.manifest.recipe
    assert recipe is not None
    assert recipe.inputs == {"tokenizer": first.id}
    for name in ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        assert other.manifest.file(name) == first.manifest.file(name)


def test_a_tokenizer_is_taken_from_a_model_folder_byte_for_byte(store: Store, folder: Path, tmp_path: Path) -> None:
    first = make(store, request(folder))
    model = tmp_path / "model"
    model.mkdir()
    for entry in first.manifest.files:
        if entry.path.startswith("tokenizer/"):
            (model / entry.path.removeprefix("tokenizer/")).write_bytes(read_file(store, entry))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    made = make(store, request(folder, tokenizer=str(model)), RefName("other"))
    assert made.manifest.file("tokenizer/tokenizer.json") == first.manifest.file("tokenizer/tokenizer.json")
    assert made.manifest.file("tokenizer/chat_template.jinja") is not None
    assert make(store, request(folder, tokenizer=str(model)), RefName("other")).cached
    (model / "chat_template.jinja").write_text("{{ other }}")
    assert not make(store, request(folder, tokenizer=str(model)), RefName("other")).cached


@pytest.mark.parametrize(
    ("tokenizer", "error", "why"),
    [
        ("train:12", UsageError, "names no vocabulary"),
        ("train:many", UsageError, "names no vocabulary"),
        ("nothing", NotFound, "no ref nothing:latest"),
        ("./nothing", NotFound, "no folder ./nothing"),
        ("files", LlmosError, r"files:latest holds no tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_named(
    store: Store, folder: Path, tokenizer: str, error: type[LlmosError], why: str
) -> None:
    with begin(store, purpose="test", ref=RefName("files")) as tx:
        tx.commit(Manifest("files", (tx.add_bytes("x.txt", b"x"),)), message="test")
    with pytest.raises(error, match=why):
        make(store, request(folder, tokenizer=tokenizer))
    assert read_ref(store, WEB) is None


@pytest.mark.parametrize("change", [{"seq_len": 1}, {"seq_len": 1 << 30}, {"shard_size": 0}, {"shard_size": 1 << 60}])
def test_sizes_that_make_no_sense_are_refused(store: Store, folder: Path, change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        make(store, request(folder, **change))


def test_standard_input_is_one_document_and_leaves_nothing_behind(store: Store, documents_of: DocumentsOf) -> None:
    made = make(store, request("-"), stdin=b"one two\nthree\n" * 20)
    assert texts(store, made, documents_of) == ["one two\nthree\n" * 20]
    assert make(store, request("-"), stdin=b"one two\nthree\n" * 20).cached
    assert list(store.tmp.iterdir()) == []


def test_standard_input_is_json_lines_once_a_field_is_named(store: Store, documents_of: DocumentsOf) -> None:
    made = make(store, request("-", field="body"), stdin=b'{"body": "one"}\n{"body": "two"}\n')
    assert texts(store, made, documents_of) == ["one", "two"]


def test_bad_standard_input_is_called_by_that_name(store: Store) -> None:
    with pytest.raises(UsageError, match="standard input is not text"):
        make(store, request("-"), stdin=b"a\0b")
    with pytest.raises(UsageError, match=r"line 1 of standard input \(at byte 0\) is not valid JSON"):
        make(store, request("-", field="text"), stdin=b"nope\n")


def test_what_is_left_out_is_counted(store: Store, folder: Path, documents_of: DocumentsOf) -> None:
    (folder / "empty.txt").write_bytes(b"")
    (folder / "d.jsonl").write_text('{"text": "good"}\nbad\n{"text": ""}\n')
    progress = Silent()
    made = make_dataset(store, WEB, request(folder, skip_bad=True), progress=progress)
    assert made.manifest.meta["skipped"] == 1
    assert made.manifest.meta["skipped_records"] == 2
    assert len(progress.warnings) == 3
    assert "good" in texts(store, made, documents_of)


def test_many_bad_lines_are_counted_not_listed(store: Store, folder: Path) -> None:
    (folder / "d.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 500)
    progress = Silent()
    made = make_dataset(store, WEB, request(folder, skip_bad=True), progress=progress)
    assert made.manifest.meta["skipped_records"] == 500
    assert len(progress.warnings) == 21
    assert "480 more records" in progress.warnings[-1]


def test_only_bad_lines_make_no_dataset(store: Store, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("bad\n")
    with pytest.raises(UsageError, match="no document is left"):
        make(store, request(tmp_path / "d.jsonl", skip_bad=True))
    assert read_ref(store, WEB) is None


class When(Silent):
    """Does something once a bar of this label opens."""

    def __init__(self, label: str, action: object) -> None:
        super().__init__()
        self.label, self.action = label, action

    def task(self, label: str, *, total: int | None = None, unit: str = "B"):  # type: ignore[no-untyped-def]
        if label == self.label:
            self.action()  # type: ignore[operator]
        return super().task(label, total=total, unit=unit)


@pytest.mark.parametrize("label", ["training the tokenizer", "tokenizing"])
def test_a_file_that_changes_meanwhile_leaves_nothing_visible(store: Store, folder: Path, label: str) -> None:
    progress = When(label, lambda: (folder / "b.md").write_text("something else"))
    with pytest.raises(LlmosError, match=r"b\.md changed while it was read"):
        make_dataset(store, WEB, request(folder), progress=progress)
    assert read_ref(store, WEB) is None
    assert not make(store, request(folder)).cached


def test_a_ref_that_moves_meanwhile_is_a_conflict(store: Store, folder: Path) -> None:
    with begin(store, purpose="test") as tx:
        other = tx.commit(Manifest("files", (tx.add_bytes("x.txt", b"x"),)), message="test").id
    progress = When("tokenizing", lambda: update_ref(store, WEB, other, expected=None, message="faster"))
    with pytest.raises(Conflict, match="web"):
        make_dataset(store, WEB, request(folder), progress=progress)
    found = read_ref(store, WEB)
    assert found is not None
    assert found.id == other


def test_progress_ends_at_the_size_of_the_text(store: Store, folder: Path) -> None:
    done: dict[str, list[int]] = {}

    class Count:
        def __init__(self, label: str, total: int) -> None:
            self.label = label
            done[label] = [0, total]

        def __enter__(self) -> Task:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, amount: int = 1) -> None:
            done[self.label][0] += amount

        def note(self, text: str) -> None:
            pass

    class Counting(Silent):
        def task(self, label: str, *, total: int | None = None, unit: str = "B"):  # type: ignore[no-untyped-def]
            return Count(label, total or 0)

    make_dataset(store, WEB, request(folder), progress=Counting())
    assert set(done) == {"reading", "training the tokenizer", "tokenizing"}
    for label, (amount, total) in done.items():
        assert amount == total > 0, label


def test_a_damaged_tokenizer_in_a_folder_is_named(store: Store, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(Damaged, match=rf"the tokenizer\.json of {tmp_path}/tok cannot"):
        make(store, request(folder, tokenizer=str(tmp_path / "tok")))
