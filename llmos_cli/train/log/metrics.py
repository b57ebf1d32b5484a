"""The metrics of a run as JSON lines, one a step, so that a curve can be drawn while it grows.

A resumed run drops the lines after the step it continues from: there is never a second curve. The log is a convenience:
when it cannot be written, training warns once and goes on.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from llmos_cli.progress import Progress

_LINE_BYTES: Final = 1 << 16  # far above any line of ours: a foreign file must not fill the memory


class RunLog:
    """Appends to `path`; keeps what it has up to `resumed_at` steps.

    What the lines say of the run's past outlives them, unless it is made `anew`: `began`, when it was first started (a
    Unix time, None if that is not known), and `productive`, the seconds of its steps up to `resumed_at`.
    """

    def __init__(self, path: Path, progress: Progress, *, resumed_at: int = 0, anew: bool = False) -> None:
        self.path = path
        self.began: float | None = None
        self.productive = 0.0
        self._progress = progress
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:
                file.seek(0)
                first = _numbers(file.readline(_LINE_BYTES))
                if not anew and "time" in first:
                    self.began = first["time"] - first.get("elapsed", 0.0)
                file.seek(0)
                end, last = _kept(file, resumed_at)
                self.productive = last.get("goodput", 0.0) * last.get("elapsed", 0.0)
                file.truncate(end)
            self._file = open(path, "ab")  # noqa: SIM115 - closed in __exit__
        except OSError as exc:
            self._give_up(exc)

    def append(self, line: dict[str, Any]) -> None:
        """Write one step, in one write: a reader that follows the file sees whole lines."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, exc: OSError) -> None:
        self._progress.warn(f"the metrics log {self.path} cannot be written ({exc.strerror or exc}); training goes on")
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _numbers(raw: bytes) -> dict[str, float]:
    """The numbers of one line; none of a torn or foreign one."""
    try:
        value = json.loads(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return {}
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return {}
    return {key: number for key, number in value.items() if type(number) in (int, float)}


def _kept(file: BinaryIO, last_step: int) -> tuple[int, dict[str, float]]:
    """Where the lines up to `last_step` end, and the last of them; a torn or foreign line ends what can be kept."""
    end, last = 0, dict[str, float]()
    while raw := file.readline(_LINE_BYTES):
        line = _numbers(raw)
        if not line or line["step"] > last_step:
            break
        end, last = end + len(raw), line
    return end, last
