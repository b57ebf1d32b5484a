import json
from pathlib import Path

from llmos_cli.progress import Silent
from llmos_cli.train.log.metrics import RunLog


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_has_one_curve(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    with RunLog(path, Silent()) as log:
        for step in range(1, 8):
            log.append({"step": step, "loss": 1.0})
    with RunLog(path, Silent(), resumed_at=4) as log:
        assert steps(path) == [1, 2, 3, 4]
        log.append({"step": 5, "loss": 2.0})
    assert steps(path) == [1, 2, 3, 4, 5]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n')
    with RunLog(path, Silent()):
        assert path.read_text() == ""


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    with RunLog(path, Silent(), resumed_at=9) as log:
        log.append({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RunLog(path, Silent()) as log:
        log.append({"step": 1})
        assert steps(path) == [1]


def test_a_log_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    progress = Silent()
    with RunLog(tmp_path / "logs" / "run.jsonl", progress) as log:
        log.append({"step": 1})
        log.append({"step": 2})
    assert len(progress.warnings) == 1
    assert "training goes on" in progress.warnings[0]


def test_a_full_disk_only_warns() -> None:
    progress = Silent()
    with RunLog(Path("/dev/full"), progress) as log:
        log.append({"step": 1})
        log.append({"step": 2})
    assert len(progress.warnings) == 1
