"""One label a text, or a pair of texts: tasks classify and pair. Labels that are numbers with a fraction are scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from llmos_cli.data.examples import Examples
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.train.tasks.work import Work


@dataclass(frozen=True)
class Labels:
    """The words of a dataset's labels in the order of their numbers; `scores` if they stand for numbers."""

    words: tuple[str, ...]
    scores: tuple[float, ...] | None

    def configure(self, config: PretrainedConfig) -> None:
        """Write them into a model's configuration, where transformers looks for them."""
        if self.scores is not None:
            config.num_labels = 1
            config.problem_type = "regression"
            return
        config.id2label = dict(enumerate(self.words))
        config.label2id = {word: number for number, word in enumerate(self.words)}
        config.problem_type = "single_label_classification"

    def same_as(self, config: PretrainedConfig) -> bool:
        """Whether a model's configuration has these labels."""
        if self.scores is not None:
            return bool(config.problem_type == "regression" and config.num_labels == 1)
        return bool(config.problem_type != "regression" and config.id2label == dict(enumerate(self.words)))


@dataclass(frozen=True)
class LabelledTask:
    """`longest` tokens of an example are seen at most; `types`: the model is told which text a token is of."""

    examples: Examples
    labels: Labels
    longest: int
    types: bool

    @property
    def count(self) -> int:
        return self.examples.count

    def work(self, slot: int, indices: np.ndarray) -> Work:
        batch = self.examples.batch(indices, longest=self.longest)
        if batch.labels is None:
            raise Damaged("the dataset has examples without labels")
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.types and batch.parts is not None:
            places = np.arange(batch.input_ids.shape[1])
            second = (places >= batch.parts[:, None]) & (batch.attention_mask > 0)
            inputs["token_type_ids"] = second.astype(np.int64)
        scores = self.labels.scores
        targets = batch.labels if scores is None else np.array(scores, np.float32)[batch.labels]
        return Work(inputs, targets, len(targets), int(batch.attention_mask.sum()))


def labels_of(data: Manifest, label: str) -> Labels:
    """The labels of a dataset; raises UsageError where it has none."""
    words = data.meta.get("labels")
    if not isinstance(words, list) or not words:
        raise UsageError(
            f"{label} has no labels to learn", hint="shard records with labels: llmos shard FILE NAME --task classify"
        )
    texts = tuple(str(word) for word in words)
    return Labels(texts, _scores(texts))


def _scores(words: Sequence[str]) -> tuple[float, ...] | None:
    """Their values if all are numbers and not all whole ones."""
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        return None
    if all(math.isfinite(value) for value in values) and not all(value.is_integer() for value in values):
        return values
    return None
