"""Models from a Hugging Face hub: `hf://ORG/NAME@REV`, pinned to a commit, and every file proven to be the hub's.

The hub is asked once what the revision is: a commit, its files, their sizes and digests. Files come from that commit
alone, into partials that outlive a kill; each is checked against the hub's own digest (SHA-256 for a big file, git's
name for a small one), which the hub's client does not do. Only when all are there does one transaction make the model.
What the ref already holds of the same digest is not fetched again.
"""

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final
from urllib.parse import quote

from llmos_cli.errors import (
    AccessDenied,
    Conflict,
    Damaged,
    NoSpace,
    NotFound,
    RemoteUnavailable,
    Unsafe,
    UsageError,
    from_os_error,
)
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe, Source
from llmos_cli.formats.names import RefName, check_paths
from llmos_cli.progress import Progress, Task
from llmos_cli.remote.hub.download import Answer, Passing, Web
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.intake.add import AddPlan, execute_add, kind_of
from llmos_cli.store.intake.proof import GIT, SHA256, digest_of, prove
from llmos_cli.store.leases import hold, hold_alone
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.partials import drop_partial, grow, partial_path
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import Commit

SCHEME: Final = "hf://"
COMMAND: Final = "pull"
# What `from_pretrained` reads, in the top folder, and the licence. Pickles (.bin, .pt) can run code when they are
# loaded and are never taken unless they are named; code (.py) neither.
DEFAULT_FILES: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*")
_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_STREAMS: Final = 4
_TRIES: Final = 3  # for a file whose bytes prove wrong
_ANSWER_BYTES: Final = 64 * limits.MiB
_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,199}\Z")
_ENDPOINT: Final = re.compile(r"https?://[^\s/@?#]+(?:/[^\s@?#]*)?\Z")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
_RANGE: Final = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+)\Z")


@dataclass(frozen=True)
class HubAddress:
    """`revision` is what was asked for: a branch, a tag, a commit."""

    repo: str
    revision: str = "main"

    @property
    def ref(self) -> RefName:
        """What the model is called where no other name is given."""
        return RefName(self.repo.rpartition("/")[2])

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision != "main" else "")


@dataclass(frozen=True)
class HubFile:
    """`digest` is "sha256:..." of its bytes, or "git:..." (the SHA-1 by which git names them)."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class HubPlan:
    """`commit` is what the revision was; `fetch` what is to come, `kept` what the ref has already (and where it came
    from), `left_out` the files that were not asked for. `current` is the ref's value."""

    address: HubAddress
    commit: str
    ref: RefName
    current: ObjectId | None
    fetch: tuple[HubFile, ...]
    kept: Mapping[str, tuple[HubFile, FileEntry, Source]]
    left_out: tuple[str, ...]
    arrived: int
    unchanged: bool

    @property
    def total_bytes(self) -> int:
        """What must still be fetched."""
        return sum(item.size for item in self.fetch) - self.arrived


@dataclass(frozen=True)
class HubResult:
    id: ObjectId
    received: int
    commit: Commit | None


