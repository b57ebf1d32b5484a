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
    """Appends to `path`; keeps what it has up to `resumed_at` steps."""

    def __init__(self, path: Path, progress: Progress, *, resumed_at: int = 0) -> None:
        self.path = path
        self._progress = progress
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:
                file.seek(0)
                file.truncate(_kept(file, resumed_at))
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


def _kept(file: BinaryIO, last_step: int) -> int:
    """Where the lines up to `last_step` end; a torn or foreign line ends what can be kept."""
    end = 0
    while raw := file.readline(_LINE_BYTES):
        try:
            step = json.loads(raw)["step"] if raw.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):
            break
        if type(step) is not int or step > last_step:
            break
        end += len(raw)
    return end
