"""What a hostile store, file or command line may say reaches no terminal as an order to it; only JSON repeats it, with
JSON's own escapes. And what is said fits the terminal."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Manifest, Recipe, Source
from llmos_cli.formats.names import parse_ref
from llmos_cli.store.local import open_store
from llmos_cli.store.transaction import begin

Llmos = Callable[..., Any]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202ekcab\u2066\nnext"
ORDERS = ("\x1b]0;", "\x1b[2J", "\x9b", "\u202e", "\u2066", "\x07")
LONG = "a-model-with-a-name-that-goes-on-and-on-until-nobody-reads-it:and-a-tag-of-the-same-kind-of-length"


def tensors(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.fixture
def hostile(llmos: Llmos, folder: Path) -> Path:
    """A store with evil:latest (two values) and evil:v1, every free text of which is an order to the terminal."""
    assert llmos("init").code == 0
    with open_store(folder / ".llmos") as store:
        for number, name in enumerate(("evil", "evil", "evil:v1", LONG)):
            recipe = Recipe(
                command=f"train{EVIL}",
                inputs={f"data{EVIL}": object_id(b"gone")},
                params={f"p{EVIL}": EVIL, "nested": {EVIL: [EVIL]}, "n": number},
                seed=1,
                sources=(Source(f"corpus{EVIL}", 1, object_id(b"x")),),
                tools={f"torch{EVIL}": EVIL},
            )
            config = json.dumps({"model_type": EVIL, EVIL: number, "n": number}).encode()
            with begin(store, purpose=EVIL, ref=parse_ref(name)) as tx:
                files = (
                    tx.add_bytes("config.json", config),
                    tx.add_bytes("model.safetensors", tensors(f"layer.{number}")),
                    tx.add_bytes("notes.txt", f"{EVIL} {number}".encode()),
                    tx.add_bytes("a-folder/" + "with-a-very-long-name-of-a-file/" * 4 + "f.txt", b"x"),
                )
                tx.commit(Manifest("model", files, {f"m{EVIL}": EVIL, "loss": 0.5}, recipe), message=f"why {EVIL}")
    return folder / ".llmos"


COMMANDS = [
    ("ls",),
    ("ls", f"*{EVIL}*"),
    ("show", "evil"),
    ("show", "evil", "--files"),
    ("show", "evil", "--tensors"),
    ("show", "evil", "--sha256"),
    ("show", LONG),
    ("log", "evil"),
    ("log", LONG),
    ("du",),
    ("du", "evil", LONG),
    ("diff", "evil~1", "evil"),
    ("diff", "evil", LONG),
    ("checkout", "evil", f"out{EVIL}"),
    ("gc", "--dry-run"),
    ("fsck",),
    ("show", f"evil{EVIL}"),
    ("show", f"@{EVIL}"),
    ("add", f"missing{EVIL}", "x"),
    ("add", "here", f"x{EVIL}"),
    ("--store", f"nowhere{EVIL}", "ls"),
    ("tag", "evil", f"x:{EVIL}"),
    ("rm", f"x{EVIL}"),
    ("push", f"away{EVIL}"),
    ("remote", "add", f"away{EVIL}", f"/tmp/{EVIL}"),
    (f"no-verb{EVIL}",),
    ("ls", f"--no-option{EVIL}"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: ascii(" ".join(words))[1:30])
def test_in_a_pipe_texts_are_spelled_out(llmos: Llmos, hostile: Path, words: tuple[str, ...]) -> None:
    ran = llmos(*words)
    assert ran.code in (0, 2, 10, 14)
    for order in ORDERS:
        assert order not in ran.out + ran.err
    assert "\nnext" not in ran.out + ran.err
    assert "bug" not in ran.err


@pytest.mark.parametrize("words", COMMANDS[:16], ids=lambda words: ascii(" ".join(words))[1:30])
def test_json_says_the_truth_in_its_own_escapes(llmos: Llmos, hostile: Path, words: tuple[str, ...]) -> None:
    ran = llmos("--json", *words)
    assert ran.code == 0, ran.err
    assert (ran.out + ran.err).isascii()
    assert not any(order in ran.out + ran.err for order in ORDERS)
    if words == ("show", "evil"):
        assert json.loads(ran.out)["meta"] == {f"m{EVIL}": EVIL, "loss": 0.5}


@pytest.mark.parametrize("columns", [40, 80])
def test_on_a_terminal_texts_are_spelled_out_and_tables_fit(
    on_terminal: Callable[..., str], hostile: Path, columns: int
) -> None:
    for words in (("ls",), ("du",), ("show", "evil", "--tensors"), ("log", LONG), ("diff", "evil", LONG)):
        seen = on_terminal(columns, *words)
        for order in ORDERS:
            assert order not in seen, words
        assert "\r" not in seen
        if words[0] in ("ls", "du"):
            assert max(map(len, seen.split("\n\n")[0].splitlines())) <= columns, seen
