"""`llmos generate`: continue a text, on the command line."""

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import PartlyDone, UsageError, from_os_error
from llmos_cli.ui.session import Session, session
from llmos_cli.ui.text import count, plural

if TYPE_CHECKING:
    from llmos_cli.formats.canonical import Json

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
    requests: Annotated[
        Path | None,
        typer.Option(
            "--in", metavar="FILE", help="Answer each line of JSON in FILE.", show_default=False, readable=False
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where the answers go; what is there is not asked again."),
    ] = None,
) -> None:
    """Continue a text and print what comes after it, or answer a file of requests.

    The prompt is the argument, or standard input with `-` or through a pipe (without its last line end). It is never
    cut: one that does not fit the model's context is an error.

    With --in, each line is a request as /v1/completions or /v1/chat/completions takes it, alone or in the form of
    OpenAI's batches (custom_id, url, body). A run that was stopped goes on where it was.

    Examples:
      llmos generate tiny "def main("
      llmos generate tiny --seed 1 --temperature 0 "import "
      git log -1 --format=%B | llmos generate tiny - --stop . --json
      llmos generate tiny --in requests.jsonl --out answers.jsonl
    """
    here = session(ctx)
    if requests is not None or answers is not None:
        if requests is None or answers is None or prompt is not None:
            raise UsageError("--in and --out go together, without a prompt")
        _answer_file(here, ref, requests, answers)
        return
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
            from llmos_cli.serve.load import load_writer

            engine = load_writer(store, manifest, here.out.progress)
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


def _answer_file(here: Session, ref: str, requests: Path, answers: Path) -> None:
    from llmos_cli.serve.servable import check_servable
    from llmos_cli.store.leases import hold
    from llmos_cli.store.refs.resolve import resolve

    with here.open_store() as store, _opened(requests, "rb") as lines:
        found = resolve(store, ref)
        manifest = check_servable(store, found)
        with hold(store, "generate", [found.id]), _opened(answers, "a+b") as out:
            known = _answered(out, answers, found.id.short)
            from llmos_cli.serve.batch import answer_all
            from llmos_cli.serve.load import load_writer

            engine = load_writer(store, manifest, here.out.progress)

            def write(answer: "dict[str, Json]") -> None:
                out.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                out.flush()

            total = sum(1 for line in lines if line.strip())
            lines.seek(0)
            with here.out.progress.task("answering", total=total, unit="requests") as task:
                done = answer_all(engine, found.label, found.id.short, lines, known, write, task.advance)
    here.out.result(
        {"id": str(found.id), "ref": found.label, "answered": done.answered, "refused": done.refused,
         "known": done.known, "completion_tokens": done.tokens}
    )  # fmt: skip
    before = f", {count(done.known)} were there" if done.known else ""
    here.out.line(f"{plural(done.answered, 'answer')} in {answers}, {plural(done.tokens, 'token')}{before}")
    if done.refused:
        raise PartlyDone(
            f"{plural(done.refused, 'request')} could not be answered as asked",
            hint=f"their lines in {answers} say why (status_code 400)",
        )


def _opened(path: Path, mode: str) -> IO[bytes]:
    try:
        return path.open(mode)
    except OSError as exc:
        raise from_os_error(exc, f"opening {path}") from exc


def _answered(out: IO[bytes], path: Path, model: str) -> frozenset[str]:
    """The names of requests that were answered before; a line that a crash cut short is taken off."""
    out.seek(0)
    known, whole = set(), 0
    for line in out:
        if not line.endswith(b"\n"):
            break
        try:
            answer = json.loads(line)
            name, body = answer["custom_id"], answer["response"]["body"]
        except (ValueError, KeyError, TypeError) as exc:
            raise UsageError(f"{path} holds something else than answers", hint="name another file with --out") from exc
        if body.get("system_fingerprint", model) != model:
            raise UsageError(f"{path} holds answers of another model", hint="name another file with --out")
        known.add(name)
        whole += len(line)
    out.truncate(whole)
    return frozenset(known)


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
