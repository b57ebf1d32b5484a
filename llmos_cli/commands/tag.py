"""`llmos tag`: a new name for an object, and who says so."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import Conflict, Damaged, UsageError
from llmos_cli.ui.session import session

if TYPE_CHECKING:
    from llmos_cli.formats.names import RefName
    from llmos_cli.store.handle import Store
    from llmos_cli.store.refs.resolve import Resolved
    from llmos_cli.ui.session import Session


def tag(
    ctx: typer.Context,
    ref: Annotated[str | None, typer.Argument(metavar="REF", help="What to point to.", show_default=False)] = None,
    new: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The new ref, as NAME or NAME:TAG.", show_default=False)
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Move NAME if it points elsewhere.")] = False,
    sign: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEY", help="Sign NAME, or REF alone, with a private key.", readable=False),
    ] = None,
    valid_days: Annotated[
        float | None, typer.Option("--valid-days", help="How long the signature holds.  [default: for ever]", min=0.01)
    ] = None,
    new_key: Annotated[
        Path | None, typer.Option("--new-key", metavar="FILE", help="Make a key to sign with, and nothing else.")
    ] = None,
) -> None:
    """Point another ref to an object; nothing is copied.

    A ref that exists moves only with --force; its earlier value stays in 'llmos log' and as NAME:TAG~1.

    With --sign, the ref's value is signed: the signature goes where the ref is pushed and pulled. Whoever has the
    public key in the section [trust] of config.toml can 'pull --require-signed': a ref that is unsigned, forged,
    expired or rolled back is then refused. The ref's next value must be signed anew.

    Examples:
      llmos tag tiny tiny:v1
      llmos tag tiny~1 tiny --force
      llmos tag @3f2a9c01 best
      llmos tag --new-key ~/.config/llmos.key
      llmos tag tiny tiny:v1 --sign ~/.config/llmos.key --valid-days 90
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.store.refs.keys import load_key
    from llmos_cli.store.refs.resolve import resolve
    from llmos_cli.store.refs.signatures import sign_ref

    here = session(ctx)
    if new_key:
        if ref or sign:
            raise UsageError("--new-key makes a key and does nothing else", hint=f"llmos tag --new-key {new_key}")
        return _make_key(here, new_key)
    if ref is None or (new is None and sign is None):
        raise UsageError("name the object and its new ref", hint="llmos tag REF NAME")
    if valid_days and not sign:
        raise UsageError("--valid-days is about a signature", hint=f"llmos tag {ref} --sign KEY --valid-days 90")
    key = load_key(sign) if sign else None
    target = parse_ref(new or ref)
    with here.open_store() as store:
        source = resolve(store, ref)
        moved = new is not None and _point(store, target, source, ref, force=force)
        statement = sign_ref(store, target, key, days=valid_days) if key else None
    signed = (
        {"key": key.public, "serial": statement.serial, "expires": statement.expires} if key and statement else None
    )
    here.out.result({"ref": str(target), "id": str(source.id), "changed": moved, "signed": signed})
    if new is not None:
        here.out.line(f"{target} {'now points' if moved else 'points'} to @{source.id.short}")
    if statement:
        until = f", until {statement.expires}" if statement.expires else ""
        here.out.line(f"signed {target} @{source.id.short} as number {statement.serial}{until}")


def _point(store: "Store", target: "RefName", source: "Resolved", text: str, *, force: bool) -> bool:
    """Move the ref; whether it was elsewhere before."""
    from llmos_cli.store.refs.point import point, point_anew
    from llmos_cli.store.refs.refs import read_ref

    try:
        current = read_ref(store, target)
    except Damaged:
        if not force:
            raise
        point_anew(store, target, source.id, message=f"tag: {source.label}, over damage")
        return True
    moved = current is None or current.id != source.id
    if current is not None and moved and not force:
        raise Conflict(
            f"{target} already points to @{current.id.short}", hint=f"move it: llmos tag {text} {target} --force"
        )
    if moved:
        expected = current.id if current else None
        point(store, target, source.id, expected=expected, message=f"tag: {source.label}")
    return moved


def _make_key(here: "Session", path: Path) -> None:
    from llmos_cli.store.refs.keys import new_key

    public = new_key(here.cwd / path.expanduser())
    here.out.result({"key": str(path), "public": public})
    here.out.line(public)
    here.out.say(f"the private key is in {path}: keep it, show it to nobody")
    here.out.hint(f'whoever trusts it puts into config.toml: [trust], then: NAME = "{public}"')