def parse_hub_address(text: str) -> HubAddress:
    """Read hf://ORG/NAME[@REV]; raises UsageError."""
    repo, at, revision = text.removeprefix(SCHEME).partition("@")
    parts = repo.split("/")
    if (
        not 1 <= len(parts) <= 2
        or not all(_PART.match(part) and ".." not in part and "--" not in part for part in parts)
        or (at and (not _REVISION.match(revision) or ".." in revision))
    ):
        raise UsageError(f"malformed address {text[:200]!r}", hint="write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    return HubAddress(repo, revision) if at else HubAddress(repo)


def open_hub() -> Web:
    """The hub that $HF_ENDPOINT names, with the token that its own tools would use."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RemoteUnavailable("HF_HUB_OFFLINE is set: no hub may be asked", hint="unset HF_HUB_OFFLINE")
    if not _ENDPOINT.match(constants.ENDPOINT):  # not repeated: somebody may have put a password into it
        raise UsageError("HF_ENDPOINT is not the URL of a hub", hint="write it as https://HOST")
    return Web(constants.ENDPOINT, get_token())


def plan_hub_pull(
    store: Store, web: Web, address: HubAddress, ref: RefName, patterns: Sequence[str], *, force: bool
) -> HubPlan:
    """Ask what a revision is and decide what to fetch of it.

    Raises NotFound for a repository, revision or pattern that is not there, AccessDenied for one that is gated,
    Conflict if the ref holds something from elsewhere and may not be moved by `force`, Unsafe or Damaged for an answer
    that cannot be trusted.
    """
    commit, listed = _ask_revision(web, address)
    chosen = [item for item in listed if _wanted(item.path, patterns or DEFAULT_FILES)]
    weights = [item.path for item in listed if item.path.endswith(_OTHER_WEIGHTS)]
    if not patterns and weights and not any(item.path.endswith(".safetensors") for item in chosen):
        raise NotFound(
            f"{address} has no weights as safetensors, but {', '.join(weights[:3])}",
            hint=f"if that is what you want, name it: llmos pull {address} --files '{weights[0]}' --files '*.json'",
        )
    if not chosen:
        raise NotFound(
            f"{address} has none of {', '.join(patterns or DEFAULT_FILES)}",
            hint=f"name the files you want: --files '*'; there are {', '.join(item.path for item in listed[:5])}",
        )
    check_paths(item.path for item in chosen)
    entry = read_ref(store, ref)
    current = _readable(store, entry.id) if entry else None
    recipe = current.recipe if current else None
    ours = recipe is not None and recipe.command == COMMAND and recipe.params.get("repo") == address.repo
    if entry and not ours and not force:
        raise Conflict(
            f"{ref} holds something that did not come from {address}",
            hint=f"give the model a name of its own: llmos pull {address} NAME; or move {ref} with --force",
        )
    kept = _kept(current, chosen) if current and ours else {}
    fetch = tuple(item for item in chosen if item.path not in kept)
    arrived = sum(_arrived(store, item) for item in fetch)
    same = bool(current and ours and recipe and recipe.params == _params(address, commit, chosen))
    left_out = tuple(item.path for item in listed if item not in chosen)
    return HubPlan(
        address, commit, ref, entry.id if entry else None, fetch, kept, left_out, arrived, same and not fetch
    )


def execute_hub_pull(store: Store, web: Web, plan: HubPlan, progress: Progress) -> HubResult:
    """Fetch, check and store what was planned. Raises Damaged if the hub gives other bytes than it promised,
    RemoteUnavailable if it stops answering; what has arrived is kept for the next time."""
    if plan.unchanged and plan.current:
        return HubResult(plan.current, 0, None)
    _check_space(store, plan)
    purpose, current = f"pull from {plan.address}", [plan.current] if plan.current else []
    with hold_alone(store, "hub", purpose), hold(store, purpose, current, writes=True):
        with progress.task(f"fetching {plan.address}", total=sum(item.size for item in plan.fetch)) as task:
            ids = _fetch_all(store, web, plan, task)
        sources = {path: source for path, (_, _, source) in plan.kept.items()}
        sources |= {item.path: Source(_url_name(plan, item.path), item.size, ids[item.path]) for item in plan.fetch}
        files = [*plan.fetch, *(item for item, _, _ in plan.kept.values())]
        recipe = Recipe(
            COMMAND,
            _params(plan.address, plan.commit, files),
            sources=tuple(
                Source(_url_name(plan, path), sources[path].size, sources[path].id) for path in sorted(sources)
            ),
        )
        commit = execute_add(
            store,
            _as_added(store, plan),
            plan.ref,
            progress,
            kept=[entry for _, entry, _ in plan.kept.values()],
            recipe=lambda entries: recipe,
            message=f"pull {SCHEME}{plan.address.repo}@{plan.commit}",
        )
        for item in plan.fetch:
            drop_partial(partial_path(store, item.digest))
    return HubResult(commit.id, plan.total_bytes, commit)


def _params(address: HubAddress, commit: str, files: Sequence[HubFile]) -> dict[str, Any]:
    """What decides the bytes: not the name by which the commit was asked for."""
    return {"digests": {item.path: item.digest for item in files}, "repo": address.repo, "revision": commit}


def _url_name(plan: HubPlan, path: str) -> str:
    return f"{SCHEME}{plan.address.repo}@{plan.commit}/{path}"


def _as_added(store: Store, plan: HubPlan) -> AddPlan:
    paths = {item.path: partial_path(store, item.digest) for item in plan.fetch}

    def read(name: str) -> bytes:
        return paths[name].read_bytes() if name in paths else read_file(store, plan.kept[name][1])

    kind = kind_of(paths.keys() | plan.kept.keys(), read)
    return AddPlan(kind, tuple(sorted(paths.items())), sum(item.size for item in plan.fetch), ())


def _readable(store: Store, oid: ObjectId) -> Manifest | None:
    try:
        return read_manifest(store, oid)
    except (Damaged, NotFound):
        return None


def _kept(current: Manifest, chosen: Sequence[HubFile]) -> dict[str, tuple[HubFile, FileEntry, Source]]:
    """The files that the ref's value has already, by the digests noted when they came."""
    assert current.recipe
    noted = current.recipe.params.get("digests")
    sources = {source.name.partition("@")[2].partition("/")[2]: source for source in current.recipe.sources}
    kept = {}
    for item in chosen:
        entry, source = current.file(item.path), sources.get(item.path)
        if isinstance(noted, dict) and noted.get(item.path) == item.digest and entry and source:
            kept[item.path] = (item, entry, source)
    return kept


def _wanted(path: str, patterns: Sequence[str]) -> bool:
    """A pattern without a slash is about the top folder."""
    return any(
        fnmatch.fnmatchcase(path, pattern) and ("/" in pattern or pattern == "*" or "/" not in path)
        for pattern in patterns
    )


def _ask_revision(web: Web, address: HubAddress) -> tuple[str, list[HubFile]]:
    """The commit that a revision is, and its files."""
    url = f"{web.endpoint}/api/models/{address.repo}/revision/{quote(address.revision, safe='')}?blobs=true"

    def attempt() -> bytes:
        with web.get(url) as answer:
            _check_status(answer, web, address)
            data = bytearray()
            for block in answer.body():
                data += block
                if len(data) > _ANSWER_BYTES:
                    raise Damaged(f"{web.endpoint} answers with more than {_ANSWER_BYTES} bytes about {address}")
            length = answer.header("Content-Length")
            if length.isdecimal() and int(length) != len(data):
                raise Passing(f"its answer ended after {len(data)} of {length} bytes")
            return bytes(data)

    what = f"what {web.endpoint} says of {address}"
    value = canonical.loads(web.persist(str(address), attempt), what)
    commit = value.get("sha") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(commit, str) or not _COMMIT.match(commit):
        raise Damaged(f"{what} names no commit", hint="check HF_ENDPOINT: is it a hub?")
    if _COMMIT.match(address.revision) and commit != address.revision:
        raise Unsafe(f"{web.endpoint} answers with commit {commit} where {address.revision} was asked for")
    siblings = value.get("siblings")
    if not isinstance(siblings, list) or not siblings:
        raise NotFound(f"{address} has no files")
    if len(siblings) > limits.MANIFEST_FILES:
        raise Damaged(f"{what} lists more than {limits.MANIFEST_FILES} files")
    return commit, [_read_sibling(item, what) for item in siblings]


def _read_sibling(item: Any, what: str) -> HubFile:
    try:
        path, lfs = item["rfilename"], item.get("lfs")
        size, digest = (
            (lfs["size"], digest_of(SHA256, lfs["sha256"])) if lfs else (item["size"], digest_of(GIT, item["blobId"]))
        )
        if not isinstance(path, str) or type(size) is not int or size < 0 or not digest:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        name = item.get("rfilename") if isinstance(item, dict) else item
        raise Damaged(f"{what} does not say size and digest of {str(name)[:200]!r}") from exc
    return HubFile(path, size, digest)


def _check_status(answer: Answer, web: Web, address: HubAddress) -> None:
    code = answer.header("X-Error-Code")
    if answer.status in (200, 206):
        return
    if code == "RevisionNotFound":
        raise NotFound(
            f"{SCHEME}{address.repo} has no revision {address.revision}", hint=f"see {web.endpoint}/{address.repo}"
        )
    if code == "GatedRepo" or (answer.status in (401, 403) and code != "RepoNotFound"):
        raise AccessDenied(
            f"{web.endpoint} does not give {address} to you ({answer.status})",
            hint=f"ask for access at {web.endpoint}/{address.repo}, then: hf auth login (or set HF_TOKEN)",
        )
    if answer.status in (401, 404):
        raise NotFound(
            f"no {address} at {web.endpoint}",
            hint="check the name; a private one is only shown to its people: hf auth login (or set HF_TOKEN)",
        )
    raise RemoteUnavailable(f"{web.endpoint} answered {answer.status} to a request for {address}")


def _arrived(store: Store, item: HubFile) -> int:
    try:
        return min(partial_path(store, item.digest).stat().st_size, item.size)
    except FileNotFoundError:
        return 0


def _check_space(store: Store, plan: HubPlan) -> None:
    """What is still to come, and the model itself beside what has come."""
    status = os.statvfs(store.root)
    free, needed = status.f_bavail * status.f_frsize, plan.total_bytes + sum(item.size for item in plan.fetch)
    if needed > free:
        raise NoSpace(
            f"{store.root} has {free} bytes free, the pull may need {needed}", hint="free some space: llmos gc"
        )


def _fetch_all(store: Store, web: Web, plan: HubPlan, task: Task) -> dict[str, ObjectId]:
    """All files, several side by side; the first error ends it. Returns the ids of their bytes."""
    by_digest: dict[str, list[HubFile]] = {}
    for item in plan.fetch:
        by_digest.setdefault(item.digest, []).append(item)
    ids: dict[str, ObjectId] = {}
    with ThreadPoolExecutor(_STREAMS, "hub") as pool:
        try:
            running: dict[Future[ObjectId], list[HubFile]] = {
                pool.submit(_fetch, store, web, plan, same[0], task): same for same in by_digest.values()
            }
            for future in as_completed(running):
                oid = future.result()
                ids |= {item.path: oid for item in running[future]}
        except BaseException:
            web.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return ids


def _fetch(store: Store, web: Web, plan: HubPlan, item: HubFile, task: Task) -> ObjectId:
    """One file, whole and proven, in its partial; what was there of it is not fetched again."""
    url = f"{web.endpoint}/{plan.address.repo}/resolve/{plan.commit}/{quote(item.path)}"
    path = partial_path(store, item.digest)
    durable.touch(path)
    with grow(path) as file:
        growth = _Growth(file, item, task)
        for _ in range(_TRIES):
            web.persist(f"{plan.address}, file {item.path}", lambda: _go_on(web, plan, url, growth), growth.size)
            oid = prove(file, item.digest)
            if oid:
                return oid
            growth.restart()
    drop_partial(path)
    raise Damaged(
        f"{web.endpoint} gives bytes for {item.path} that are not those of {plan.address} ({item.digest})",
        hint="nothing was stored; try again later, or from another network",
    )


@dataclass
class _Growth:
    """A partial as it grows; `told` is how much of it the progress bar knows."""

    file: BinaryIO
    item: HubFile
    task: Task
    told: int = field(default=0)

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def tell(self) -> None:
        now = self.size()
        if now > self.told:
            self.task.advance(now - self.told)
            self.told = now

    def restart(self) -> None:
        try:
            self.file.truncate(0)
        except OSError as exc:
            raise from_os_error(exc, f"writing {self.file.name}") from exc


def _go_on(web: Web, plan: HubPlan, url: str, growth: _Growth) -> None:
    """One request for what is missing of a file."""
    have, item = growth.size(), growth.item
    growth.tell()
    if have > item.size:
        growth.restart()
        have = 0
    if have == item.size:
        return
    with web.get(url, have) as answer:
        if answer.status == 416:
            growth.restart()
            raise Passing("it does not have the range that is missing")
        if not (have and answer.status == 206):
            _check_status(answer, web, plan.address)
        if answer.header("Content-Encoding") not in ("", "identity"):
            raise Passing("it answers with bytes encoded in a way that was not asked for")
        given = _RANGE.match(answer.header("Content-Range"))
        if answer.status == 206 and (not given or (int(given[1]), int(given[2])) != (have, item.size)):
            growth.restart()
            raise Passing("it answers with another range than it was asked for")
        if have and answer.status == 200:
            growth.restart()
            have = 0
        length = answer.header("Content-Length")
        if length.isdecimal() and have + int(length) != item.size:
            raise Passing(f"it answers with {length} bytes where {item.size - have} are missing")
        for block in answer.body():
            if growth.size() + len(block) > item.size:
                growth.restart()
                raise Passing(f"it sends more than the {item.size} bytes of the file")
            durable.write_all(growth.file, block)
            growth.tell()
    if growth.size() < item.size:
        raise Passing(f"the answer ended after {growth.size()} of {item.size} bytes")
