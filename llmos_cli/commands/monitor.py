"""`llmos monitor`: watch a server or a training run."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import AccessDenied, NotFound, RemoteUnavailable, UsageError, from_os_error
from llmos_cli.ui.session import Session, session

if TYPE_CHECKING:
    from llmos_cli.ui.watching import Rows, Sample

EVERY = 1.0
SHORT = 0.5
CALM_EVERY = 10.0
TIMEOUT = 5.0
TAIL_BYTES = 256 << 10
KEY_LETTERS = 12  # of a run's key in the name of its log


def monitor(
    ctx: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="[URL|NAME]", help="A server, or the name of a run.", show_default=False)
    ] = "http://127.0.0.1:8000",
    *,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="The server's API key.", show_default=False, readable=False
        ),
    ] = None,
) -> None:
    """Watch a server or a training run until Ctrl-C.

    A server (http://127.0.0.1:8000 unless named) tells how many texts it makes, how fast, and how long they take, from
    its /metrics; a run tells its loss and rate, from its log. With --json, one object a line.

    Examples:
      llmos monitor
      llmos monitor http://127.0.0.1:8080 --once
      llmos monitor tiny
    """
    here = session(ctx)
    if "://" in what:
        looks = _server(what.rstrip("/"), api_key_file)
    elif api_key_file is not None:
        raise UsageError("--api-key-file is for a server", hint="llmos monitor http://HOST:PORT --api-key-file FILE")
    else:
        looks = _run(here, what)
    _watch(here, what, looks, once=once)


def _watch(here: Session, title: str, looks: "Iterator[tuple[dict[str, Any], Rows]]", *, once: bool) -> None:
    """Each look on a terminal in the place of the one before; elsewhere one after the other, and calmer."""
    if once or here.json or not here.out.animate:
        for facts, rows in looks:
            if here.json:
                here.out.result(facts)
            else:
                here.out.line(title)
                for name, value in rows:
                    here.out.line(f"  {name:13} {value}")
            if once:
                return
            time.sleep(EVERY if here.json else CALM_EVERY)
        return
    from llmos_cli.ui.live import show_in_place

    show_in_place(([("", title), *rows] for _, rows in looks), every=EVERY)


def _server(url: str, api_key_file: Path | None) -> "Iterator[tuple[dict[str, Any], Rows]]":
    from llmos_cli.ui.watching import server_facts, server_rows

    key = None if api_key_file is None else _read(api_key_file).strip()
    before = _sample(url, key)
    time.sleep(SHORT)  # a rate needs two looks
    while True:
        now = _sample(url, key)
        facts = server_facts(before, now)
        yield {"url": url, "time": round(time.time(), 3), **facts}, server_rows(facts)
        before = now


def _sample(url: str, key: str | None) -> "Sample":
    import urllib.error
    import urllib.request

    from llmos_cli.ui.watching import read_sample

    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url} is no address of a server", hint="llmos monitor http://127.0.0.1:8000")
    request = urllib.request.Request(f"{url}/metrics", headers={"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return read_sample(response.read().decode("utf-8"), time.monotonic())
    except urllib.error.HTTPError as exc:
        if exc.code == 401:
            raise AccessDenied(f"{url} answers only with its API key", hint="--api-key-file FILE") from exc
        raise RemoteUnavailable(f"{url} answered /metrics with {exc.code}") from exc
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "reason", None) or exc
        raise RemoteUnavailable(
            f"no server of llmos answers at {url}: {reason}", hint="start one with: llmos serve REF"
        ) from exc


def _run(here: Session, name: str) -> "Iterator[tuple[dict[str, Any], Rows]]":
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.ui.watching import run_rows

    folder = here.find_store() / "logs" / "train"
    run = parse_ref(name).name
    found = sorted(folder.glob(f"{run}-{'[0-9a-f]' * KEY_LETTERS}.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise NotFound(f"no run named {name} has a log", hint=f"runs are named as in: llmos train {name} --data REF")
    path = found[-1]
    while True:
        lines = _tail(path)
        if not lines:
            raise NotFound(f"the run {name} has taken no step yet")
        yield {"run": name, **lines[-1]}, run_rows(lines)


def _tail(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            start = max(file.tell() - TAIL_BYTES, 0)
            file.seek(start)
            data = file.read()
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    whole = data[data.find(b"\n") + 1 if start else 0 : data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
