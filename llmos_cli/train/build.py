"""The model that a plan names: from a checkpoint, from a parent under the head that the task needs, or new."""

import json
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmos_cli.errors import UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_OF,
    ADAPTER_WEIGHTS,
    adapter_state,
    add_adapter,
    base_entries,
    describe_adapter,
    encode_adapter_config,
    is_adapter,
)
from llmos_cli.models.config import CONFIG_FILE, bert_config, llama_config, load_config, parse_config
from llmos_cli.models.heads import Head, head_of, model_class
from llmos_cli.models.load import adapt_model, load_adapter, load_model, new_model
from llmos_cli.models.tokenizers import load_tokenizer
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file
from llmos_cli.train.config import TrainConfig
from llmos_cli.train.form import Form
from llmos_cli.train.inputs import dataset_number, model_config
from llmos_cli.train.plan import Plan
from llmos_cli.train.tasks.labelled import labels_of
from llmos_cli.train.tasks.masked import first_position
from llmos_cli.train.tasks.opened import head_for, pad_id, parameters_of, task_of

_GENERATION_FILE: Final = "generation_config.json"
_ENCODED: Final = ("mlm", "classify", "pair")  # tasks whose new model is a BERT
_LABELLED: Final = ("classify", "pair")


@dataclass(frozen=True)
class Built:
    """A model with float32 weights, and the small files that go with it into every checkpoint; `new` names the weights
    that the parent did not have, `form` says how the weights are stored."""

    model: PreTrainedModel
    small_files: dict[str, bytes]
    new: tuple[str, ...] = ()
    form: Form = field(default_factory=Form)


def build(store: Store, plan: Plan, progress: Progress) -> Built:
    """The model to train; raises UsageError, Damaged or LlmosError if it does not suit the dataset."""
    if plan.resume and plan.config.lora is not None:
        built = _resumed_adapter(store, plan, plan.resume.manifest, progress)
    elif plan.resume:
        manifest = plan.resume.manifest
        if is_adapter(manifest):
            raise UsageError(f"{plan.resume.label} is of an adapter", hint="merge it first: llmos merge ADAPTER NAME")
        entries = [entry for name in (CONFIG_FILE, _GENERATION_FILE) if (entry := manifest.file(name))]
        head = head_for(task_of(plan.data), load_config(store, manifest))
        model = load_model(store, manifest, dtype=torch.float32, head=head, progress=progress)
        built = Built(model, {entry.path: read_file(store, entry) for entry in entries})
    elif plan.model:
        built = _from_parent(store, plan, plan.model, progress)
        if plan.config.lora is not None:
            built = _with_adapter(built, plan, plan.model)
    else:
        built = _from_nothing(store, plan)
    _check(built.model, plan)
    return built


def prepare_model(model: PreTrainedModel, config: TrainConfig) -> None:
    """Have it use less memory (--checkpointing) or less time (--compile), where the user asked for that."""
    if config.checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UsageError(f"{type(model).__name__} cannot be trained with --checkpointing", hint="leave it out")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        model.compile()


def _from_parent(store: Store, plan: Plan, parent: Manifest, progress: Progress) -> Built:
    config = load_config(store, parent)
    task = task_of(plan.data)
    head = head_for(task, config)
    model_class(config, head)
    fits = head == head_of(config) or head == "causal"
    if task in _LABELLED:
        labels = labels_of(plan.data, plan.data_label)
        fits = fits and labels.same_as(config)
    if fits:
        model = load_model(store, parent, dtype=torch.float32, head=head, progress=progress)
        small_files = {CONFIG_FILE: _config_file(model, model_config(store, parent, "the model"))}
        if entry := parent.file(_GENERATION_FILE):
            small_files[_GENERATION_FILE] = read_file(store, entry)
        return Built(model, small_files)
    _suit(config, plan, head)
    adapted = adapt_model(store, parent, config, head=head, seed=plan.config.seed, progress=progress)
    return Built(adapted.model, _new_files(adapted.model), adapted.new)


