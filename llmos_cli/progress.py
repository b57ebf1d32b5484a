"""How long work reports itself: core functions take a `Progress`, the consoles in `ui/` draw it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One bar: a label, an amount done, an optional total."""

    def advance(self, amount: int = 1) -> None:
        """Add to what is done; cheap, callable from any thread."""

    def note(self, text: str) -> None:
        """Replace the short text shown after the bar ("loss 3.21")."""


class Progress(Protocol):
    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> AbstractContextManager[Task]:
        """Open a bar; `unit` is "B" for bytes (shown as MB/s) or a plural noun ("tokens", "steps")."""

    def warn(self, message: str) -> None:
        """Say something the user should know that does not stop the work."""


class _SilentTask:
    def advance(self, amount: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Silent:
    """The default: draws nothing, but keeps warnings so that a caller can show them."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> AbstractContextManager[Task]:
        return nullcontext(_SilentTask())

    def warn(self, message: str) -> None:
        self.warnings.append(message)
