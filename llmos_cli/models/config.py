"""config.json -> a transformers configuration. A model's files never get to run code or to fetch any."""

from typing import Any, Final

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, BertConfig, LlamaConfig, PretrainedConfig

from llmos_cli.errors import Damaged, LlmosError, Unsafe, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.quiet import quiet
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file

CONFIG_FILE: Final = "config.json"
# What transformers raises, at construction or later, for values that make no sense together.
BAD_CONFIG: Final = (
    StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError,
)  # fmt: skip
# Choices of kernels, not of a model: some name code on a hub, and the loader chooses for the machine it runs on.
_RUNTIME_KEYS: Final = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "fusion_config",
    "kernel_config",
    "use_kernels",
}
_HEAD_DIM: Final = 64


def load_config(store: Store, manifest: Manifest) -> PretrainedConfig:
    """The configuration of a stored model; raises Unsafe for one that names code of its own."""
    return parse_config(read_config(store, manifest))


def read_config(store: Store, manifest: Manifest) -> dict[str, Any]:
    """config.json as plain values."""
    entry = manifest.file(CONFIG_FILE)
    if entry is None:
        raise LlmosError(
            f"this {manifest.kind} has no {CONFIG_FILE}, so it is not a model",
            hint="llmos show REF lists its files; add a whole Hugging Face model folder",
        )
    value = canonical.loads(read_file(store, entry), CONFIG_FILE)
    if not isinstance(value, dict):
        raise Damaged(f"{CONFIG_FILE} is not a table")
    return value


def parse_config(values: dict[str, Any]) -> PretrainedConfig:
    """The configuration these values of a config.json mean; raises Unsafe, UsageError (unknown type) or Damaged."""
    _refuse_code(values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise Damaged(f"{CONFIG_FILE} has no model_type")
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"{CONFIG_FILE} has the model type {model_type[:80]!r}, which this transformers does not know",
            hint="pip install --upgrade transformers",
        )
    try:
        with quiet():
            return CONFIG_MAPPING[model_type].from_dict(_without_runtime(values))
    except BAD_CONFIG as exc:
        raise Damaged(f"{CONFIG_FILE} is not a valid {model_type} configuration: {one_line(exc)}") from exc


def llama_config(
    depth: int, vocab_size: int, seq_len: int, *, bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> LlamaConfig:
    """A Llama whose one dial is its depth: `depth` layers and heads of 64, embeddings tied with the head."""
    if depth < 1:
        raise UsageError(f"a depth of {depth} makes no model", hint="use --depth 1 or more")
    hidden = _HEAD_DIM * depth
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=depth,
        num_attention_heads=depth,
        num_key_value_heads=depth,
        head_dim=_HEAD_DIM,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def bert_config(depth: int, vocab_size: int, seq_len: int, *, pad: int) -> BertConfig:
    """A BERT by the same rule: `depth` layers and heads of 64."""
    if depth < 1:
        raise UsageError(f"a depth of {depth} makes no model", hint="use --depth 1 or more")
    hidden = _HEAD_DIM * depth
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=depth,
        max_position_embeddings=seq_len,
        pad_token_id=pad,
    )


def one_line(exc: BaseException) -> str:
    """What a library's exception says, short enough for one sentence."""
    return (" ".join(str(exc).split()) or type(exc).__name__)[:300]


def _refuse_code(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key == "auto_map" and value:
            raise Unsafe(
                f"{CONFIG_FILE} asks to run code that comes with the model (auto_map)",
                hint="llmos runs only model classes that transformers has; convert the model to one of them",
            )
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                _refuse_code(item)


def _without_runtime(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_runtime(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _RUNTIME_KEYS
    }
