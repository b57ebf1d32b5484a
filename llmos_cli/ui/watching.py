"""What a watcher sees: samples of a server's metrics or lines of a run's log, as rows of name and value.

Pure: numbers in, words out. Rates and percentiles are of the time between two samples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llmos_cli.ui.text import count, duration, percent, size

Rows = list[tuple[str, str]]
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_SHARES: Final = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Sample:
    """A server's metrics at a time: plain values by name, histograms as {upper bound: requests up to it}."""

    time: float
    values: Mapping[str, float] = field(default_factory=dict)
    buckets: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    ended: Mapping[str, float] = field(default_factory=dict)


def read_sample(text: str, at: float) -> Sample:
    """Parse Prometheus' text format; raises ValueError where it is none."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    ended: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:")
            if "le" in sample.labels:
                buckets.setdefault(name.removesuffix("_bucket"), {})[float(sample.labels["le"])] = sample.value
            elif "finished_reason" in sample.labels and name.endswith("_total"):
                ended[sample.labels["finished_reason"]] = sample.value
            else:
                values[name] = values.get(name, 0.0) + sample.value
    return Sample(at, values, buckets, ended)


def server_facts(before: Sample, now: Sample) -> dict[str, Any]:
    """What happened between two samples, as numbers (None where nothing did)."""
    seconds = max(now.time - before.time, 1e-9)

    def rate(name: str) -> float:
        return max(now.values.get(name, 0.0) - before.values.get(name, 0.0), 0.0) / seconds

    queries, hits = rate("prefix_cache_queries_total"), rate("prefix_cache_hits_total")
    return {
        "running": now.values.get("num_requests_running", 0.0),
        "waiting": now.values.get("num_requests_waiting", 0.0),
        "made_per_second": rate("generation_tokens_total"),
        "tokens_per_second": rate("inter_token_latency_seconds_count"),
        "prompt_tokens_per_second": rate("prompt_tokens_total"),
        "prefix_hits": hits / queries if queries else None,
        "ended": {reason: now.ended[reason] for reason in sorted(now.ended)},
        "first_token": _percentiles("time_to_first_token_seconds", before, now),
        "between_tokens": _percentiles("inter_token_latency_seconds", before, now),
        "whole": _percentiles("e2e_request_latency_seconds", before, now),
        "memory": now.values.get("llmos_prefix_cache_bytes", 0.0),
    }


def server_rows(facts: Mapping[str, Any]) -> Rows:
    """For a person."""
    ended = ", ".join(f"{count(round(number))} {reason}" for reason, number in facts["ended"].items() if number)
    hits = facts["prefix_hits"]
    return [
        ("texts", f"{count(round(facts['running']))} being made, {count(round(facts['waiting']))} waiting"),
        ("tokens", f"{facts['tokens_per_second']:,.1f} a second made, {facts['prompt_tokens_per_second']:,.1f} read"),
        ("first token", _spread(facts["first_token"])),
        ("between two", _spread(facts["between_tokens"])),
        ("whole answer", _spread(facts["whole"])),
        ("known before", "-" if hits is None else f"{percent(hits, 1)} of prompts"),
        ("kept", f"{size(round(facts['memory']))} of beginnings"),
        ("ended", ended or "-"),
    ]


def run_rows(lines: Sequence[Mapping[str, Any]]) -> Rows:
    """The newest steps of a training run, for a person."""
    last = lines[-1]
    rows = [
        ("step", count(int(last["step"]))),
        ("loss", f"{last['loss']:.4f}  {sparkline([float(line['loss']) for line in lines])}"),
        ("rate", f"{last.get('tokens_per_second', 0):,.0f} tokens/s"),
        ("gradient", f"{last['grad_norm']:.3f}, learning rate {last['lr']:.2e}"),
    ]
    scores = [f"{name} {value:.4f}" for name, value in last.items() if name.startswith("eval_")]
    if not scores:
        scores = next(
            (
                [f"{name} {value:.4f}" for name, value in line.items() if name.startswith("eval_")]
                for line in reversed(lines)
                if any(name.startswith("eval_") for name in line)
            ),
            [],
        )
    if scores:
        rows.append(("scored", ", ".join(scores)))
    if isinstance(last.get("memory_bytes"), int | float):
        rows.append(("memory", size(round(last["memory_bytes"]))))
    if isinstance(last.get("goodput"), int | float):
        rows.append(("goodput", percent(last["goodput"], 1)))
    if isinstance(last.get("eta_seconds"), int | float):
        rows.append(("left", duration(last["eta_seconds"])))
    return rows


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve in one line of text; means of neighbours where there are more values than `width`."""
    if not values:
        return ""
    parts = min(width, len(values))
    means = []
    for number in range(parts):
        chunk = values[number * len(values) // parts : (number + 1) * len(values) // parts]
        means.append(math.fsum(chunk) / len(chunk))
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _percentiles(name: str, before: Sample, now: Sample) -> dict[str, float] | None:
    """By linear interpolation within a histogram's buckets, as Prometheus does; of all time if nothing is new."""
    table, old = now.buckets.get(name, {}), before.buckets.get(name, {})
    fresh = {bound: value - old.get(bound, 0.0) for bound, value in table.items()}
    if not fresh or max(fresh.values()) <= 0:
        fresh = dict(table)
    total = max(fresh.values(), default=0.0)
    if total <= 0:
        return None
    found = {}
    for share in _SHARES:
        wanted, below, start = share * total, 0.0, 0.0
        for bound in sorted(fresh):
            if fresh[bound] >= wanted:
                inside = fresh[bound] - below
                end = start if math.isinf(bound) else bound
                found[f"p{share * 100:g}"] = start + (end - start) * ((wanted - below) / inside if inside else 1.0)
                break
            below, start = fresh[bound], bound
    return found


def _spread(found: Mapping[str, float] | None) -> str:
    if not found:
        return "-"
    return ", ".join(f"{_short(value)} {name}" for name, value in found.items())


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
