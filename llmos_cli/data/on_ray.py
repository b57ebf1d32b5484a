"""The slices of a job encoded on a Ray cluster, one task a slice; what comes back is kept as if it had been done here.

Each machine reads the input files itself, under the same paths, and must have llmos. A task whose worker is killed is
done again, elsewhere if need be. Slices are asked for in order, a bounded number at a time, and written to the store by
this process alone, so that a run after a kill goes on from what has come.
"""

import logging
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

from llmos_cli.data.slices import Job, encode_bytes, is_kept, keep
from llmos_cli.errors import LlmosError, RemoteUnavailable, UsageError
from llmos_cli.store.handle import Store

LOCAL: Final = "ray"
_SCHEME: Final = "ray://"
_TRIES: Final = 8  # of a slice whose worker was killed
_AHEAD: Final = 2  # slices a core, under way or waiting to be written
_ALONE: Final = {"env_vars": {"RAYON_NUM_THREADS": "1"}}  # a task has one core


def check_place(text: str | None) -> str | None:
    """Read `--on`; raises UsageError."""
    if text is None:
        return None
    if text != LOCAL and not text.removeprefix(_SCHEME):
        raise UsageError(f"--on {text} names no cluster", hint="--on ray://HOST:10001, or --on ray for this machine")
    if text != LOCAL and not text.startswith(_SCHEME):
        raise UsageError(f"--on takes ray or ray://HOST:PORT, not {text}")
    if find_spec("ray") is None:
        raise UsageError("--on ray needs ray", hint="pip install 'llmos[ray]'")
    return text


def keep_slices(store: Store, job: Job, place: str) -> Iterator[int]:
    """Have the slices of a job kept, in order; yields the number of each that is. Raises what a slice raises here, or
    RemoteUnavailable if the cluster cannot be reached or loses a slice again and again."""
    missing = deque(number for number in range(len(job.slices)) if not is_kept(store, job, number))
    if not missing:
        yield from range(len(job.slices))
        return
    with _cluster(place) as ray:
        encode = ray.remote(num_cpus=1, max_retries=_TRIES)(encode_bytes)
        shared = ray.put(_everywhere(job))
        most = max(2, _AHEAD * int(ray.cluster_resources().get("CPU", 1)))
        running: dict[int, Any] = {}
        for number in range(len(job.slices)):
            while missing and len(running) < most:
                running[missing[0]] = encode.remote(shared, missing[0])
                missing.popleft()
            if number in running:
                keep(store, job, number, _fetched(ray, running.pop(number), place))
            yield number


def _everywhere(job: Job) -> Job:
    """The job as it is understood in another folder."""
    files = tuple(replace(file, path=file.path.absolute()) for file in job.corpus.files)
    return replace(job, corpus=replace(job.corpus, files=files))


def _fetched(ray: Any, result: Any, place: str) -> bytes:
    try:
        data: bytes = ray.get(result)
        return data
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, LlmosError):
            raise exc.cause from None
        raise
    except (ray.exceptions.RayError, ConnectionError) as exc:
        raise RemoteUnavailable(
            f"the cluster {place} lost a slice {_TRIES + 1} times: {str(exc).splitlines()[0]}",
            hint="run the command again: it goes on from what has come",
        ) from exc


@contextmanager
def _cluster(place: str) -> Iterator[Any]:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": _ALONE}
    if place == LOCAL:
        options |= {"address": "local", "include_dashboard": False}
    else:
        options |= {"address": place}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is told by the error
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise RemoteUnavailable(
            f"cannot reach the cluster {place}: {exc}",
            hint="start its head with: ray start --head; if it asks who comes, set RAY_AUTH_MODE=token",
        ) from exc
    try:
        yield ray
    finally:
        ray.shutdown()
