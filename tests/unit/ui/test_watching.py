import pytest

from llmos_cli.ui.watching import Sample, read_sample, run_rows, server_facts, server_rows, sparkline

TEXT = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 3.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model_name="m"} 100.0
# TYPE vllm:request_success_total counter
vllm:request_success_total{finished_reason="stop",model_name="m"} 2.0
vllm:request_success_total{finished_reason="length",model_name="m"} 0.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 1.0
vllm:time_to_first_token_seconds_bucket{le="1.0",model_name="m"} 4.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 4.0
vllm:time_to_first_token_seconds_count{model_name="m"} 4.0
vllm:time_to_first_token_seconds_sum{model_name="m"} 2.0
"""


def test_a_servers_text_becomes_numbers() -> None:
    sample = read_sample(TEXT, 5.0)
    assert sample.time == 5.0
    assert sample.values["num_requests_running"] == 3
    assert sample.ended == {"stop": 2.0, "length": 0.0}
    assert sample.buckets["time_to_first_token_seconds"] == {0.1: 1.0, 1.0: 4.0, float("inf"): 4.0}


def test_rates_are_of_the_time_between_two_looks() -> None:
    before = Sample(10.0, {"prompt_tokens_total": 50.0, "prefix_cache_queries_total": 0.0})
    now = Sample(
        12.0,
        {"prompt_tokens_total": 80.0, "prefix_cache_queries_total": 40.0, "prefix_cache_hits_total": 10.0},
    )
    facts = server_facts(before, now)
    assert facts["prompt_tokens_per_second"] == 15
    assert facts["prefix_hits"] == 0.25
    assert facts["first_token"] is None
    assert server_facts(now, before)["prompt_tokens_per_second"] == 0  # the server was started anew


def test_percentiles_are_of_what_is_new() -> None:
    old = {0.1: 100.0, 1.0: 100.0, float("inf"): 100.0}
    new = {0.1: 100.0, 1.0: 110.0, float("inf"): 110.0}
    name = "time_to_first_token_seconds"
    found = server_facts(Sample(0.0, buckets={name: old}), Sample(1.0, buckets={name: new}))["first_token"]
    assert found["p50"] == pytest.approx(0.1 + 0.9 * 0.5)
    assert found["p99"] == pytest.approx(0.1 + 0.9 * 0.99)
    same = server_facts(Sample(0.0, buckets={name: new}), Sample(1.0, buckets={name: new}))["first_token"]
    assert same["p50"] == pytest.approx(0.1 * 55 / 100)


def test_a_person_sees_words() -> None:
    rows = dict(server_rows(server_facts(read_sample("", 0.0), read_sample(TEXT, 1.0))))
    assert rows["texts"] == "3 being made, 0 waiting"
    assert rows["ended"] == "2 stop"
    assert rows["first token"].startswith("400 ms p50")
    assert rows["between two"] == "-"


def test_a_run_tells_its_newest_step_and_its_last_score() -> None:
    line = {"grad_norm": 1.0, "lr": 0.001, "tokens_per_second": 1234.5}
    lines = [
        {**line, "step": 1, "loss": 4.0},
        {**line, "step": 2, "loss": 2.0, "eval_loss": 2.5},
        {**line, "step": 3, "loss": 1.0, "eta_seconds": 90, "goodput": 0.5},
    ]
    rows = dict(run_rows(lines))
    assert rows["step"] == "3"
    assert rows["loss"].startswith("1.0000")
    assert rows["scored"] == "eval_loss 2.5000"
    assert rows["left"] == "1 min 30 s"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0], "▁"), ([5.0, 5.0], "▁▁"), ([0.0, 7.0], "▁█"), ([float(n) for n in range(8)], "▁▂▃▄▅▆▇█")],
)
def test_a_curve_in_a_line(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected
    assert len(sparkline([float(number) for number in range(1000)])) == 40
