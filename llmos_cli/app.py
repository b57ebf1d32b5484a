"""The command table, the global options, and the one place that catches errors and exits.

Only this module reads the environment and ends the process. Every verb is one function of the same name in
`llmos_cli/commands/`; a module with a dict `SUBCOMMANDS` is a verb with verbs of its own. Start-up imports nothing
heavy, and a process that runs one verb imports only that verb's module.
"""

import contextlib
import functools
import importlib
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final, NoReturn

import typer

from llmos_cli import __version__
from llmos_cli.errors import EXIT_CODES, Interrupted, LlmosError, NotFound, UsageError, from_os_error
from llmos_cli.ui.help import root_help
from llmos_cli.ui.output import Output
from llmos_cli.ui.session import Session, session

# Every verb and what it is for, in the words of its own first line of help (a test compares them): the page that lists
# them must not import them all.
GROUPS: Final = {
    "store": {
        "init": "Make a store for data, models and results.",
        "add": "Keep a file, several files or a folder under a name.",
        "checkout": "Write an object's files into a folder, byte for byte.",
        "ls": "List what the store holds, by name.",
        "show": "Show an object: kind, size, tensors, how it was made, its files.",
        "log": "Show a ref's history and the tree of what it was made from.",
        "diff": "Compare two objects: tensors, files, settings, how they were made.",
        "tag": "Point another ref to an object; nothing is copied.",
        "rm": "Remove refs. Their objects stay until 'llmos gc'.",
        "du": "Show what refs amount to and what they take on disk.",
        "gc": "Remove what no ref, recent history or running command needs.",
        "fsck": "Check the store: every pack, object and ref.",
    },
    "exchange": {
        "remote": "Name the places that 'push' and 'pull' exchange with.",
        "push": "Send refs and what they need to a remote.",
        "pull": "Fetch refs and what they need from a remote.",
        "clone": "Make a store in DIR with all refs of a remote.",
        "backup": "Keep everything at a remote as a dated snapshot.",
        "restore": "Bring back what a backup has kept.",
    },
    "make": {
        "shard": "Turn text into token shards to train on.",
        "train": "Train a model on a dataset, for the task that it was made for.",
        "tune": "Search for the options of train that give the least loss.",
        "eval": "Measure how well a model does a dataset's task and keep the report.",
        "merge": "Make one model of an adapter and its base.",
        "quantize": "Make a model smaller and say what that costs in quality.",
        "export": "Write a model as transformers, vLLM or llama.cpp load it.",
        "card": "Describe a model: what it is, where from, how good.",
    },
    "run": {
        "serve": "Answer OpenAI-style requests with a model, without checking it out.",
        "generate": "Continue a text and print what comes after it, or answer a file of requests.",
        "monitor": "Watch a server or a training run until Ctrl-C.",
    },
    "system": {
        "doctor": "Check Python, libraries, devices, memory, disk and file system.",
        "completion": "Print a completion script: commands, options, values, refs.",
        "demo": "Try everything: text to a served, quantized model in about two minutes.",
    },
}
VERBS: Final = tuple(verb for verbs in GROUPS.values() for verb in verbs)

StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="The store to work on.", readable=False)
]  # what may be read is found out where it is read, with the exit code for it
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No messages, no progress.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More about what happens.")]
# Also accepted after the command, where people type them.
SHARED: Final = (
    inspect.Parameter("store", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=StoreOption),
    inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption),
    inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption),
    inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=VerboseOption),
)


def build(verbs: Iterable[str] = VERBS) -> typer.Typer:
    """The application with these verbs."""
    app = typer.Typer(
        name="llmos",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True, add_help_option=False)(_root)
    for verb in verbs:
        module = importlib.import_module(f"llmos_cli.commands.{verb}")
        subcommands: dict[str, Callable[..., None]] | None = getattr(module, "SUBCOMMANDS", None)
        if subcommands is None:
            register(app, verb, getattr(module, verb))
            continue
        group = typer.Typer(help=_sections(inspect.getdoc(module) or ""), rich_markup_mode=None)
        for name, function in subcommands.items():
            register(group, name, function)
        app.add_typer(group, name=verb)
    return app


def register(app: typer.Typer, verb: str, function: Callable[..., None]) -> None:
    """Add `function` as command `verb`, with the shared options and with errors turned into messages and exit codes."""

    @functools.wraps(function)
    def command(ctx: typer.Context, **options: Any) -> None:
        shared = {parameter.name: options.pop(parameter.name) for parameter in SHARED}
        try:
            ctx.obj = _merged(session(ctx), **shared)
            function(ctx, **options)
        except BaseException as exc:
            raise typer.Exit(report(exc, session(ctx).out)) from exc

    signature = inspect.signature(function, eval_str=True)
    parameters = [*signature.parameters.values(), *SHARED]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    app.command(verb, help=_sections(inspect.getdoc(function) or ""))(command)


