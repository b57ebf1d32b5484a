import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from llmos_cli.formats.ids import object_id
from llmos_cli.serve.background import serving
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.front import Served

COMPLETION = {"model": "tiny", "prompt": "the fox", "max_tokens": 8, "seed": 1}


def numbers(url: str) -> dict[str, float]:
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            if "vllm:" in sample.name:
                assert sample.labels["model_name"] == "tiny:latest"
            found[sample.name + "".join(f" {name}={value}" for name, value in sorted(labels.items()))] = sample.value
    return found


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_was_done_is_counted(serve: Any, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    usage = [
        httpx.post(f"{url}/v1/completions", json=COMPLETION | more, timeout=60).json()["usage"]
        for more in ({}, {"n": 2}, {"max_tokens": 1})
    ]
    httpx.post(f"{url}/v1/completions", json={})
    httpx.get(f"{url}/v1/models/none")
    found = numbers(url)
    made = sum(one["completion_tokens"] for one in usage)
    assert found["vllm:generation_tokens_total"] == made
    assert found["vllm:prompt_tokens_total"] == 4 * usage[0]["prompt_tokens"]
    assert sum(found[f"vllm:request_success_total finished_reason={why}"] for why in ("stop", "length")) == 4
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert found[f"vllm:{name}_seconds_count"] == 4
    assert found["vllm:inter_token_latency_seconds_count"] == made - 4
    assert found["vllm:e2e_request_latency_seconds_sum"] >= found["vllm:time_to_first_token_seconds_sum"] > 0
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["http_requests_total handler=/v1/completions method=POST status=200"] == 3
    assert found["http_requests_total handler=/v1/completions method=POST status=400"] == 1
    assert found["http_requests_total handler=other method=GET status=404"] == 1


def test_what_runs_and_waits_is_seen_and_what_leaves_is_counted(serve: Any, endless_engine: Engine) -> None:
    url = serve(endless_engine)
    body = COMPLETION | {"max_tokens": 8000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(httpx.post, f"{url}/v1/completions", json=COMPLETION, timeout=60)
            until(lambda: numbers(url)["vllm:num_requests_waiting"] == 1)
            found = numbers(url)
            assert found["vllm:num_requests_running"] == found["vllm:kv_cache_usage_perc"] == 1
            response.close()
            assert waiting.result().status_code == 200
    assert numbers(url)["vllm:request_success_total finished_reason=abort"] == 1


def test_a_known_beginning_is_counted_as_a_hit(serve: Any, endless_engine: Engine) -> None:
    url = serve(endless_engine)
    body = COMPLETION | {"prompt": [7] * 200}
    before = numbers(url)
    for _ in range(2):
        httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    found = numbers(url)
    assert found["vllm:prefix_cache_queries_total"] - before["vllm:prefix_cache_queries_total"] == 400
    assert found["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] == 192


def test_a_server_that_stops_is_not_ready_and_takes_nothing_new(endless_engine: Engine) -> None:
    served = Served("tiny:latest", object_id(b"tiny"), 0)
    body = json.dumps(COMPLETION | {"max_tokens": 500, "stream": True}).encode()
    head = {"content-type": "application/json"}
    faults: list[str] = []
    server = serving(endless_engine, served, fault=faults.append, drain_seconds=20)
    url = server.__enter__()
    with httpx.Client(base_url=url, timeout=60) as kept, httpx.Client(base_url=url, timeout=60) as other:
        assert kept.get("/ready").json() == {"status": "ready"}
        with other.stream("POST", "/v1/completions", content=body, headers=head) as response:
            lines = response.iter_lines()
            next(lines)
            with ThreadPoolExecutor() as pool:
                over = pool.submit(server.__exit__, None, None, None)
                asked: list[int] = []

                def refused() -> bool:
                    try:
                        asked.append(kept.get("/ready").status_code)
                    except httpx.TransportError:
                        return True  # the connection was closed
                    return asked[-1] == 503

                until(refused)
                assert "data: [DONE]" in list(lines)
                over.result()
    assert not faults
