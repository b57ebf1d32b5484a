"""llama.cpp itself reads what is exported, and answers as the model does."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from llmos_cli.export.run import export
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.schemes import INT8, int4
from llmos_cli.models.tokenizers import load_tokenizer
from llmos_cli.progress import Silent
from llmos_cli.quantize.run import Request, quantize
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest

Put = Callable[..., ObjectId]
PROMPT = "the cat sat on the mat and "
TOP = 5

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp (pip install xllamacpp) is not installed"),
]

# In a process of its own: it talks on stderr and starts a server on the loopback.
ASK = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
request = {"prompt": sys.argv[2], "max_tokens": 1, "temperature": 0, "logprobs": int(sys.argv[3])}
answer = server.handle_completions(request)
print(json.dumps(json.loads(answer) if isinstance(answer, str) else answer))
"""


def ask(file: Path) -> tuple[int, dict[int, float]]:
    """How many tokens llama.cpp makes of the prompt, and the likeliest next ones with their log-probabilities."""
    command = [sys.executable, "-c", ASK, str(file), PROMPT, str(TOP)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return answer["usage"]["prompt_tokens"], {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}


def check(store: Store, source: ObjectId, kind: str | None, folder: Path, *, near: float) -> None:
    made = export(store, source, "tiny", "gguf", kind, None, progress=Silent())
    (entry,) = made.manifest.files
    (folder / entry.path).write_bytes(read_file(store, entry))
    manifest = read_manifest(store, source)
    ids = load_tokenizer(store, manifest)(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = load_model(store, manifest, dtype=torch.float32)(ids).logits[0, -1].log_softmax(-1)
    count, found = ask(folder / entry.path)
    assert count == ids.shape[1]
    assert max(found, key=lambda token: found[token]) == int(expected.argmax())
    for token, logprob in found.items():
        assert logprob == pytest.approx(float(expected[token]), abs=near)


@pytest.mark.parametrize("config", ["llama-tied", "llama-untied", "mistral", "qwen2", "qwen3", "gpt2"])
def test_every_family_answers_as_the_model_does(store: Store, put_model: Put, config: str, tmp_path: Path) -> None:
    check(store, put_model(config=config), "f32", tmp_path, near=0.02)


@pytest.mark.parametrize(("form", "kind"), [(INT8, "q8_0"), (int4(), "q4_0")], ids=["int8", "int4"])
def test_quantized_weights_answer_as_the_quantized_model(
    store: Store, put_model: Put, form: Any, kind: str, tmp_path: Path
) -> None:
    """Beside these, llama.cpp rounds what goes into a layer to eight bits."""
    request = Request(form, "search" if form.group else "rtn")
    small = quantize(store, put_model(), request, parse_ref("small"), progress=Silent())
    check(store, small.id, None, tmp_path, near=0.2)
