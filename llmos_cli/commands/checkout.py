"""`llmos checkout`: an object's files in a folder."""

import time
from pathlib import Path
from typing import Annotated

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size


def checkout(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="What to write.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to; made if missing.", show_default=False, readable=False)
    ],
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    oms: Annotated[
        Path | None,
        typer.Option(
            "--oms",
            metavar="KEY",
            help="Sign what is written, for model_signing, with this private key.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Write an object's files into a folder, byte for byte.

    A model comes out as the Hugging Face folder it was. Every byte is checked; nothing is written outside DIR, and no
    file is replaced without --force.

    --oms writes DIR/model.sig, a bundle of OpenSSF Model Signing over the files, with an elliptic-curve key (openssl
    ecparam -name prime256v1 -genkey -noout -out KEY); `model_signing verify key` checks it.

    Examples:
      llmos checkout base ./llama
      llmos checkout tiny:v1 out --force
      llmos checkout tiny~1 before
      llmos checkout tiny release --oms release.key
    """
    from llmos_cli.store.checkout import execute_checkout, plan_checkout
    from llmos_cli.store.packs.objects import read_manifest
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    start = time.monotonic()
    with here.open_store() as store:
        source = resolve(store, ref)
        manifest = read_manifest(store, source.id)
        plan = plan_checkout(manifest, here.cwd / folder, force=force)
        key = here.cwd / oms.expanduser() if oms else None
        if key:
            from llmos_cli.store.oms import check_signing, sign_checkout

            check_signing(plan, key)
        found = {"ref": source.label, "id": str(source.id), "kind": manifest.kind, "folder": str(here.cwd / folder)}
        if dry_run:
            here.out.line(f"would write {plural(len(plan.files), 'file')}, {size(plan.total_bytes)}, to {folder}")
            here.out.result(found | {"files": len(plan.files), "size": plan.total_bytes, "dry_run": True})
            return
        done = execute_checkout(store, plan, here.out.progress)
    signature = str(sign_checkout(plan, key)) if key else None
    seconds = time.monotonic() - start
    here.out.result(
        found | {"files": done.files, "size": done.bytes, "signature": signature, "seconds": round(seconds, 3)}
    )
    written = f"{plural(done.files, 'file')}, {size(done.bytes)}"
    here.out.line(f"wrote {source.label} to {folder}: {written}, {duration(seconds)}")
    if signature:
        here.out.say(f"signed: {signature}")
