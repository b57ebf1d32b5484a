"""A small Hugging Face hub on loopback: one repository, its revisions, and big files served from another host.

It speaks the endpoints that a pull uses, as the hub does: `api/models/.../revision/...?blobs=true` gives a commit with
sizes and digests, `.../resolve/COMMIT/PATH` gives small files and sends whoever wants big ones elsewhere.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "org/tiny"


@dataclass
class Hub:
    """`commits` are the files by commit, `branches` the commits by name; files above `big` bytes lie at `cdn`. With a
    `token`, nobody else is let in. `redirect` is where big files are said to be, in the place of the truth."""

    url: str = ""
    cdn: str = ""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    big: int = 10_000
    token: str | None = None
    gated: bool = False
    redirect: str | None = None
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def publish(self, branch: str, files: dict[str, bytes]) -> str:
        """A new commit, at which the branch is from now on."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def describe(self, commit: str) -> dict[str, Any]:
        siblings = []
        for path, data in self.commits[commit].items():
            item: dict[str, Any] = {"rfilename": path, "size": len(data)}
            item["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if len(data) > self.big:
                item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(item)
        return {"id": REPO, "sha": commit, "siblings": siblings}

    def bytes_from(self, host: str) -> list[str]:
        """The ranges asked for there, "" for a whole file."""
        return [headers.get("Range", "") for where, _, headers in self.seen if where == host]


def _handler(hub: Hub, where: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            hub.seen.append((where, self.path, dict(self.headers.items())))
            path = unquote(urlsplit(self.path).path)
            if where == "cdn":
                return self._cdn(path)
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._send(401, b"", {"X-Error-Code": "GatedRepo" if hub.gated else "RepoNotFound"})
            if found := re.fullmatch(f"/api/models/{REPO}/revision/(.+)", path):
                commit = hub.branches.get(found[1], found[1])
                if commit not in hub.commits:
                    return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return self._send(200, json.dumps(hub.describe(commit)).encode(), {})
            found = re.fullmatch(f"/{REPO}/resolve/([0-9a-f]+)/(.+)", path)
            data = hub.commits.get(found[1], {}).get(found[2]) if found else None
            if data is None:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            if len(data) > hub.big:
                target = hub.redirect or f"{hub.cdn}/{hashlib.sha256(data).hexdigest()}"
                return self._send(302, b"", {"Location": target})
            return self._content(data)

        def _cdn(self, path: str) -> None:
            for files in hub.commits.values():
                for data in files.values():
                    if path == f"/{hashlib.sha256(data).hexdigest()}":
                        return self._content(data)
            return self._send(404, b"", {})

        def _content(self, data: bytes) -> None:
            asked = re.fullmatch("bytes=([0-9]+)-", self.headers.get("Range", ""))
            if not asked:
                return self._send(200, data, {})
            start = int(asked[1])
            if start >= len(data):
                return self._send(416, b"", {})
            return self._send(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of our business."""


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), _handler(hub, where)) for where in ("hub", "cdn")]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
