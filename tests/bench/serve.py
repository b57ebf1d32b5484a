"""How fast do servers answer on this machine, one client and sixteen, with the same weights?

python -m tests.bench.serve [--dir DIR] [--only NAME,...] [--rounds 2] [--clients 1,16]

The model has the shape of SmolLM-135M and random weights: speed only. A prompt is 64 tokens, an answer 64 more,
greedy, not streamed, over HTTP on the loopback; clients share the cores with the server. Servers answer in turns, each
a process of its own. llama.cpp is the wheel xllamacpp: its own HTTP server, with as many slots as there are clients.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tests.bench.measure import goal, print_machine

PROMPT, ANSWER, VOCABULARY = 64, 64, 49152
MODEL: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
OURS: Final = {"llmos bf16": "dense", "llmos int8": "int8", "llmos int4": "int4"}
THEIRS: Final = {"llama.cpp f16": "dense f16", "llama.cpp Q8_0": "int8", "llama.cpp Q4_0": "int4"}
GOALS: Final = (
    ("int8, 16 clients", 16, "llmos int8", "llama.cpp Q8_0", 2.0),
    ("bf16, 16 clients", 16, "llmos bf16", "llama.cpp f16", 1.0),
    ("int8, 1 client", 1, "llmos int8", "llama.cpp Q8_0", 0.8),
    ("int4, 1 client", 1, "llmos int4", "llama.cpp Q4_0", 0.8),
)
LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.cont_batching = sys.argv[1], int(sys.argv[2]), True
params.n_ctx, params.port = 256 * int(sys.argv[2]), 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True)
class Server:
    host: str
    model: str
    pid: int


@dataclass(frozen=True)
class Rate:
    tokens_per_second: float
    memory: int


def llmos(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "llmos_cli", "-q", *arguments], check=True, stdout=sys.stderr)


def prepare(folder: Path) -> Path:
    """The model in three forms in a store, and as files for llama.cpp."""
    store = folder / "store"
    if (folder / "complete").exists():
        return store
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([Path(os.__file__).read_text()], trainer)
    backend.add_tokens([f"<{number}>" for number in range(backend.get_vocab_size(), VOCABULARY)])
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).bfloat16()
    model.save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder / "model")
    llmos("--store", str(store), "init")
    llmos("--store", str(store), "add", str(folder / "model"), "dense")
    for scheme, options in (("int8", ()), ("int4", ("--method", "search"))):
        llmos("--store", str(store), "quantize", "dense", scheme, "--scheme", scheme, *options)
    for name, kind in (("dense", ("--type", "f16")), ("int8", ()), ("int4", ())):
        target = folder / "gguf" / " ".join((name, *kind[1:]))
        llmos("--store", str(store), "export", name, "--to", str(target), "--format", "gguf", *kind)
    (folder / "complete").touch()
    return store


@contextmanager
def started(command: Sequence[str], where: Callable[[str], tuple[str, str]]) -> Iterator[Server]:
    """A server, once it has said where it listens in a line that `where` understands."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"did not start: {' '.join(command)[:200]}")
        yield Server(*where(line), process.pid)
    finally:
        process.terminate()
        process.wait()


def ours(store: Path, name: str) -> Any:
    command = [sys.executable, "-m", "llmos_cli", "--store", str(store), "--json", "serve", name, "--port", "0"]
    return started(command, lambda line: (json.loads(line)["url"].removeprefix("http://"), name))


def llama(file: Path, slots: int) -> Any:
    cores = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", LLAMA, str(file), str(slots), cores]
    return started(command, lambda line: (line.strip().removeprefix("http://"), "any"))


def ask(server: Server, seed: int) -> int:
    """One answer; the tokens it has."""
    draw = random.Random(seed)
    prompt = [draw.randrange(300, 1900) for _ in range(PROMPT)]
    body = {"model": server.model, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
    connection = http.client.HTTPConnection(server.host, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    if "usage" not in answer:
        raise SystemExit(f"no answer: {answer}")
    return int(answer["usage"]["completion_tokens"])


def rate(server: Server, clients: int, seed: int, each: int = 2) -> Rate:
    """Tokens made a second by so many clients, who ask `each` times one after the other."""

    def client(number: int) -> int:
        return sum(ask(server, seed + 1000 * number + turn) for turn in range(each))

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        made = sum(pool.map(client, range(clients)))
    seconds = time.perf_counter() - started
    status = Path(f"/proc/{server.pid}/status").read_text()
    (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return Rate(made / seconds, peak * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/llmos-bench-serve"))
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", default="1,16")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    print_machine()
    store = prepare(arguments.dir)
    servers: dict[str, Callable[[int], Any]] = {}
    for label, name in OURS.items():
        servers[label] = lambda _, name=name: ours(store, name)
    if find_spec("xllamacpp") is None:
        print("skipped: llama.cpp (pip install xllamacpp) is not installed")
    else:
        for label, name in THEIRS.items():
            (file,) = (arguments.dir / "gguf" / name).glob("*.gguf")
            servers[label] = lambda slots, file=file: llama(file, slots)
    if arguments.only:
        servers = {label: server for label, server in servers.items() if label in arguments.only.split(",")}
    found: dict[tuple[str, int], list[Rate]] = {}
    for clients in map(int, arguments.clients.split(",")):
        for turn in range(arguments.rounds):
            for label, start in servers.items():
                with start(clients) as server:
                    ask(server, -1)
                    one = rate(server, clients, 7 * turn, each=4 if clients == 1 else 2)
                found.setdefault((label, clients), []).append(one)
                print(f"{label}, {clients}: {one.tokens_per_second:.1f} tok/s", file=sys.stderr, flush=True)
    print(f"\n{'':18}{'clients':>8}{'tok/s':>9}   of each round{'peak RSS':>16}")
    for (label, clients), rates in found.items():
        speeds = [one.tokens_per_second for one in rates]
        memory = max(one.memory for one in rates)
        each = " ".join(f"{speed:.0f}" for speed in speeds)
        print(f"{label:18}{clients:8}{statistics.median(speeds):9.1f}   {each:14}{memory / 1e6:12.0f} MB")
    print()
    for what, clients, mine, theirs, least in GOALS:
        if (mine, clients) in found and (theirs, clients) in found:
            ratio = [
                statistics.median(one.tokens_per_second for one in found[label, clients]) for label in (mine, theirs)
            ]
            # `goal` knows upper bounds: the time of theirs by ours
            goal(f"{what}: time by {theirs}'s", ratio[1] / ratio[0], 1 / least)


if __name__ == "__main__":
    main()
