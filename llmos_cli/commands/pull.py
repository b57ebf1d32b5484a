"""`llmos pull`: take from a remote what the store lacks."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import Unsafe, UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size

if TYPE_CHECKING:
    from llmos_cli.remote.pull import PulledRef
    from llmos_cli.ui.session import Session

_HUB = "hf://"
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
    files: Annotated[
        list[str] | None, typer.Option("--files", metavar="GLOB", help="From a hub: take these files.")
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

    hf://ORG/NAME[@REVISION] is a model of a Hugging Face hub, kept under REF (by default NAME). It is pinned to the
    commit that the revision is now, and each file is checked against the hub's digest. Taken is what a model needs from
    the top folder: safetensors, JSON, tokenizers, chat templates, licence; pickles (.bin, .pt), which can run code when
    they are loaded, only if --files names them. HF_ENDPOINT, HF_TOKEN and 'hf auth login' count.

    Examples:
      llmos pull nas tiny
      llmos pull nas web:v2 tiny
      llmos pull /mnt/usb/models --all --dry-run
      llmos pull hf://Qwen/Qwen3-0.6B qwen
      llmos pull hf://ORG/NAME-GGUF@v1.0 --files '*Q4_K_M.gguf'
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.open import find_remote
    from llmos_cli.remote.prune import remove_here, surplus_here
    from llmos_cli.remote.pull import execute_pull, plan_pull
    from llmos_cli.remote.signed import must_be_signed

    here = session(ctx)
    if remote.startswith(_HUB):
        if everything or prune or len(refs or []) > 1:
            raise UsageError("a model from a hub has one name here", hint=f"llmos pull {remote} NAME")
        if require_signed:
            raise Unsafe(
                "a hub signs no refs", hint="pull it, look at it, and sign it yourself: llmos tag REF --sign KEY"
            )
        return _pull_from_hub(here, remote, refs[0] if refs else None, files or [], force=force, dry_run=dry_run)
    if files:
        raise UsageError("--files is for models from a hub", hint="llmos pull --help")
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


def _pull_from_hub(
    here: "Session", text: str, name: str | None, patterns: list[str], *, force: bool, dry_run: bool
) -> None:
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.hub import execute_hub_pull, open_hub, parse_hub_address, plan_hub_pull

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
