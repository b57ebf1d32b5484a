"""How fast are push and pull beside cp + fsync and S3 clients, and how little do they move?

python -m tests.bench.exchange [--gb 1] [--rounds 5] [--dir DIR] [--only PARTS]

Parts: folder, rgw, tuned, uptodate, resume. Models are made as models.py tells, in --dir or in a temporary folder; with
--dir they are kept and used again. The gateway is Ceph's on loopback with an OSD in memory, started for each part that
wants it; `aws s3 cp` and `rclone copyto` of the plain file with their own defaults are its peers. What is not installed
is said and left out. A peer's download is not synced, ours is. No peak of memory is below this process's own, which
`python -c pass` shows.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llmos_cli.formats import limits
from llmos_cli.formats.layout import PACK_SUFFIX
from tests.bench.measure import (
    RSS,
    Cost,
    alternate,
    evict,
    files_below,
    goal,
    make_models,
    median,
    missing,
    print_machine,
    report_costs,
    size_of,
    spend,
    version,
)
from tests.bench.peers import COPY, LLMOS
from tests.contract import store_servers
from tests.contract.fault_proxy import FaultProxy
from tests.contract.store_servers import BUCKET, S3Server

CP: Final = "cp + fsync"
OURS: Final = "llmos"
FILE: Final = "model.safetensors"
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Bench:
    """`store` holds the dense model as `base` and its fine-tune as `tuned`."""

    work: Path
    models: Path
    rounds: int

    @property
    def store(self) -> Path:
        return self.work / "store"

    @property
    def remote(self) -> Path:
        return self.work / "remote"

    @property
    def pulled(self) -> Path:
        return self.work / "pulled"

    @property
    def model(self) -> Path:
        return self.models / "base"

    def fill(self) -> None:
        spend([*LLMOS, "--store", str(self.store), "init"])
        for name in ("base", "tuned"):
            spend([*LLMOS, "--store", str(self.store), "add", str(self.models / name), name])

    def push(self, url: str, *refs: str, env: Environment | None = None) -> Cost:
        return spend([*LLMOS, "--store", str(self.store), "push", url, *refs], env=env)

    def pull(self, url: str, *refs: str, env: Environment | None = None) -> Cost:
        return spend([*LLMOS, "--store", str(self.pulled), "pull", url, *refs], env=env)

    def fresh_store(self) -> None:
        shutil.rmtree(self.pulled, ignore_errors=True)
        spend([*LLMOS, "--store", str(self.pulled), "init"])
        os.sync()

    def check_pulled(self) -> None:
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        spend([*LLMOS, "--store", str(self.pulled), "checkout", "base", str(out)])
        same = filecmp.cmp(self.model / FILE, out / FILE, shallow=False)
        print("byte for byte what was pushed" if same else "NOT WHAT WAS PUSHED")
        shutil.rmtree(out)

    def report(self, title: str, taken: Mapping[str, list[Cost]], yardstick: str, size: int) -> None:
        """With rates in bytes of the plain model, whatever is moved for them."""
        notes = {name: f"{size / median(costs) / 1e6:7.0f} MB/s" for name, costs in taken.items()}
        report_costs(f"{title}, {size / 1e6:.1f} MB", taken, yardstick, notes)
        goal(f"peak RSS of {title}", max(cost.memory for cost in taken[OURS]) / 1e6, RSS / 1e6, " MB")


def copy(source: Path, target: Path) -> Cost:
    return spend(["sh", "-c", COPY, "sh", str(source), str(target)])


def folder(bench: Bench) -> None:
    copied, back = bench.work / "copied", bench.work / "back"

    def before(gone: Path, source: Path, cold: bool) -> None:
        shutil.rmtree(gone, ignore_errors=True)
        os.sync()
        evict(files_below(source) if cold else ())

    def copy_there(cold: bool) -> Cost:
        before(copied, bench.model, cold)
        return copy(bench.model, copied)

    def copy_back(cold: bool) -> Cost:
        before(back, copied, cold)
        return copy(copied, back)

    def push(cold: bool) -> Cost:
        before(bench.remote, bench.store / "packs", cold)
        return bench.push(str(bench.remote), "base")

    def pull(cold: bool) -> Cost:
        bench.fresh_store()
        evict(files_below(bench.remote / "packs") if cold else ())
        return bench.pull(str(bench.remote), "base")

    pairs: Mapping[str, tuple[Callable[[bool], Cost], Callable[[bool], Cost]]] = {
        "push to a folder": (copy_there, push),
        "pull from a folder": (copy_back, pull),
    }
    for what, (theirs, ours) in pairs.items():
        for cold in (True, False):
            title = f"{what}, {'cold' if cold else 'warm'}"
            runs = {CP: lambda cold=cold, run=theirs: run(cold), OURS: lambda cold=cold, run=ours: run(cold)}
            taken = alternate(runs, bench.rounds)
            bench.report(title, taken, CP, size_of(bench.model))
            goal(f"time of {title}, to cp + fsync (0.8 of its rate)", median(taken[OURS]) / median(taken[CP]), 1.25)
    print(f"{size_of(bench.remote) / 1e6:.1f} MB at the remote")
    bench.check_pulled()
    for path in (copied, back, bench.remote, bench.pulled):
        shutil.rmtree(path)


@dataclass(frozen=True)
class Gateway:
    """Ceph's object gateway; it keeps what it holds in memory, so that what was removed must really go."""

    server: S3Server
    conf: Path

    @property
    def environment(self) -> Environment:
        return self.server.environment

    def empty(self, prefix: str) -> None:
        keys = self.server.keys(prefix)
        for start in range(0, len(keys), 1000):
            items = [{"Key": f"{prefix}/{key}"} for key in keys[start : start + 1000]]
            self.server.client.delete_objects(Bucket=BUCKET, Delete={"Objects": items})
        spend(["radosgw-admin", "gc", "process", "--include-all", "-c", str(self.conf)])

    def pack_sizes(self, prefix: str) -> dict[str, int]:
        pages = self.server.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/packs/")
        items = (item for page in pages for item in page.get("Contents", []))
        return {item["Key"].rpartition("/")[2]: item["Size"] for item in items}


