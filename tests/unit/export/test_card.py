"""A card says what the store knows of a model, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llmos_cli.app import main
from llmos_cli.export.card import reports_of
from llmos_cli.export.markup import Heading, Plot, Table, Text, svg, to_html, to_markdown
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Recipe
from llmos_cli.store.local import Store

Put = Callable[..., ObjectId]


def test_what_comes_from_outside_cannot_break_the_page() -> None:
    nasty = "a|b <script>alert(1)</script> `x` *y*\nz"
    blocks = [Heading(nasty), Text(nasty), Table(("head",), ((nasty,),)), Plot("x", "y", ((nasty, 1.0, 2.0),))]
    for text in (to_html(nasty, blocks), to_markdown(blocks)):
        assert "<script" not in text.replace("\\<", "")
    assert to_markdown(blocks[2:3]).count("\n") == 3, "a cell stays on its line"


def test_a_plot_is_a_picture_with_every_name() -> None:
    points = (("small", 1.0, 1.2), ("whole", 4.0, 1.0))
    picture = ElementTree.fromstring(svg(Plot("MB", "ratio", points)))
    circles = [item for item in picture if item.tag.endswith("circle")]
    assert [float(item.attrib["cx"]) for item in circles] == sorted(float(item.attrib["cx"]) for item in circles)
    assert float(circles[0].attrib["cy"]) < float(circles[1].attrib["cy"]), "more is higher"
    assert {"small", "whole"} <= {item.text for item in picture}
    assert "\n\n" not in svg(Plot("MB", "ratio", (("one", 1.0, 1.0),)))


def test_a_card_tells_facts_measures_recipes_and_data(
    root: Path, store: Store, put_model: Put, put_data: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    put_model(recipe=Recipe("train", params={"lr": 0.001}, inputs={"data": put_data()}, seed=7))
    call = ["--store", str(root)]
    for scheme in ("int8", "int4"):
        assert main([*call, "quantize", "tiny", f"tiny:{scheme}", "--scheme", scheme, "--method", "rtn"]) == 0
    assert main([*call, "eval", "tiny:int8", "--data", "web", "--max-rows", "4"]) == 0
    capfd.readouterr()
    assert main([*call, "card", "tiny:int8"]) == 0
    text = capfd.readouterr().out
    for said in (
        "# tiny:int8",
        "bits\\_per\\_weight",
        "perplexity",
        "kl\\_mean",
        "lr = 0.001",
        "seed = 7",
        "web:latest @",
    ):
        assert said in text
    assert text.count("<circle") == 3, "the model, and both of what was made from it"
    page = root.parent / "card.html"
    assert main([*call, "card", "tiny:int8", "--to", str(page), "--json"]) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (told["format"], told["file"], len(told["reports"])) == ("html", str(page), 3)
    assert page.read_text() == told["text"]
    assert main([*call, "card", "web"]) == 2
    assert "not a model" in capfd.readouterr().err


def test_a_folder_brings_a_card_unless_the_model_has_its_own(
    root: Path, store: Store, put_model: Put, put_data: Put, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = put_model()
    put_model("own", files={"README.md": b"mine"})
    put_data()

    def export(name: str, to: str) -> str:
        assert main(["--store", str(root), "export", name, "--to", str(tmp_path / to), "--json"]) == 0
        return str(json.loads(capfd.readouterr().out.splitlines()[-1])["id"])

    first = export("tiny", "first")
    assert "Nothing was measured" in (tmp_path / "first" / "README.md").read_text()
    assert export("tiny", "again") == first
    assert main(["--store", str(root), "eval", "tiny", "--data", "web", "--max-rows", "4"]) == 0
    capfd.readouterr()
    assert len(reports_of(store, model)) == 1
    assert export("tiny", "measured") != first
    card = (tmp_path / "measured" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| perplexity |" in card
    export("own", "own")
    assert (tmp_path / "own" / "README.md").read_bytes() == b"mine"
