import pytest

from llmos_cli.ui.datasets import show_splits
from llmos_cli.ui.output import Output

COUNTS = {"documents": 5, "tokens": 50, "rows": 5, "shards": 1, "labels": {"0": 4, "1": 1}}


def test_labels_are_shown_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    show_splits(Output(), {"splits": {"train": COUNTS}, "labels": ["bad", "good"]})
    shown = capsys.readouterr().out
    assert "bad  4  ####" in shown
    assert "good  1  ##" in shown


def test_of_a_mix_each_part_is_shown_with_its_weight(capsys: pytest.CaptureFixture[str]) -> None:
    part = {"weight": 3, "splits": {"train": COUNTS, "valid": COUNTS}}
    show_splits(Output(), {"mix": [part, part | {"weight": 1}], "labels": ["bad", "good"]})
    shown = capsys.readouterr().out
    assert "labels, dataset000 x3 valid" in shown
    assert "labels, dataset001 x1 train" in shown
    assert shown.count("good  1  ##") == 4
