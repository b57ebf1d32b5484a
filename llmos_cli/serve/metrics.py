"""What a server counts, for Prometheus: vLLM's names and meanings, so that its dashboards work, and a few of our own.

Times are of one process's monotonic clock; those of queue, prefill and decoding come from the scheduler, not from HTTP.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from llmos_cli.serve.engine import Engine
from llmos_cli.serve.scheduler import Request

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TIMES: Final = (
    ("time_to_first_token", "From the request to its first token."),
    ("e2e_request_latency", "From the request to its last token."),
    ("request_queue_time", "Waiting for a slot."),
    ("request_prefill_time", "Computing the prompt."),
    ("request_decode_time", "Making tokens after the first."),
)


class Metrics:
    """The counters of one server; `seconds` are the parts of its start."""

    def __init__(self, label: str, engine: Engine, *, seconds: Mapping[str, float] | None = None) -> None:
        self._registry = CollectorRegistry()
        self._label = label
        scheduler, prefixes, runner = engine.scheduler, engine.prefixes, engine.runner
        self._gauge("vllm:num_requests_running", "Texts being made.", lambda: len(scheduler.running))
        self._gauge("vllm:num_requests_waiting", "Texts waiting for a slot.", lambda: len(scheduler.waiting))
        self._gauge("vllm:kv_cache_usage_perc", "Slots in use, of 1.", lambda: len(scheduler.running) / runner.slots)
        self._gauge("llmos_prefix_cache_bytes", "Keys and values kept of texts.", lambda: prefixes.size)
        self._count("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda: prefixes.queries)
        self._count("vllm:prefix_cache_hits", "Prompt tokens not computed again.", lambda: prefixes.hits)
        self._count("llmos_guessed_tokens", "Tokens guessed ahead.", lambda: scheduler.guessed)
        self._count("llmos_guessed_tokens_right", "Of them, those that were right.", lambda: scheduler.guessed_right)
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._made = self._counter("vllm:generation_tokens", "Tokens made.")
        self._ended = Counter(
            "vllm:request_success",
            "Texts that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort"):
            self._ended.labels(label, reason)
        self._times = {name: self._histogram(f"vllm:{name}_seconds", text, _SECONDS) for name, text in _TIMES}
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _TOKEN_SECONDS)
        self._answered = Counter(
            "http_requests", "Requests answered.", ("handler", "method", "status"), registry=self._registry
        )
        starts = Gauge("llmos_startup_seconds", "What the start took.", ("phase",), registry=self._registry)
        for phase, value in (seconds or {}).items():
            starts.labels(phase).set(value)
        scheduler.watch = self

    def token(self, seconds: float) -> None:
        """A token came so long after the one before."""
        self._between.observe(seconds)

    def left(self, request: Request) -> None:
        """A text has ended, however."""
        text = request.text
        self._ended.labels(self._label, text.finish_reason or "abort").inc()
        self._made.inc(text.made)
        if request.began is None:
            return
        self._times["request_queue_time"].observe(request.began - request.came)
        if request.first is None or request.last is None:
            return
        self._prompt.inc(text.prompt_length)
        self._times["request_prefill_time"].observe(request.first - request.began)
        self._times["time_to_first_token"].observe(request.first - request.came)
        self._times["request_decode_time"].observe(request.last - request.first)
        self._times["e2e_request_latency"].observe(request.last - request.came)

    def answered(self, handler: str, method: str, status: int) -> None:
        """An HTTP request was answered; `handler` is a route, so that there are few."""
        self._answered.labels(handler, method, str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model_name",), registry=self._registry).labels(self._label)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model_name",), registry=self._registry, buckets=buckets).labels(self._label)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, ("model_name",), registry=self._registry).labels(self._label).set_function(value)

    def _count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A counter that somebody else keeps."""
        self._registry.register(_Kept(name, text, self._label, value))


class _Kept:
    def __init__(self, name: str, text: str, label: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._label, self._value = name, text, label, value

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=("model_name",))
        family.add_metric((self._label,), self._value())
        yield family