@contextmanager
def gateway(bench: Bench) -> Iterator[Gateway | None]:
    """None, which it says, where Ceph is not installed."""
    absent = store_servers.missing(store_servers.CEPH_COMMANDS)
    if absent:
        print(f"skipped: RGW, no {', '.join(absent)}")
        yield None
        return
    with tempfile.TemporaryDirectory(dir=bench.work, prefix="ceph-") as scratch:
        place = Path(scratch)
        with store_servers.ceph(place) as server:
            yield Gateway(server, place / "ceph.conf")


@dataclass(frozen=True)
class Client:
    """A program that copies a plain file to `place` and back."""

    words: Sequence[str]
    place: str
    env: Environment

    def put(self, file: Path) -> Cost:
        return spend([*self.words, str(file), self.place], env=self.env)

    def get(self, file: Path) -> Cost:
        return spend([*self.words, self.place, str(file)], env=self.env)


def clients(server: S3Server) -> dict[str, Client]:
    """Those that are installed; what their users have set up does not count."""
    found = {}
    if not missing("aws"):
        print(version(["aws", "--version"]))
        nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        # Older gateways do not know the checksums that it sends by default.
        plain = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
        words = ["aws", "--endpoint-url", server.endpoint, "s3", "cp", "--only-show-errors"]
        env = {**server.environment, **nothing, **plain}
        found["aws s3 cp"] = Client(words, f"s3://{BUCKET}/aws/{FILE}", env)
    if not missing("rclone"):
        print(version(["rclone", "version"]))
        settings = {"TYPE": "s3", "PROVIDER": "Ceph", "ENV_AUTH": "true", "FORCE_PATH_STYLE": "true"}
        settings["ENDPOINT"] = server.endpoint
        env = {**server.environment, **{f"RCLONE_CONFIG_RGW_{name}": value for name, value in settings.items()}}
        env["AWS_CA_BUNDLE"] = ""  # it refuses one, and loopback needs none
        words = ["rclone", "copyto", "--config", os.devnull]
        found["rclone copyto"] = Client(words, f"rgw:{BUCKET}/rclone/{FILE}", env)
    return found


