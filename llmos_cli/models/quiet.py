"""Keeps transformers silent: no bars, no log lines; what it warned about is handed to the caller instead.

It changes the process's logging and warning filters for the length of the block, so one block at a time.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Inside the block transformers writes nothing; the list fills with the warnings it would have logged."""
    collector = _Collector()
    transformers_logging.get_verbosity()  # makes transformers set up its logger before that is replaced
    logger = logging.getLogger("transformers")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    bars = transformers_logging.is_progress_bar_enabled()
    logger.handlers[:], logger.propagate = [collector], False
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers_logging.disable_progress_bar()
            yield collector.messages
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