def _with_adapter(built: Built, plan: Plan, parent: Manifest) -> Built:
    """The same model with a new adapter, which alone is trained and stored."""
    config = plan.config
    assert config.lora is not None
    table = describe_adapter(
        built.model,
        rank=config.lora,
        alpha=config.lora_alpha or 2.0 * config.lora,
        targets=config.lora_targets,
        new=built.new,
    )
    wrapper = add_adapter(built.model, table, seed=config.seed)
    small_files = built.small_files | {ADAPTER_CONFIG: encode_adapter_config(table)}
    return Built(wrapper.get_base_model(), small_files, built.new, _adapter_form(plan, wrapper, parent))


def _resumed_adapter(store: Store, plan: Plan, checkpoint: Manifest, progress: Progress) -> Built:
    if not is_adapter(checkpoint) or plan.model is None:
        raise UsageError("--lora does not go on from the checkpoint of a whole model", hint="name it: --model REF")
    head = head_for(task_of(plan.data), load_config(store, checkpoint))
    wrapper = load_adapter(store, checkpoint, head=head, dtype=torch.float32, progress=progress)
    names = (CONFIG_FILE, _GENERATION_FILE, ADAPTER_CONFIG)
    small_files = {entry.path: read_file(store, entry) for name in names if (entry := checkpoint.file(name))}
    return Built(wrapper.get_base_model(), small_files, (), _adapter_form(plan, wrapper, plan.model))


def _adapter_form(plan: Plan, wrapper: Any, base: Manifest) -> Form:
    trained = sum(parameter.numel() for parameter in wrapper.parameters() if parameter.requires_grad)
    return Form(
        ADAPTER_WEIGHTS,
        lambda _: adapter_state(wrapper),
        tuple(base_entries(base)),
        {ADAPTER_OF: str(plan.model_id), "trained": trained},
    )


def _from_nothing(store: Store, plan: Plan) -> Built:
    config, task = plan.config, task_of(plan.data)
    vocab = dataset_number(plan.data, "vocab_size", "the dataset")
    seq_len = dataset_number(plan.data, "seq_len", "the dataset")
    made: PretrainedConfig
    if config.config is not None:
        made = parse_config({"vocab_size": vocab, **config.config})
    elif task in _ENCODED:
        made = bert_config(config.depth or 1, vocab, seq_len, pad=pad_id(plan.data))
    else:
        assert config.depth is not None
        tokenizer = load_tokenizer(store, plan.data)
        made = llama_config(
            config.depth,
            vocab,
            seq_len,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
        )
    head = head_for(task, made)
    _suit(made, plan, head)
    model = new_model(made, seed=config.seed, head=head)
    return Built(model, _new_files(model))


def _suit(config: PretrainedConfig, plan: Plan, head: Head) -> None:
    """Tell a configuration what its new head is for."""
    if head == "classify":
        labels_of(plan.data, plan.data_label).configure(config)
        if config.pad_token_id is None:
            config.pad_token_id = pad_id(plan.data)  # a decoder finds the last token of a text by it


def _new_files(model: PreTrainedModel) -> dict[str, bytes]:
    files = {CONFIG_FILE: _config_file(model, json.loads(model.config.to_json_string()))}
    if model.can_generate() and model.generation_config is not None:
        files[_GENERATION_FILE] = model.generation_config.to_json_string().encode()
    return files


def _config_file(model: PreTrainedModel, table: dict[str, Json]) -> bytes:
    """config.json of the trained model: what it was built from, and that its weights are float32."""
    kept = {key: value for key, value in table.items() if key != "torch_dtype"}
    kept |= {"architectures": [type(model).__name__], "dtype": "float32"}
    return (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()


def _check(model: Any, plan: Plan) -> None:
    """The same questions as before loading, asked again of what was really built: configs may nest their sizes."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    vocab = dataset_number(plan.data, "vocab_size", "the dataset")
    if vocab > embeddings:
        raise UsageError(f"the dataset uses {vocab:,} tokens, but the model has embeddings for {embeddings:,}")
    longest = getattr(model.config, "max_position_embeddings", None)
    seq_len = dataset_number(plan.data, "seq_len", "the dataset")
    first = first_position(model, parameters_of(model)) or 0
    if isinstance(longest, int) and seq_len + first > longest:
        raise UsageError(f"the dataset has rows of {seq_len:,} tokens, but the model takes at most {longest - first:,}")