def rgw(bench: Bench) -> None:
    with gateway(bench) as rgw:
        if rgw is None:
            return
        peers, back = clients(rgw.server), bench.work / "back"
        url = rgw.server.url(OURS)

        def push() -> Cost:
            rgw.empty(OURS)
            return bench.push(url, "base", env=rgw.environment)

        def put(client: Client) -> Cost:
            rgw.empty(client.place.split("/")[-2])
            return client.put(bench.model / FILE)

        def pull() -> Cost:
            bench.fresh_store()
            return bench.pull(url, "base", env=rgw.environment)

        def get(client: Client) -> Cost:
            back.unlink(missing_ok=True)
            os.sync()
            return client.get(back)

        for title, ours, theirs in (("push to RGW", push, put), ("pull from RGW", pull, get)):
            peer_runs = {name: lambda peer=peer, run=theirs: run(peer) for name, peer in peers.items()}
            taken = alternate({OURS: ours, **peer_runs}, bench.rounds)
            fastest = min(peers, key=lambda name, taken=taken: median(taken[name]), default=OURS)
            bench.report(title, taken, fastest, size_of(bench.model))
            if peers:
                goal(f"time of {title}, to {fastest}", median(taken[OURS]) / median(taken[fastest]), 1.0)
        bench.check_pulled()
        shutil.rmtree(bench.pulled)
        back.unlink(missing_ok=True)


def tuned(bench: Bench) -> None:
    """Tools that know files and not weights move all of a fine-tune."""
    model, copied, moved = bench.models / "tuned", bench.work / "copied", []

    def push() -> Cost:
        shutil.rmtree(bench.remote, ignore_errors=True)
        bench.push(str(bench.remote), "base")
        os.sync()
        before = size_of(bench.remote)
        cost = bench.push(str(bench.remote), "tuned")
        moved.append(size_of(bench.remote) - before)
        return cost

    def whole() -> Cost:
        shutil.rmtree(copied, ignore_errors=True)
        os.sync()
        return copy(model, copied)

    taken = alternate({CP: whole, OURS: push}, bench.rounds)
    bench.report("push of the fine-tune to a folder that has the dense model", taken, CP, size_of(model))
    goal("what it moves, to its size", max(moved) / size_of(model), 0.35)
    shutil.rmtree(copied)
    shutil.rmtree(bench.remote)


def uptodate(bench: Bench) -> None:
    with gateway(bench) as rgw:
        places: dict[str, tuple[str, Environment]] = {"a folder": (str(bench.remote), {})}
        if rgw:
            places["RGW"] = (rgw.server.url(OURS), rgw.environment)
        for url, env in places.values():
            bench.push(url, "base", "tuned", env=env)
        runs: dict[str, Callable[[], Cost]] = {
            "python -c pass": lambda: spend([sys.executable, "-c", "pass"]),
            "llmos --version": lambda: spend([*LLMOS, "--version"]),
        }
        for name, (url, env) in places.items():
            runs[f"push to {name}"] = lambda url=url, env=env: bench.push(url, "base", "tuned", env=env)
        taken = alternate(runs, bench.rounds)
        report_costs("push of what is there already", taken, "python -c pass", {})
        for name in places:
            goal(f"an up-to-date push to {name}", 1000 * median(taken[f"push to {name}"]), 300, " ms")
    shutil.rmtree(bench.remote)


@dataclass(frozen=True)
class Target:
    """Where a push is killed: `arrived` are the packs there, by size; `received` the bytes of packs sent there since it
    was emptied."""

    name: str
    url: str
    empty: Callable[[], object]
    arrived: Callable[[], dict[str, int]]
    received: Callable[[], int]
    env: Environment = field(default_factory=dict)


@dataclass(frozen=True)
class Killed:
    """What of a push had `arrived` when it was killed; bytes that were under way then, and bytes that the second run
    sent although they had arrived."""

    arrived: int
    under_way: int
    twice: int


