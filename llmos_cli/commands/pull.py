"""`llmos pull`: take from a remote what the store lacks."""

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import Unsafe, UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size

if TYPE_CHECKING:
    from llmos_cli.remote.exchange.partial import Selection
    from llmos_cli.remote.exchange.pull import PulledRef
    from llmos_cli.ui.session import Session

_HUB = "hf://"
_PAIRS = {"--layers": "--layers 0-7, or one as in --layers 3", "--rank": "--rank 0/4 for the first of four"}
_DONE = {"new": "new", "moved": "moved", "forced": "moved, forced"}


def pull(
    ctx: typer.Context,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="A remote's name, or a URL.", show_default=False)],
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Refs to pull.", show_default=False)
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Pull every ref.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Take the remote's value where both sides have changed.")
    ] = False,
    files: Annotated[list[str] | None, typer.Option("--files", metavar="GLOB", help="Take only these files.")] = None,
    tensors: Annotated[
        list[str] | None, typer.Option("--tensors", metavar="GLOB", help="Take only tensors with these names.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="A-B", help="Take only tensors of these layers.", show_default=False),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", metavar="R/W", help="Take only the share of process R of W.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="What to call such a part here.", show_default=False)
    ] = None,
    require_signed: Annotated[
        bool, typer.Option("--require-signed", help="Only refs that somebody trusted has signed.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="With --all: remove refs that are gone there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False,
) -> None:
    """Fetch refs and what they need from a remote.

    Only what the store lacks is fetched, and every byte is checked before it is used. A pull that was stopped goes on
    where it was. With --force, what a ref held before stays in 'llmos log' and as NAME:TAG~1. --prune removes refs that
    came from this remote, have not moved since, and are not there any more.

    With --require-signed, a ref counts only if a key from the section [trust] of config.toml has signed its value
    (llmos tag --sign), the signature has not expired and no later one has been seen; nothing is taken otherwise. The
    line 'require_signed = ["nas"]' at the top of config.toml asks for that at every pull from nas, "*" from anywhere.

    A part of one ref is taken with --files, --tensors, --layers or --rank: only its bytes are fetched, and they become
    an object of their own, REF-part or what --as says. A later pull of the whole fetches the rest. --files takes whole
    files; the others choose, from the safetensors files that remain, the tensors that all of them allow. --layers goes
    by the first number in a tensor's name. --rank 0/4 is the first of four shares, REF-0-of-4: the tensors in their
    order, cut into runs of about equal bytes, so that all ranks together have each tensor once.

    hf://ORG/NAME[@REVISION] is a model of a Hugging Face hub, kept under REF (by default NAME). It is pinned to the
    commit that the revision is now, and each file is checked against the hub's digest. Taken is what a model needs from
    the top folder: safetensors, JSON, tokenizers, chat templates, licence; pickles (.bin, .pt), which can run code when
    they are loaded, only if --files names them. HF_ENDPOINT, HF_TOKEN and 'hf auth login' count.

    Examples:
      llmos pull nas tiny
      llmos pull nas web:v2 tiny
      llmos pull /mnt/usb/models --all --dry-run
      llmos pull nas tiny --layers 0-7 --as tiny-front
      llmos pull nas tiny --files '*.json' --rank 0/4
      llmos pull hf://Qwen/Qwen3-0.6B qwen
      llmos pull hf://ORG/NAME-GGUF@v1.0 --files '*Q4_K_M.gguf'
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.exchange.prune import remove_here, surplus_here
    from llmos_cli.remote.exchange.pull import execute_pull, plan_pull
    from llmos_cli.remote.exchange.signed import must_be_signed
    from llmos_cli.remote.open import find_remote

    here = session(ctx)
    by_tensor = bool(tensors or layers or rank)
    if remote.startswith(_HUB):
        if by_tensor or name:
            raise UsageError(
                "a hub gives whole files", hint=f"llmos pull {remote} {(refs or ['NAME'])[0]} --files '*.safetensors'"
            )
        if everything or prune or len(refs or []) > 1:
            raise UsageError("a model from a hub has one name here", hint=f"llmos pull {remote} NAME")
        if require_signed:
            raise Unsafe(
                "a hub signs no refs", hint="pull it, look at it, and sign it yourself: llmos tag REF --sign KEY"
            )
        return _pull_from_hub(here, remote, refs[0] if refs else None, files or [], force=force, dry_run=dry_run)
    if files or by_tensor:
        if everything or prune or len(refs or []) != 1:
            raise UsageError("a part is of one ref", hint=f"llmos pull {remote} REF --files '*.json'")
        return _pull_part(
            here,
            remote,
            (refs or [""])[0],
            _selection(files, tensors, layers, rank),
            name,
            force=force,
            require_signed=require_signed,
            dry_run=dry_run,
        )
    if name:
        raise UsageError("--as names a part", hint=f"pull it, then: llmos tag {(refs or ['REF'])[0]} {name}")
    if bool(refs) == everything:
        raise UsageError("name the refs to pull, or use --all", hint=f"llmos pull {remote} --all")
    if prune and not everything:
        raise UsageError("--prune goes with --all", hint=f"llmos pull {remote} --all --prune --dry-run")
    wanted = [parse_ref(text) for text in refs or []]
    start = time.monotonic()
    with here.open_store() as store:
        source = find_remote(store, remote, here.cwd)
        if prune and (require_signed or must_be_signed(store, source)):
            raise Unsafe(
                "--prune would believe a remote unsigned, and with a ref it forgets which value was the newest",
                hint="remove them by name: llmos rm REF",
            )
        plan = plan_pull(store, source, None if everything else wanted, force=force, signed=require_signed)
        surplus = surplus_here(store, source, {item.ref for item in plan.refs}) if prune else ()
        done = None if dry_run else execute_pull(store, source, plan, here.out.progress)
        for entry in () if dry_run else surplus:
            remove_here(store, entry)
    seconds = time.monotonic() - start
    received = done.received if done else plan.total_bytes
    listed = [_describe(item) for item in plan.refs]
    first = listed[0] if listed else {"ref": None, "id": None}
    found: dict[str, Any] = {
        "remote": source.name,
        "url": source.transport.url,
        "refs": listed,
        "id": first["id"],
        "ref": first["ref"],
        "received": received,
        "packs": done.packs if done else len(plan.fetches),
        "reused": done.reused if done else None,
        "pruned": [str(entry.ref) for entry in surplus],
        "dry_run": dry_run,
        "seconds": round(seconds, 3),
    }
    here.out.result(found)
    would = "would pull" if dry_run else "pulled"
    for item in plan.refs:
        if item.moves:
            here.out.line(f"{would} {item.ref} @{item.id.short} from {source.label} ({_DONE[item.status]})")
    for entry in surplus:
        here.out.line(f"{'would remove' if dry_run else 'removed'} {entry.ref}: it is gone from {source.label}")
    unchanged = sum(item.status == "unchanged" for item in plan.refs)
    ahead = [str(item.ref) for item in plan.refs if item.status == "ahead"]
    if not plan.refs:
        here.out.line(f"nothing to pull: {source.label} has no refs")
    elif unchanged == len(plan.refs) and not received:
        here.out.line(f"up to date with {source.label}: {plural(unchanged, 'ref')}")
    elif unchanged:
        here.out.line(f"{plural(unchanged, 'ref')} unchanged")
    if ahead:
        here.out.line(f"{', '.join(ahead)} stays: it has moved on from what {source.label} has")
        here.out.hint(f"llmos push {source.label} {' '.join(ahead)}")
    if received:
        verb = "to fetch" if dry_run else "received"
        took = "" if dry_run else f", {duration(seconds)}"
        reused = f", {plural(done.reused, 'object')} here already" if done and done.reused else ""
        here.out.say(f"{size(received)} {verb}{reused}{took}")


def _selection(files: list[str] | None, tensors: list[str] | None, layers: str | None, rank: str | None) -> "Selection":
    from llmos_cli.remote.exchange.partial import Selection

    def pair(text: str | None, pattern: str, option: str) -> tuple[int, int] | None:
        if text is None:
            return None
        match = re.fullmatch(pattern, text)
        if match is None:
            raise UsageError(f"malformed {option} {text[:80]!r}", hint=f"write {_PAIRS[option]}")
        first, last = int(match[1]), int(match[2] or match[1])
        if (first > last) if option == "--layers" else (first >= last):
            raise UsageError(f"{option} {text} is nothing", hint=f"write {_PAIRS[option]}")
        return first, last

    return Selection(
        tuple(files or ()),
        tuple(tensors or ()),
        pair(layers, r"([0-9]{1,6})(?:-([0-9]{1,6}))?", "--layers"),
        pair(rank, r"([0-9]{1,6})/([0-9]{1,6})", "--rank"),
    )


def _pull_part(
    here: "Session",
    text: str,
    ref_text: str,
    selection: "Selection",
    name: str | None,
    *,
    force: bool,
    require_signed: bool,
    dry_run: bool,
) -> None:
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.exchange.partial import execute_part, plan_part
    from llmos_cli.remote.exchange.view import open_view
    from llmos_cli.remote.open import find_remote

    ref = parse_ref(ref_text)
    target = parse_ref(name) if name else selection.part_of(ref)
    start = time.monotonic()
    with here.open_store() as store:
        view = open_view(store, find_remote(store, text, here.cwd))
        plan = plan_part(store, view, ref, selection, target, force=force, signed=require_signed)
        done = None if dry_run else execute_part(store, view, plan, here.out.progress)
    seconds = time.monotonic() - start
    received = done.received if done else plan.pull.total_bytes
    status = "unchanged" if done and done.unchanged else "moved" if plan.current else "new"
    described = {
        "ref": str(target),
        "id": str(done.id) if done else None,
        "previous": str(plan.current) if plan.current else None,
        "status": status,
    }
    here.out.result(
        {
            "remote": view.remote.name,
            "url": view.remote.transport.url,
            "refs": [described],
            "id": described["id"],
            "ref": str(target),
            "part_of": {"ref": str(ref), "id": str(plan.source_id)},
            "files": [entry.path for entry in plan.files],
            "tensors": [info.name for _, infos in plan.tensors for info in infos],
            "received": received,
            "reused": done.reused if done else None,
            "dry_run": dry_run,
            "seconds": round(seconds, 3),
        }
    )
    counts = [plural(len(plan.files), "file")] if plan.files else []
    counts += [plural(plan.tensor_count, "tensor")] if plan.tensors else []
    what = f"{' and '.join(counts)} of {view.label}/{ref}"
    if done is None:
        here.out.line(f"would pull {what} as {target}")
    else:
        here.out.line(f"pulled {what} as {target} @{done.id.short} ({status})")
    verb = "to fetch" if dry_run else "received"
    here.out.say(f"{size(received)} {verb}" + ("" if dry_run else f", {duration(seconds)}"))


def _pull_from_hub(
    here: "Session", text: str, name: str | None, patterns: list[str], *, force: bool, dry_run: bool
) -> None:
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.hub.hub import execute_hub_pull, open_hub, parse_hub_address, plan_hub_pull

    address = parse_hub_address(text)
    ref = parse_ref(name) if name else address.ref
    start = time.monotonic()
    with here.open_store() as store:
        web = open_hub()
        plan = plan_hub_pull(store, web, address, ref, patterns, force=force)
        done = None if dry_run else execute_hub_pull(store, web, plan, here.out.progress)
    seconds = time.monotonic() - start
    unchanged = done.commit is None or done.commit.unchanged if done else plan.unchanged
    status = "unchanged" if unchanged else "moved" if plan.current else "new"
    described = {
        "ref": str(ref),
        "id": str(done.id) if done else None,
        "previous": str(plan.current) if plan.current else None,
        "status": status,
    }
    here.out.result(
        {
            "remote": None,
            "url": str(address),
            "revision": plan.commit,
            "refs": [described],
            "id": described["id"],
            "ref": str(ref),
            "received": plan.total_bytes,
            "files": sorted([*(item.path for item in plan.fetch), *plan.kept]),
            "left_out": list(plan.left_out),
            "dry_run": dry_run,
            "seconds": round(seconds, 3),
        }
    )
    if unchanged:
        here.out.line(f"up to date with {address}: {ref}, commit {plan.commit[:12]}")
        return
    count = plural(len(plan.fetch) + len(plan.kept), "file")
    if done is None:
        here.out.line(f"would pull {ref} from {address}, commit {plan.commit[:12]}: {count}")
        for item in plan.fetch:
            here.out.line(f"  {size(item.size):>8}  {item.path}")
    else:
        here.out.line(f"pulled {ref} @{done.id.short} from {address}, commit {plan.commit[:12]}: {count} ({status})")
    kept = f", {plural(len(plan.kept), 'file')} here already" if plan.kept else ""
    left = f", {plural(len(plan.left_out), 'file')} left out" if plan.left_out else ""
    here.out.say(f"{size(plan.total_bytes)} {'to fetch' if dry_run else 'received'}{kept}{left}, {duration(seconds)}")


def _describe(item: "PulledRef") -> dict[str, Any]:
    return {
        "ref": str(item.ref),
        "id": str(item.id),
        "previous": str(item.previous) if item.previous else None,
        "status": item.status,
    }