def report(exc: BaseException, out: Output) -> int:
    """Tell the user what ended the command; returns the exit code."""
    trace = exc if out.verbose else None
    match exc:
        case typer.Exit():
            return exc.exit_code
        case SystemExit():
            return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        case BrokenPipeError():
            return 128 + signal.SIGPIPE
        case KeyboardInterrupt() | typer.Abort():
            error: LlmosError = Interrupted("interrupted")
        case LlmosError():
            error = exc
        case typer.TyperException():
            error = UsageError(exc.format_message().rstrip("."), hint=_usage_hint(exc))
        case OSError():
            error = from_os_error(exc, f"using {exc.filename}" if exc.filename else "writing output")
        case MemoryError():
            error = LlmosError("there is not enough memory for this")
        case _:
            error = LlmosError(
                f"this is a bug in llmos {__version__}: {type(exc).__name__}: {exc}",
                hint="what was committed is safe; please report it with the traceback above",
            )
            error.code, trace = "bug", exc
    # Where stderr is gone too, the exit code still tells.
    with contextlib.suppress(OSError):
        out.error(error.code, error.message, hint=error.hint, exit_code=error.exit_code, trace=trace)
    return error.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _open_standard_streams()
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGINT, _on_sigint)
    options = argv[: argv.index("--")] if "--" in argv else argv
    out = Output(json="--json" in options, verbose=bool({"-v", "--verbose"} & set(options)))
    try:
        code = build(_wanted(argv))(argv, prog_name="llmos", standalone_mode=False) or 0
    except BaseException as exc:  # noqa: BLE001 - the one place that ends every error
        code = report(exc, out)
    return _flushed(int(code), out)


def run() -> NoReturn:
    """The console script."""
    sys.exit(main())


def _show_help(on: bool) -> None:
    if not on:
        return
    Output().page(root_help(GROUPS, EXIT_CODES))
    raise typer.Exit()


def _show_version(on: bool) -> None:
    if on:
        Output().line(f"llmos {__version__}")
        raise typer.Exit()


def _root(
    ctx: typer.Context,
    *,
    store: StoreOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
    usage: Annotated[bool, typer.Option("--help", "-h", is_eager=True, callback=_show_help, help="Show help.")] = False,
) -> None:
    """One content-addressed store from text to served model."""
    bars = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    cwd = _working_folder()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that a command begins phones nobody
    ctx.obj = Session(
        store_path=store and cwd / store.expanduser(),
        env_store=os.environ.get("LLMOS_STORE") or None,
        cwd=cwd,
        home=Path(os.path.expanduser("~")),
        safe_stores=os.environ.get("LLMOS_SAFE_STORES", ""),
        ollama_models=os.environ.get("OLLAMA_MODELS", ""),
        out=Output(json=json, quiet=quiet, verbose=verbose, animate=bars),
    )
    if ctx.invoked_subcommand is None:
        _show_help(True)


def _sections(doc: str) -> str:
    """`doc` with its examples marked by a backspace, typer's sign that lines stay lines."""
    paragraphs = doc.split("\n\n")
    return "\n\n".join(f"\b\n{text}" if text.startswith("Example") else text for text in paragraphs)


def _wanted(argv: Sequence[str]) -> Sequence[str]:
    """The verbs that this command line can need: all of them only where one is looked for."""
    words = iter(argv)
    for word in words:
        if word in ("--help", "-h", "--version"):
            return ()
        if word == "--store":
            next(words, None)
        elif not word.startswith("-"):
            return (word,) if word in VERBS and word != "completion" else VERBS
    return VERBS


def _merged(current: Session, *, store: Path | None, json: bool, quiet: bool, verbose: bool) -> Session:
    """The session with what stood after the command on top."""
    out = current.out
    out = replace(out, json=out.json or json, quiet=out.quiet or quiet, verbose=out.verbose or verbose)
    return replace(current, store_path=current.cwd / store.expanduser() if store else current.store_path, out=out)


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as exc:
        raise NotFound("the current folder no longer exists", hint="cd to a folder that does") from exc


def _usage_hint(exc: typer.TyperException) -> str:
    context = getattr(exc, "ctx", None)
    return f"{context.command_path if context else 'llmos'} --help"


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _on_sigint(signum: int, frame: FrameType | None) -> None:
    """Say at once that the key was seen; the second one does not wait for anything."""
    signal.signal(signal.SIGINT, _on_second_sigint)
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping (Ctrl-C again stops at once)\n")
    raise KeyboardInterrupt


def _on_second_sigint(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"\n")
    os._exit(128 + signum)


def _open_standard_streams() -> None:
    """Make sure that 0, 1 and 2 are streams: were one closed, the next pack opened would take its place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flushed(code: int, out: Output) -> int:
    """`code`, unless what was written cannot be delivered; the interpreter has nothing left to complain about."""
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or report(exc, out)
    return code