def resume(bench: Bench) -> None:
    def empty() -> None:
        shutil.rmtree(bench.remote, ignore_errors=True)

    def packs() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in bench.remote.glob(f"packs/*/*{PACK_SUFFIX}")}

    def written() -> int:
        total = 0  # unfinished files, too: they stay for a day
        for path in bench.remote.glob("packs/*/*"):
            with suppress(FileNotFoundError):  # finished at this moment
                total += path.stat().st_size
        return total

    _resume(bench, Target("a folder", str(bench.remote), empty, packs, written))
    empty()
    with gateway(bench) as rgw:
        if rgw is None:
            return
        proxy = FaultProxy(rgw.server.endpoint)

        def empty_rgw() -> None:
            rgw.empty(OURS)
            proxy.forget()

        def asked() -> int:
            puts = [request for request in list(proxy.seen) if request.method == "PUT"]
            return sum(request.size for request in puts if "/packs/" in request.path)

        try:
            url = rgw.server.url(OURS, endpoint=proxy.url)
            _resume(bench, Target("RGW", url, empty_rgw, lambda: rgw.pack_sizes(OURS), asked, rgw.environment))
        finally:
            proxy.close()


def _resume(bench: Bench, target: Target) -> None:
    """Kill pushes when between a quarter and three quarters of their bytes are there, and run them again. A body that
    the kill cut off counts whole at the gateway, and as far as it was written in a folder."""
    target.empty()
    words = [*LLMOS, "--json", "--store", str(bench.store), "push", target.url, "base", "tuned"]
    plan = _ask([*words, "--dry-run"], target.env)
    kills = []
    for number in range(bench.rounds):
        target.empty()
        os.sync()
        share = 0.25 + 0.5 * (number + 0.5) / bench.rounds
        if killed := _kill_and_resume(words, target, share * plan["sent"]):
            kills.append(killed)
    what = f"pushes of {plan['packs']} packs, {plan['sent'] / 1e6:.1f} MB, to {target.name}"
    print(f"\n{what}, killed: {len(kills)} of {bench.rounds}", flush=True)
    for killed in kills:
        print(f"{killed.arrived:6} packs there, {killed.under_way / 1e6:8.1f} MB under way, {killed.twice} bytes twice")
    if not kills:
        print("skipped: all ended before they were killed; take a larger model")
        return
    one = limits.PACK_TARGET_BYTES
    goal("sent again although it had arrived, most", max(killed.twice for killed in kills) / one, 0, " packs")
    again = [(killed.under_way + killed.twice) / one for killed in kills]
    goal("sent again in all, median", statistics.median(again), 1, " packs")
    goal("sent again in all, most", max(again), 1, " packs")


def _kill_and_resume(words: Sequence[str], target: Target, enough: float) -> Killed | None:
    """None if the push was faster."""
    with subprocess.Popen(words, env={**os.environ, **target.env}, stdout=subprocess.DEVNULL) as push:
        while push.poll() is None and target.received() < enough:
            time.sleep(0.002)
        push.kill()
    here, early = target.arrived(), target.received()
    if push.returncode == 0:
        return None
    sent = _ask(words, target.env)["sent"]
    lacking = sum(size for name, size in target.arrived().items() if name not in here)
    return Killed(len(here), early - sum(here.values()), sent - lacking)


def _ask(words: Sequence[str], env: Environment) -> Any:
    done = subprocess.run(words, env={**os.environ, **env}, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


PARTS: Final[Mapping[str, Callable[[Bench], None]]] = {
    "folder": folder,
    "rgw": rgw,
    "tuned": tuned,
    "uptodate": uptodate,
    "resume": resume,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure; keeps the models")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    options = parser.parse_args()
    parts = [PARTS[name] for name in options.only.split(",")]
    print_machine()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="work-") as scratch:
        work = Path(scratch)
        models = (options.dir or work) / f"models-{options.gb:g}"
        make_models(models, options.gb)
        bench = Bench(work, models, options.rounds)
        bench.fill()
        for part in parts:
            part(bench)


if __name__ == "__main__":
    main()
