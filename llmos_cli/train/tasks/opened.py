"""From a dataset and the model that is trained on it to a task."""

import inspect
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

from transformers import PretrainedConfig, PreTrainedModel

from llmos_cli.data.batches import TokenRows
from llmos_cli.data.examples import Examples
from llmos_cli.data.layout import Split
from llmos_cli.data.order import Order
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.heads import Head
from llmos_cli.models.packed import keeps_apart
from llmos_cli.models.tokenizers import load_tokenizer
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store
from llmos_cli.train.inputs import dataset_number
from llmos_cli.train.tasks.labelled import LabelledTask, labels_of
from llmos_cli.train.tasks.language import LanguageTask
from llmos_cli.train.tasks.masked import MaskedTask, Masking, first_position
from llmos_cli.train.tasks.translated import TranslatedTask
from llmos_cli.train.tasks.work import Task

_HEADS: Final[dict[str, Head]] = {"mlm": "masked", "classify": "classify", "pair": "classify"}


def task_of(data: Manifest) -> str:
    """The name of the task that a dataset was made for."""
    return str(data.meta.get("task"))


def head_for(task: str, config: PretrainedConfig) -> Head:
    """What a model must end in to be trained for a task; raises UsageError for a family that the task is not for."""
    if task == "seq2seq":
        return "seq2seq" if config.is_encoder_decoder else "causal"
    if config.is_encoder_decoder:
        raise UsageError(
            f"a {config.model_type} model is an encoder-decoder, and the dataset is for the task {task}",
            hint="it trains on what llmos shard --task seq2seq makes",
        )
    return _HEADS.get(task, "causal")


def open_task(
    store: Store, data: Manifest, model: PreTrainedModel, *, seed: int, split: Split = "train", progress: Progress
) -> Task:
    """A split of `data` as work for `model`; raises UsageError or Damaged if there is none."""
    name = task_of(data)
    seq_len = dataset_number(data, "seq_len", "the dataset")
    if name == "mlm":
        return MaskedTask(
            TokenRows(store, data, split=split),
            Masking(
                seed,
                dataset_number(data, "mask_token_id", "the dataset"),
                dataset_number(data, "vocab_size", "the dataset"),
                tuple(sorted(load_tokenizer(store, data).all_special_ids)),
            ),
            first_position(model, parameters_of(model)),
        )
    if name in ("classify", "pair"):
        return LabelledTask(
            Examples(store, data, pad_id=pad_id(data), split=split),
            labels_of(data, "the dataset"),
            seq_len,
            types=name == "pair" and (getattr(model.config, "type_vocab_size", None) or 0) > 1,
        )
    if name == "seq2seq":
        return TranslatedTask(
            Examples(store, data, pad_id=pad_id(data), split=split), seq_len, pad_id(data), _start_id(model)
        )
    rows = TokenRows(store, data, split=split)
    apart = keeps_apart(model, rows.seq_len)
    if not apart:
        progress.warn(f"{type(model).__name__} sees the documents before in a row: it takes no notice of positions")
    return LanguageTask(rows, apart)


@contextmanager
def reading_ahead(task: Task, order: Order) -> Iterator[None]:
    """Read the rows of a task before they are asked for, in this order."""
    if isinstance(task, LanguageTask | MaskedTask):
        source: TokenRows | Examples = task.rows
    elif isinstance(task, LabelledTask | TranslatedTask):
        source = task.examples
    else:
        yield
        return
    order.tell(source.expect)
    with closing(source):
        yield


def pad_id(data: Manifest) -> int:
    """What fills the ends of rows; a mask tells it apart, so any token will do."""
    value = data.meta.get("pad_token_id", data.meta.get("eos_token_id"))
    if type(value) is not int:
        raise Damaged("the dataset does not say its pad_token_id")
    return value


def parameters_of(model: Any) -> frozenset[str]:
    """What a model's forward takes by name."""
    return frozenset(inspect.signature(model.forward).parameters)


def _start_id(model: PreTrainedModel) -> int | None:
    config = model.config
    if not config.is_encoder_decoder:
        return None
    for value in (getattr(config, "decoder_start_token_id", None), getattr(config, "bos_token_id", None)):
        if type(value) is int:
            return value
    raise UsageError(f"{type(model).__name__} does not say what its decoder begins with (decoder_start_token_id)")
