from pathlib import Path

import numpy as np
import pytest
import torch

from llmos_cli.errors import UsageError
from llmos_cli.train.parallel.launch import Launch, check_launch, ignored_config
from llmos_cli.train.tasks.language import next_tokens


def test_shares_are_the_rows_of_the_whole_in_order() -> None:
    whole = next_tokens({"input_ids": np.arange(8 * 5).reshape(8, 5)}, None)
    parts = [part for rank in range(2) for part in whole.share(rank, 2).parts(2, torch.device("cpu"))]
    assert torch.equal(torch.cat([targets for _, targets in parts]), torch.from_numpy(whole.targets))
    assert np.array_equal(torch.cat([inputs["input_ids"] for inputs, _ in parts]), whole.inputs["input_ids"])
    assert {whole.share(rank, 4).counted for rank in range(4)} == {whole.counted}


@pytest.mark.parametrize(
    ("launch", "more", "message", "hint"),
    [
        (Launch(3), {}, "a batch of 16 rows cannot be shared by 3 processes", "use one of 1, 2, 4, 8, 16 processes"),
        (Launch(8), {"accumulate": 4}, "by 8 processes in 4 parts each", "use one of 1, 2, 4 processes"),
        (Launch(0), {}, "--procs 0 is not a whole number", None),
        (Launch(2, 2, 2, "host:1"), {}, "--node-rank 2 is not a whole number from 0 to 1", None),
        (Launch(2, 2), {}, "--nnodes needs a place to meet", "--rdzv HOST:PORT"),
        (Launch(2, meeting="host:1"), {}, "--rdzv is for several machines", "--nnodes N"),
        (Launch(2), {"parallel": "fsdp2"}, "--parallel fsdp2 is not offered", "--parallel ddp"),
    ],
)
def test_what_cannot_be_shared_is_refused(launch: Launch, more: dict[str, object], message: str, hint: str) -> None:
    asked = {"parallel": "ddp", "batch": 16, "accumulate": 1} | more
    with pytest.raises(UsageError) as caught:
        check_launch(launch, **asked)  # type: ignore[arg-type]
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)


def test_what_accelerate_was_told_is_named_as_ignored(tmp_path: Path) -> None:
    assert ignored_config(tmp_path) == ()
    path = tmp_path / ".cache/huggingface/accelerate/default_config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("num_processes: 2\n")
    (note,) = ignored_config(tmp_path)
    assert note.startswith(f"{path} is not used")
