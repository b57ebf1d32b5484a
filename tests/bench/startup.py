"""What does `llmos --help` cost beside `python -c "import typer"`, and the other light commands?

python -m tests.bench.startup [--rounds 15]
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import alternate, print_machine, report, timed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print_machine()
    llmos = str(Path(sys.executable).with_name("llmos"))
    with tempfile.TemporaryDirectory() as store:
        timed([llmos, "--store", store, "init"])
        commands = {
            "import typer": [sys.executable, "-c", "import typer"],
            "llmos --help": [llmos, "--help"],
            "llmos --version": [llmos, "--version"],
            "llmos train --help": [llmos, "train", "--help"],
            "llmos ls": [llmos, "--store", store, "ls"],
        }
        runs = {name: lambda command=command: timed(command) for name, command in commands.items()}
        report("start-up", alternate(runs, options.rounds), "import typer", {})


if __name__ == "__main__":
    main()
