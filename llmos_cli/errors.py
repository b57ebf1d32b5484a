"""Every error a user can meet, each with its exit code.

    LlmosError                1   failed
    ├── UsageError            2   usage or configuration
    ├── PartlyDone            3   partly done
    ├── NotFound             10   store, ref or object not found
    ├── Busy                 11   held by another process
    ├── AccessDenied         12   authentication or permission
    ├── Damaged              13   damaged data
    │   └── UnknownVersion   13   written by something newer
    ├── Unsafe               14   refused as unsafe
    ├── NoSpace              15   no space left
    ├── RemoteUnavailable    16   remote unavailable
    ├── Conflict             17   the ref moved meanwhile
    └── Interrupted         130   stopped by SIGINT
        └── Terminated      143   stopped by SIGTERM

An error is one sentence that names the path, ref or id it is about, and a hint: the next command to type.
This module imports nothing of ours; it knows nothing of how errors are shown.
"""

import errno


class LlmosError(Exception):
    """A failure that a user can understand; anything else that escapes is a bug."""

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LlmosError):
    exit_code = 2
    code = "usage"


class PartlyDone(LlmosError):
    exit_code = 3
    code = "partly-done"


class NotFound(LlmosError):
    exit_code = 10
    code = "not-found"


class Busy(LlmosError):
    exit_code = 11
    code = "busy"


class AccessDenied(LlmosError):
    exit_code = 12
    code = "access-denied"


class Damaged(LlmosError):
    exit_code = 13
    code = "damaged"


class UnknownVersion(Damaged):
    code = "unknown-version"


class Unsafe(LlmosError):
    exit_code = 14
    code = "unsafe"


class NoSpace(LlmosError):
    exit_code = 15
    code = "no-space"


class RemoteUnavailable(LlmosError):
    exit_code = 16
    code = "remote-unavailable"


class Conflict(LlmosError):
    exit_code = 17
    code = "conflict"


class Interrupted(LlmosError):
    exit_code = 130
    code = "interrupted"


class Terminated(Interrupted):
    exit_code = 143
    code = "terminated"


EXIT_CODES: dict[int, str] = {
    0: "ok",
    1: "failed",
    2: "usage or configuration",
    3: "partly done",
    10: "store, ref or object not found",
    11: "busy: held by another process",
    12: "authentication or permission",
    13: "damaged, or an unknown version",
    14: "refused as unsafe",
    15: "no space left",
    16: "remote unavailable",
    17: "conflict: the ref moved meanwhile",
    130: "stopped by SIGINT (Ctrl-C)",
    141: "stopped by SIGPIPE",
    143: "stopped by SIGTERM",
}


def from_os_error(exc: OSError, what: str) -> LlmosError:
    """The LlmosError for an OSError met while doing `what` ("writing /x/y"); raise it `from exc`."""
    reason = exc.strerror or str(exc)
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"no space left while {what}", hint="free some space (llmos gc) and run the command again")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"{reason} while {what}")
    if isinstance(exc, FileNotFoundError):
        return NotFound(f"no such file while {what}")
    if exc.errno == errno.EIO:
        return Damaged(f"the disk reported an input/output error while {what}")
    return LlmosError(f"{reason} while {what}")
