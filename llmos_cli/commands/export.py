"""`llmos export`: a model in the form that another program reads."""

import difflib
from pathlib import Path
from typing import Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural, size


def export(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The model or checkpoint.", show_default=False)],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Where to; made if missing.", show_default=False, readable=False)
    ],
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="hf, a folder; gguf, a file for llama.cpp; keras, for BERT; onnx, openvino or pt2, a graph.",
        ),
    ] = "hf",
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="bf16|f16|f32|q8_0|q4_0|q4_1|mxfp4",
            help="Of the weights in a GGUF file.  [default: the model's own, else bf16]",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Keep the export under this ref.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write a model as transformers, vLLM or llama.cpp load it.

    hf: a folder for transformers and vLLM, quantized models too. gguf: one file for llama.cpp and Ollama, with the
    tokenizer and the chat template; a model of four or eight bits keeps its values. keras: a BERT as tf_model.h5, which
    train --init reads, too. onnx, openvino and pt2, experimental: a graph from token ids to logits. What is written is
    compared with the model. The same export again comes out of the store.

    Examples:
      llmos export tiny --to ./tiny-hf
      llmos export tiny-int4 --to ./out --format gguf
      llmos export tiny --to ./out --format gguf --type q8_0 --name tiny-gguf
      llmos export bert --to ./bert-keras --format keras
      llmos export tiny --to ./graph --format onnx
    """
    from llmos_cli.export.run import FORMATS
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.store.checkout import execute_checkout, plan_checkout
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    out = here.out
    for what, word, known in (("format", fmt, FORMATS), ("type", kind, _types() if kind else ())):
        if word is not None and word not in known:
            near = difflib.get_close_matches(word, known, 1, 0.3)
            raise UsageError(f"unknown {what} {word!r}", hint=f"use --{what} {(near or known)[0]}")
    if kind and fmt != "gguf":
        raise UsageError("--type is for --format gguf", hint="quantize first: llmos quantize REF NAME --scheme int4")
    target = parse_ref(name) if name else None
    folder = here.cwd / to.expanduser()
    with here.open_store() as store:
        from llmos_cli.export.run import export as run

        source = resolve(store, ref)
        made = run(store, source.id, source.label, fmt, kind, target, progress=out.progress)
        plan = plan_checkout(made.manifest, folder, force=force)
        execute_checkout(store, plan, out.progress)
    parity = made.manifest.meta.get("parity")
    out.result(
        {
            "id": str(made.id),
            "ref": str(target) if target else None,
            "source": str(source.id),
            "format": fmt,
            "type": made.manifest.meta.get("type"),
            "parity": parity,
            "bytes": made.manifest.size,
            "folder": str(folder),
            "made_before": made.made_before,
        }
    )
    out.line(f"{source.label} -> {folder}: {plural(len(made.manifest.files), 'file')}, {size(made.manifest.size)}")
    if isinstance(parity, dict) and parity.get("same_top") is not None:
        out.line(
            f"  compared    {100 * float(str(parity['same_top'])):.1f} % of next tokens the same, "
            f"KL divergence {parity['kl']} nats"
        )
    if made.made_before:
        out.say("this was exported before; the stored one was taken")


def _types() -> tuple[str, ...]:
    from llmos_cli.export.gguf import TYPES

    return TYPES
