"""llmos as always, but with slices so small that a test's corpus has many."""

from llmos_cli import app
from llmos_cli.data import corpus

corpus.SLICE_BYTES = 100_000

if __name__ == "__main__":
    app.run()
