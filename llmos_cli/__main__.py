"""`python -m llmos_cli`."""

from llmos_cli.app import run

if __name__ == "__main__":
    run()
