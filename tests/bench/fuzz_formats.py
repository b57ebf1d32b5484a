"""Does any reader of bytes from outside crash, hang or take memory it was not given? Coverage-guided, by hand.

python -m tests.bench.fuzz_formats [--seconds 60] [--only gguf]

Needs atheris (`pip install atheris`). Every reader of tests.bench.fuzz_targets runs in a process of its own for an
equal share of the seconds. It may return a value or raise an LlmosError; anything else is shown with the input that
does it, and the exit code is 1.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.bench.measure import print_machine

_OPTIONS = ("-max_len=4096", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1")


def fuzz(title: str, folder: Path, seconds: int) -> None:
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["llmos_cli", "zipfile", "pickletools", "json"]):
        import json  # noqa: F401
        import pickletools  # noqa: F401
        import zipfile  # noqa: F401

        from llmos_cli.errors import LlmosError
        from tests.bench.fuzz_targets import targets

    target, sound = targets()[title]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(sound):
        (corpus / str(number)).write_bytes(data)

    def once(data: bytes) -> None:
        with suppress(LlmosError):
            target(data)

    options = (*_OPTIONS, f"-max_total_time={seconds}", f"-artifact_prefix={folder}/", str(corpus))
    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


def run(title: str, seconds: int) -> bool:
    """Fuzz one reader in a process of its own; gives whether it held."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.fuzz_formats", "--fuzz", title]
        command += ["--folder", folder, "--seconds", str(seconds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        told = done.stdout.decode(errors="replace")
        count = re.search(r"number_of_executed_units: *(\d+)", told)
        print(f"{title:18}{int(count[1]) if count else 0:>12,} executions  {'ok' if done.returncode == 0 else 'FOUND'}")
        if done.returncode:
            print(told[-4000:])
            for found in Path(folder).glob("*-*"):
                print(f"{found.name}: {found.read_bytes()!r}")
        return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--only", action="append", help="a reader; can be given again")
    parser.add_argument("--fuzz", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fuzz:
        fuzz(options.fuzz, options.folder, options.seconds)
    if importlib.util.find_spec("atheris") is None:
        print("skipped: atheris is not installed")
        return 0
    from tests.bench.fuzz_targets import targets

    print_machine()
    titles = options.only or list(targets())
    held = [run(title, max(1, options.seconds // len(titles))) for title in titles]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
