"""`llmos generate`: continue a text, on the command line."""

from typing import Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural

PROMPT_BYTES = 4 << 20


def generate(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A model or a checkpoint.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT|-]", help="What to continue; - reads it.", show_default=False)
    ] = None,
    *,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Stop after so many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=2.0, help="0 always takes the likeliest token.")
    ] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many tokens; 0 from all.")] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Repeats a text.", show_default=False)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.", show_default=False)
    ] = None,
) -> None:
    """Continue a text and print what comes after it.

    The prompt is the argument, or standard input with `-` or through a pipe (without its last line end). It is never
    cut: one that does not fit the model's context is an error.

    Examples:
      llmos generate tiny "def main("
      llmos generate tiny --seed 1 --temperature 0 "import "
      git log -1 --format=%B | llmos generate tiny - --stop . --json
    """
    here = session(ctx)
    text = _read_stdin(named=prompt == "-") if prompt in (None, "-") else _checked(prompt or "", "the prompt")
    if "" in (stop or ()):
        raise UsageError("--stop needs a text that is not empty")

    import secrets

    from llmos_cli.serve.servable import check_servable
    from llmos_cli.store.leases import hold
    from llmos_cli.store.refs.resolve import resolve

    with here.open_store() as store:
        found = resolve(store, ref)
        with hold(store, "generate", [found.id]):
            manifest = check_servable(store, found)
            from llmos_cli.serve.load import load_engine

            engine = load_engine(store, manifest, here.out.progress).engine
    from llmos_cli.serve.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=secrets.randbits(32) if seed is None else seed,
        stop=tuple(stop or ()),
    )
    ids = engine.encoder.text(text)
    parts = []
    for piece in engine.generate(ids, sampling):
        parts.append(piece.text)
        here.out.text(piece.text)
    here.out.text("\n")
    here.out.result(
        {
            "id": str(found.id),
            "ref": found.label,
            "text": "".join(parts),
            "finish_reason": piece.finish_reason,
            "usage": {
                "prompt_tokens": len(ids),
                "completion_tokens": piece.tokens,
                "total_tokens": len(ids) + piece.tokens,
            },
            "seed": sampling.seed,
        }
    )
    here.out.detail(f"{plural(len(ids), 'prompt token')}, {plural(piece.tokens, 'token')} made, seed {sampling.seed}")


def _read_stdin(*, named: bool) -> str:
    import sys

    if sys.stdin is None or (not named and sys.stdin.isatty()):
        raise UsageError("there is no prompt", hint='llmos generate REF "the beginning", or pipe a text into it')
    data = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(data) > PROMPT_BYTES:
        raise UsageError(f"the prompt on standard input is over {PROMPT_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"the prompt on standard input is not UTF-8: byte {exc.start} is not text") from exc
    return text.removesuffix("\n").removesuffix("\r")


def _checked(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise UsageError(f"{what} is not UTF-8: character {exc.start} is not text") from exc
    return text
