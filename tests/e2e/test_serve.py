"""`llmos serve` and `llmos generate` as users run them: a process, a store, the official OpenAI client."""

import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmos_cli.app import main
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.leases import live_leases
from llmos_cli.store.local import init_store, open_store

CONTEXT = 2048
CHAT_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the model `tiny`, which never ends a text by itself, and the file `notes`."""
    folder = tmp_path_factory.mktemp("serve")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|turn|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "notes.txt").write_text("not a model")
    root = folder / ".llmos"
    init_store(root)
    with open_store(root) as opened:
        for source, name in ((folder / "model", "tiny"), (folder / "notes.txt", "notes")):
            execute_add(opened, plan_add([source]), parse_ref(name), Silent())
    return root


@dataclass
class Running:
    process: subprocess.Popen[str]
    info: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.info["url"])


def start(store: Path, *options: str) -> Running:
    command = [sys.executable, "-m", "llmos_cli", "--store", str(store), "--json", "serve", "tiny", "--port", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return Running(process, json.loads(line))


def end(running: Running, number: int) -> tuple[int, str]:
    running.process.send_signal(number)
    return running.process.wait(60), running.process.communicate()[1]


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Running]:
    running = start(store)
    yield running
    code, stderr = end(running, signal.SIGTERM)
    assert code == 143
    assert "Traceback" not in stderr


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def llmos(store: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run one command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["--store", str(store), *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_line_that_says_ready_names_what_is_served(server: Running, store: Path) -> None:
    assert server.info["ref"] == "tiny:latest"
    assert server.info["kind"] == "model"
    assert server.info["context"] == CONTEXT
    assert set(server.info["seconds"]) == {"libraries", "tokenizer", "model", "kernels", "build", "first_tokens"}
    with open_store(store) as opened:
        held = [lease for lease in live_leases(opened) if lease.purpose == "serve"]
    assert [str(oid) for lease in held for oid in lease.objects] == [server.info["id"]]


def test_the_official_client_lists_and_completes(server: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny:latest"]
    assert client.models.retrieve(f"@{server.info['id']}").id == "tiny:latest"
    answer = client.completions.create(model="tiny", prompt="the quick", max_tokens=20, seed=3, stop=["zzz"])
    assert answer.usage
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].finish_reason == "length"
    assert answer.system_fingerprint == server.info["id"][:12]
    stream = client.completions.create(
        model="tiny",
        prompt="the quick",
        max_tokens=20,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == answer.choices[0].text
    assert chunks[-1].usage == answer.usage


def test_the_official_client_chats(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=15, seed=3)
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=15, seed=3, stream=True)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    again = [*messages, answer.choices[0].message, {"role": "user", "content": "and?"}]
    client.chat.completions.create(model="tiny", messages=again, max_completion_tokens=2)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"extra_body": {"foo": 1}}, "foo"),
        ({"max_tokens": "12"}, "max_tokens"),
        ({"n": 40}, "n"),
        ({"prompt": "the quick brown fox " * CONTEXT}, "prompt"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
    ],
)
def test_the_official_client_gets_its_own_errors(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the", "max_tokens": 2} | change
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked)
    assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="the")


def test_leaving_a_stream_frees_the_model(client: openai.OpenAI, server: Running) -> None:
    for _ in range(5):
        with client.completions.create(model="tiny", prompt="the", max_tokens=CONTEXT - 10, stream=True) as stream:
            next(iter(stream))
    end = time.monotonic() + 60
    while 'vllm:num_requests_running{model_name="tiny:latest"} 0.0' not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.05)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'request_success_total{finished_reason="abort",model_name="tiny:latest"} 5.0' in text


def test_a_taken_port_is_an_error_before_anything_is_loaded(llmos) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, out, err = llmos("serve", "tiny", "--port", str(other.getsockname()[1]))
    assert (code, out) == (11, "")
    assert "is taken by another program" in err
    assert "hint: use --port 0" in err
    assert "loading" not in err


def test_an_open_address_is_refused(llmos) -> None:
    code, _, err = llmos("serve", "tiny", "--host", "0.0.0.0")
    assert code == 14
    assert "--api-key-file" in err


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_what_is_no_model_is_refused(llmos, command: str) -> None:
    options = ["--port", "0"] if command == "serve" else ["text"]
    code, _, err = llmos(command, "notes", *options)
    assert code == 2
    assert "notes:latest is of kind files, and only a model or a checkpoint can answer" in err
    assert llmos(command, "tiny-nope", *options)[0] == 10


def test_ctrl_c_finishes_what_runs_and_exits_130(store: Path) -> None:
    running = start(store)
    body = {"model": "tiny", "prompt": "the", "max_tokens": 500, "stream": True}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGINT)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    code, stderr = running.process.wait(60), running.process.communicate()[1]
    assert code == 130
    assert "Traceback" not in stderr


def test_generate_prints_the_same_text_as_the_server(llmos, server: Running, client: openai.OpenAI) -> None:
    options = ("--seed", "5", "--max-tokens", "12", "--temperature", "1")
    code, out, _ = llmos("generate", "tiny", "the quick", *options)
    answer = client.completions.create(model="tiny", prompt="the quick", max_tokens=12, seed=5)
    assert code == 0
    assert out == answer.choices[0].text + "\n"
    code, out, _ = llmos("--json", "generate", "tiny", "the quick", *options)
    result = json.loads(out)
    assert result["text"] == answer.choices[0].text
    assert (result["id"], result["ref"], result["seed"]) == (server.info["id"], "tiny:latest", 5)
    assert result["usage"] == answer.usage.to_dict() if answer.usage else False


def test_generate_reads_a_pipe(llmos, monkeypatch: pytest.MonkeyPatch) -> None:
    def piped(data: bytes, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return llmos("--json", "generate", "tiny", "--seed", "5", *arguments)

    named = json.loads(llmos("--json", "generate", "tiny", "--seed", "5", "the fox")[1])
    for data, arguments in ((b"the fox", ["-"]), (b"the fox\n", []), (b"the fox\r\n", ["-"])):
        assert json.loads(piped(data, *arguments)[1]) == named
    code, _, err = piped(b"a\xff")
    assert code == 2
    assert "byte 1" in err
    code, _, err = piped(b"a" * (5 << 20))
    assert code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fox " * 3000], f"context is {CONTEXT}"),
        (["fox", "--max-tokens", "5000"], "max_tokens is 5000"),
        ([""], "empty"),
        (["fox", "--stop", ""], "--stop"),
        (["fox\udcff"], "not UTF-8"),
        (["fox", "--temperature", "3"], "temperature"),
    ],
)
def test_generate_refuses_what_it_cannot_do(llmos, arguments: list[str], said: str) -> None:
    code, out, err = llmos("generate", "tiny", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_a_file_of_requests_is_answered_once_however_often_it_is_stopped(llmos, tmp_path: Path) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": f"q{number}", "prompt": f"the {number}", "seed": number} for number in range(6)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = llmos("--json", "generate", "tiny", "--in", str(requests), "--out", str(answers))
    assert (code, json.loads(out)["answered"]) == (0, 6)
    whole = sorted(answers.read_text().splitlines())
    # as a crash would leave it: some lines, and the beginning of one
    answers.write_text("\n".join(whole[:2]) + "\n" + whole[2][:50])
    code, out, _ = llmos("--json", "generate", "tiny", "--in", str(requests), "--out", str(answers))
    result = json.loads(out)
    assert (code, result["answered"], result["known"]) == (0, 4, 2)

    def texts(found: list[str]) -> dict[str, str]:
        table = [json.loads(line) for line in found]
        return {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in table}

    assert texts(answers.read_text().splitlines()) == texts(whole)


def test_requests_that_are_no_good_exit_3_and_a_foreign_file_is_left_alone(llmos, tmp_path: Path) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"prompt": "the"}\n{"prompt": "the", "best_of": 9}\n')
    code, _, err = llmos("generate", "tiny", "--in", str(requests), "--out", str(answers))
    assert code == 3
    assert "1 request could not be answered" in err
    answers.write_text("something else\n")
    code, _, err = llmos("generate", "tiny", "--in", str(requests), "--out", str(answers))
    assert code == 2
    assert answers.read_text() == "something else\n"
    assert llmos("generate", "tiny", "--in", str(requests))[0] == 2
    assert llmos("generate", "tiny", "--in", str(tmp_path / "none"), "--out", str(answers))[0] != 0


def test_monitor_watches_a_server(llmos, server: Running, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="the", max_tokens=5)
    code, out, _ = llmos("monitor", server.url, "--once")
    assert code == 0
    assert "0 being made, 0 waiting" in out
    code, out, _ = llmos("--json", "monitor", server.url, "--once")
    facts = json.loads(out)
    assert (code, facts["running"]) == (0, 0)
    assert facts["ended"]["length"] >= 1
    assert facts["first_token"]["p50"] > 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        code, _, err = llmos("monitor", f"http://127.0.0.1:{free.getsockname()[1]}", "--once")
    assert code == 16
    assert "no server of llmos answers" in err
    assert llmos("monitor", "nothing", "--once")[0] == 10
    assert llmos("monitor", "ftp://x", "--once")[0] == 2
