"""Real servers on loopback, for as long as the tests run: Ceph RGW, moto's S3, Azurite, HDFS, a web server.

They die with the test runner, even if that is killed.
"""

import ctypes
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

BUCKET: Final = "llmos-test"
CEPH_COMMANDS: Final = ("monmaptool", "ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")
AZURITE_ACCOUNT: Final = "devstoreaccount1"
# Azurite's own well-known key; it opens nothing else.
AZURITE_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass
class S3Server:
    """`secret` must never be seen in any output: tests look for it."""

    endpoint: str
    key: str = "LLMOSTESTKEY"
    secret: str = "canary-5ecret-0f-the-test5"

    @cached_property
    def client(self) -> Any:
        """Another client than ours, so that a mistake made in both directions is seen."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_REGION": "us-east-1"}

    def url(self, prefix: str, *, endpoint: str | None = None) -> str:
        return f"s3://{BUCKET}/{prefix}?endpoint={endpoint or self.endpoint}"

    def keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return sorted(item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", []))

    def get(self, key: str) -> bytes | None:
        try:
            data: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)


def missing(commands: Sequence[str]) -> list[str]:
    return [command for command in commands if shutil.which(command) is None]


@contextmanager
def ceph(folder: Path) -> Iterator[S3Server]:
    """One monitor, one OSD in memory, one gateway; nothing asks who anybody is, except the gateway."""
    monitor, gateway = free_ports(2)
    server = S3Server(f"http://127.0.0.1:{gateway}")
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    conf, fsid, osd = folder / "ceph.conf", str(uuid.uuid4()), str(uuid.uuid4())
    conf.write_text(_CEPH_CONF.format(folder=folder, fsid=fsid, monitor=monitor, gateway=gateway))

    def run(*command: str) -> None:
        done = subprocess.run([*command, "-c", str(conf)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"

    with _processes(folder) as start:
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", str(folder / "map"))
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "map"))
        start("ceph-mon", "-i", "a", "-c", str(conf), "-f")
        run("ceph", "osd", "new", osd, "0", "--connect-timeout", "30")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0", "-c", str(conf), "-f")
        keys = ("--access-key", server.key, "--secret-key", server.secret)
        run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        start("radosgw", "-n", "client.rgw", "-c", str(conf), "-f")
        wait_for_port(gateway)
        server.client.create_bucket(Bucket=BUCKET)
        yield server


@contextmanager
def moto(folder: Path) -> Iterator[S3Server]:
    (port,) = free_ports(1)
    server = S3Server(f"http://127.0.0.1:{port}")
    with _processes(folder) as start:
        start(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
        wait_for_port(port)
        server.client.create_bucket(Bucket=BUCKET)
        yield server


def azurite_command() -> str | None:
    return shutil.which("azurite-blob")


@contextmanager
def azurite(folder: Path, command: str) -> Iterator[str]:
    """Its endpoint, with the account."""
    (port,) = free_ports(1)
    folder.mkdir(parents=True, exist_ok=True)
    with _processes(folder) as start:
        place = (
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            str(port),
        )
        start(command, *place, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry")
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}/{AZURITE_ACCOUNT}"


@contextmanager
def hdfs(folder: Path, hadoop: str) -> Iterator[str]:
    """Hadoop's own mini cluster, one name node and one data node."""
    port, web = free_ports(2)
    with _processes(folder) as start:
        command = str(Path(hadoop) / "bin/mapred")
        start(command, "minicluster", "-nomr", "-format", "-nnport", str(port), "-nnhttpport", str(web))
        wait_for_port(port, 120)
        yield f"hdfs://127.0.0.1:{port}"


@contextmanager
def web(folder: Path, logs: Path) -> Iterator[str]:
    """Static files by HTTP, with ranges."""
    (port,) = free_ports(1)
    serve = "import sys, uvicorn; from starlette.applications import Starlette; from starlette.routing import Mount; "
    serve += "from starlette.staticfiles import StaticFiles; files = Mount('/', StaticFiles(directory=sys.argv[1])); "
    serve += "uvicorn.run(Starlette(routes=[files]), host='127.0.0.1', port=int(sys.argv[2]))"
    with _processes(logs) as start:
        start(sys.executable, "-c", serve, str(folder), str(port))
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def secure_redirect(folder: Path, target: str) -> Iterator[str]:
    """An https server that sends every reader on to `target`; its certificate lies in folder/server.pem."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    (folder / "server.pem").write_bytes(_certificate())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def _certificate() -> bytes:
    """A key and a certificate for 127.0.0.1, as PEM."""
    import ipaddress
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(names, critical=True).sign(key, hashes.SHA256())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form) + certificate.public_bytes(serialization.Encoding.PEM)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for_port(port: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing listens on port {port}"
            time.sleep(0.05)


@contextmanager
def _processes(folder: Path) -> Iterator[Callable[..., None]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{Path(command[0]).name}.out", "wb") as out:
            die = {"preexec_fn": _die_together}
            running.append(subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, **die))

    try:
        yield start
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def _die_together() -> None:
    """Linux: be killed when the parent is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


_CEPH_CONF: Final = """[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor}/0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms mon cluster mode = crc
ms mon service mode = crc
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
paxos propose interval = 0.05
paxos min wait = 0.02
run dir = {folder}
admin socket = ''
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
osd objectstore = memstore
memstore device bytes = 4294967296
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
rgw frontends = beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1
rgw thread pool size = 64
"""
