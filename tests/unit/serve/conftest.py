"""A byte-level tokenizer trained on a few words and a random Llama of two layers: everything real, nothing large."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmos_cli.formats.ids import object_id
from llmos_cli.serve.background import serving
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.front import Served
from llmos_cli.serve.runner.lean import LeanRunner
from llmos_cli.serve.runner.linears import Kernels
from llmos_cli.serve.sequence import Piece

CORPUS = ["the quick brown fox jumps over the lazy dog. Grüße an alle, 你好世界 🙂 "] * 20
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "<|turn|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
SERVED = Served("tiny:latest", object_id(b"tiny"), 1_700_000_000)


def make_tokenizer(*, eos: bool = True, bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|turn|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>" if eos else None)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(vocab_size: int, *, context: int = 64, eos: int | None = None) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=eos,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """So small a model is only slowed down by a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def build_model() -> Callable[..., LlamaForCausalLM]:
    return make_model


@pytest.fixture(scope="session")
def chat_template() -> str:
    return CHAT_TEMPLATE


def make_engine(model: Any, tokenizer: Any, *, lean: bool = True, slots: int = 8) -> Engine:
    runner = LeanRunner(model, Kernels("fp32"), budget=256 << 20, slots=slots) if lean else None
    return Engine(model, tokenizer, runner=runner)


class Scripted:
    """An engine with one place that says what a test wants to see; everything else is `real`'s."""

    def __init__(
        self, script: Callable[[list[int], Callable[[], bool]], Iterator[Piece]], real: Engine | None = None
    ) -> None:
        if real is not None:
            self.encoder, self.context, self.room = real.encoder, real.context, real.room
            self.scheduler, self.prefixes = real.scheduler, real.prefixes
        self.runner = SimpleNamespace(slots=1)
        self._script = script
        self._queue: list[SimpleNamespace] = []

    def request(self, prompt: list[int], sampling: Any, emit: Any, **how: Any) -> SimpleNamespace:
        script = self._script(prompt, how["cancelled"])
        return SimpleNamespace(script=script, emit=emit, **how)

    def add(self, request: SimpleNamespace) -> None:
        self._queue.append(request)

    def step(self) -> bool:
        for request in [request for request in self._queue[1:] if request.cancelled()]:
            self._leave(request)
        if not self._queue:
            return False
        request = self._queue[0]
        try:
            request.emit(next(request.script))
        except StopIteration:
            self._leave(request)
        except Exception as exc:  # noqa: BLE001 - as the real one does
            request.failed(exc)
            self._leave(request)
        return True

    def drop_all(self, error: Exception | None) -> None:
        for request in list(self._queue):
            if error is not None:
                request.failed(error)
            self._leave(request)

    def _leave(self, request: SimpleNamespace) -> None:
        self._queue.remove(request)
        request.left()


@pytest.fixture(scope="session")
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture(scope="session")
def build_engine() -> Callable[..., Engine]:
    return make_engine


@pytest.fixture(scope="session", params=["lean", "transformers"])
def engine(request: pytest.FixtureRequest) -> Engine:
    tokenizer = make_tokenizer()
    return make_engine(make_model(len(tokenizer)), tokenizer, lean=request.param == "lean")


@pytest.fixture(scope="session")
def chat_engine() -> Engine:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    return make_engine(make_model(len(tokenizer), context=128), tokenizer)


@pytest.fixture(scope="session")
def endless_engine() -> Engine:
    """Never ends by itself, and has room for thousands of tokens, of one text at a time."""
    tokenizer = make_tokenizer(eos=False)
    return make_engine(make_model(len(tokenizer), context=8192), tokenizer, slots=1)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serve an engine until the test ends; gives the URL. Faults fail the test unless it takes them itself."""
    faults: list[str] = []
    with ExitStack() as stack:

        def start(engine: Any, *, fault: Callable[[str], None] = faults.append, **options: Any) -> str:
            server: AbstractContextManager[str] = serving(engine, SERVED, fault=fault, **options)
            return stack.enter_context(server)

        yield start
    assert not faults
