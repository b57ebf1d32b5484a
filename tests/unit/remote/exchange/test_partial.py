"""Parts of a ref: what is fetched for them, what they are here, and what a later pull of the whole still fetches."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import RemoteUnavailable
from llmos_cli.formats.manifest import FileEntry
from llmos_cli.formats.safetensors import TensorInfo, encode_header, read_table
from llmos_cli.remote.exchange.partial import layer_of, slice_of
from llmos_cli.remote.transports.folder import FolderTransport

Run = Callable[..., tuple[int, Any, str]]
LAYER = 300_000  # bytes of one of the twelve
ASIDE = 40_000  # indexes, headers, moves


def tensors(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    table = read_table(lambda start, end: data[start:end], len(data), path.name)
    return {info.name: data[info.start : info.end] for info in table}


def taken_out(reader: Run, ref: str) -> Path:
    """The files of a ref."""
    assert reader("checkout", ref, f"out-{ref}")[0] == 0
    return Path(f"out-{ref}")


def test_layers_are_fetched_and_nothing_else(reader: Run, read_bytes: Callable[[], int]) -> None:
    code, found, _ = reader("pull", "nas", "tiny", "--layers", "2-3", "--json")
    assert code == 0
    assert 2 * LAYER < read_bytes() < 2 * LAYER + ASIDE
    assert (found["ref"], found["refs"][0]["status"], found["remote"]) == ("tiny-part:latest", "new", "nas")
    whole = tensors(Path("tiny/model.safetensors"))
    part = tensors(taken_out(reader, "tiny-part") / "model.safetensors")
    assert part == {name: whole[name] for name in ("model.layers.2.w", "model.layers.3.w")}
    assert reader("fsck")[0] == 0
    shown = reader("show", "tiny-part", "--json")[1]
    assert (shown["kind"], shown["recipe"]["params"]) == ("files", {"layers": "2-3"})
    assert shown["recipe"]["inputs"] == {"source": found["part_of"]["id"]}


def test_a_later_pull_of_the_whole_fetches_the_rest(reader: Run, read_bytes: Callable[[], int]) -> None:
    reader("pull", "nas", "tiny", "--layers", "0-3")
    read_bytes()
    code, found, _ = reader("pull", "nas", "tiny", "--json")
    assert code == 0
    assert 8 * LAYER < read_bytes() < 8 * LAYER + ASIDE
    assert found["reused"] == 4
    assert (taken_out(reader, "tiny") / "model.safetensors").read_bytes() == Path("tiny/model.safetensors").read_bytes()
    code, found, _ = reader("pull", "nas", "tiny", "--layers", "4-7", "--as", "later", "--json")
    assert (code, found["received"]) == (0, 0)


def test_ranks_share_all_tensors_between_them(reader: Run, read_bytes: Callable[[], int]) -> None:
    seen: dict[str, bytes] = {}
    for rank in range(4):
        read_bytes()
        assert reader("pull", "nas", "tiny", "--rank", f"{rank}/4")[0] == 0
        assert read_bytes() < 3 * LAYER + ASIDE
        part = tensors(taken_out(reader, f"tiny-{rank}-of-4") / "model.safetensors")
        assert not seen.keys() & part.keys()
        seen |= part
    assert seen == tensors(Path("tiny/model.safetensors"))


def test_slices_are_even_and_leave_nothing_out() -> None:
    entry = FileEntry("model.safetensors", ())
    for seed in range(50):
        dice = random.Random(seed)
        sizes = [dice.choice([0, 1, 7, 1000, dice.randrange(5000)]) for _ in range(dice.randrange(1, 60))]
        pairs = [(entry, TensorInfo(f"t{number}", "U8", (size,), 0, size)) for number, size in enumerate(sizes)]
        world = dice.randrange(1, 9)
        shares = [slice_of(pairs, rank, world) for rank in range(world)]
        assert [pair for share in shares for pair in share] == pairs
        for share in shares:
            assert sum(info.end for _, info in share) <= sum(sizes) / world + max(sizes)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12),
        ("blk.0.ffn_down.weight", 0),
        ("model.layers.3.mlp.experts.7.w1", 3),
        ("lm_head.weight", None),
        ("conv1.weight", None),
    ],
)
def test_the_layer_of_a_tensor(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_files_come_whole(reader: Run, read_bytes: Callable[[], int]) -> None:
    code, found, _ = reader("pull", "nas", "tiny", "--files", "*.json", "--json")
    assert (code, found["files"], found["tensors"]) == (0, ["config.json"], [])
    assert read_bytes() < ASIDE
    assert (taken_out(reader, "tiny-part") / "config.json").read_bytes() == Path("tiny/config.json").read_bytes()
    assert reader("pull", "nas", "tiny", "--files", "*.json", "--files", "*.safetensors", "--as", "all")[0] == 0
    assert reader("show", "all", "--json")[1]["kind"] == "model"


def test_files_and_what_all_conditions_on_tensors_allow(reader: Run) -> None:
    words = ("--files", "*.json", "--tensors", "*.[0-5].w", "--layers", "4-9", "--rank", "1/2")
    code, found, _ = reader("pull", "nas", "tiny:latest", *words, "--as", "mine:v1", "--json")
    assert code == 0
    assert (found["ref"], found["files"], found["tensors"]) == ("mine:v1", ["config.json"], ["model.layers.5.w"])


def test_a_dry_run_changes_nothing(reader: Run) -> None:
    code, found, _ = reader("pull", "nas", "tiny", "--layers", "1", "--dry-run", "--json")
    assert (code, found["dry_run"], found["id"]) == (0, True, None)
    assert LAYER < found["received"] < LAYER + ASIDE
    assert reader("ls", "--json")[1]["refs"] == []
    assert not list(Path("reader").rglob("*.pack"))


def test_a_part_moves_with_its_ref_and_replaces_nothing_else(reader: Run) -> None:
    first = reader("pull", "nas", "tiny", "--layers", "3", "--json")[1]
    again = reader("pull", "nas", "tiny", "--layers", "3", "--json")[1]
    assert (again["id"], again["received"], again["refs"][0]["status"]) == (first["id"], 0, "unchanged")
    reader("--store", "writer", "tag", "tuned", "tiny", "--force")
    reader("--store", "writer", "push", "nas", "tiny")
    moved = reader("pull", "nas", "tiny", "--layers", "3", "--json")[1]
    assert (moved["refs"][0]["status"], moved["refs"][0]["previous"]) == ("moved", first["id"])
    reader("add", "tiny", "mine")
    assert reader("pull", "nas", "tiny", "--layers", "3", "--as", "mine")[0] == 17
    assert reader("pull", "nas", "tiny", "--layers", "3", "--as", "mine", "--force")[0] == 0


def test_a_delta_brings_its_base(reader: Run) -> None:
    dice = random.Random(5)
    base = [dice.gauss(0, 1) for _ in range(100_000)]
    for name, step in (("before", 0.0), ("after", 1e-6)):
        Path(name).mkdir()
        header = encode_header([("a.0", "F32", (100_000,)), ("a.1", "F32", (100_000,))], {})
        data = struct.pack("<200000f", *base, *(value + step for value in base))
        Path(name, "model.safetensors").write_bytes(header + data)
    reader("--store", "writer", "add", "before", "before")
    reader("--store", "writer", "add", "after", "after", "--base", "before")
    stored = reader("--store", "writer", "show", "after", "--tensors", "--json")[1]["tensors"]["list"][1]["codecs"]
    assert list(stored) == ["delta"]
    assert reader("--store", "writer", "push", "nas", "before", "after")[0] == 0
    assert reader("pull", "nas", "after", "--layers", "1")[0] == 0
    part = tensors(taken_out(reader, "after-part") / "model.safetensors")
    assert part == {"a.1": tensors(Path("after/model.safetensors"))["a.1"]}
    assert reader("fsck")[0] == 0


def test_what_the_remote_has_wrong_is_refused(reader: Run) -> None:
    data = Path("tiny/model.safetensors").read_bytes()
    wanted = data[-LAYER:][:1000]  # of the last layer
    for pack in Path("nas").rglob("*.pack"):
        content = pack.read_bytes()
        if wanted in content:
            pack.chmod(0o644)
            pack.write_bytes(content.replace(wanted, bytes(1000)))
    code, out, err = reader("pull", "nas", "tiny", "--layers", "11")
    assert (code, out, "object " in err) == (13, "", True)
    assert reader("ls", "--json")[1]["refs"] == []
    assert reader("pull", "nas", "tiny", "--layers", "10")[0] == 0


def test_a_remote_that_falls_silent_leaves_no_part(reader: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read, large = FolderTransport.read, iter([True])

    def failing(self: FolderTransport, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = read(self, key, start, end)
        if len(data) > LAYER and not next(large, False):
            raise RemoteUnavailable("nas does not answer")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(FolderTransport, "read", failing)
        assert reader("pull", "nas", "tiny", "--tensors", "*.0.w", "--tensors", "*.5.w")[0] == 16
    assert reader("ls", "--json")[1]["refs"] == []
    assert reader("fsck")[0] == 0
    assert reader("pull", "nas", "tiny", "--tensors", "*.0.w", "--tensors", "*.5.w")[0] == 0


def test_an_unsigned_ref_has_no_parts_where_signatures_are_required(reader: Run) -> None:
    pytest.importorskip("cryptography")
    assert reader("pull", "nas", "tiny", "--layers", "1", "--require-signed")[0] == 14
    assert not list(Path("reader").rglob("*.pack"))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("tiny", "--layers", "3-1"), 2),
        (("tiny", "--layers", "some"), 2),
        (("tiny", "--rank", "4/4"), 2),
        (("tiny", "--rank", "1"), 2),
        (("tiny", "tuned", "--layers", "1"), 2),
        (("--all", "--files", "*"), 2),
        (("tiny", "--as", "other"), 2),
        (("tiny", "--layers", "1", "--as", "tiny:latest"), 2),
        (("tiny", "--layers", "12"), 10),
        (("tiny", "--tensors", "lm_head*"), 10),
        (("tiny", "--files", "*.gguf"), 10),
        (("nothing", "--files", "*"), 10),
    ],
)
def test_what_is_no_part(reader: Run, words: tuple[str, ...], code: int) -> None:
    found, out, err = reader("pull", "nas", *words)
    assert (found, out) == (code, "")
    assert "hint: " in err


def test_a_part_from_a_remote_without_a_name(reader: Run) -> None:
    code, found, _ = reader("pull", "./nas", "tiny", "--layers", "1", "--json")
    assert (code, found["remote"], found["tensors"]) == (0, None, ["model.layers.1.w"])


def test_a_hub_has_no_parts(reader: Run) -> None:
    code, _, err = reader("pull", "hf://a/b", "--layers", "1")
    assert (code, "whole files" in err) == (2, True)
