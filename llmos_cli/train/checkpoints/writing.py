"""What a model writes for the sources of a seq2seq dataset, held against the targets: exact match, and BLEU where
sacrebleu is installed. It writes greedily, so the same model writes the same.
"""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.tokenizers import load_tokenizer
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store
from llmos_cli.train.inputs import dataset_number
from llmos_cli.train.tasks.translated import TranslatedTask


def write_and_compare(
    store: Store,
    data: Manifest,
    task: TranslatedTask,
    model: Any,
    indices: np.ndarray,
    *,
    batch: int,
    progress: Progress,
) -> dict[str, float]:
    """`exact_match`, the share of targets that are written to the letter, and `bleu` (0 to 100, of the corpus)."""
    tokenizer, end = load_tokenizer(store, data), dataset_number(data, "eos_token_id", "the dataset")
    written: list[str] = []
    wanted: list[str] = []
    with progress.task("writing", total=len(indices), unit="examples") as bar:
        for start in range(0, len(indices), batch):
            pairs = task.pairs(indices[start : start + batch])
            told = _write(task, model, [source for source, _ in pairs], end)
            written += tokenizer.batch_decode(told, skip_special_tokens=True)
            wanted += tokenizer.batch_decode([target.tolist() for _, target in pairs], skip_special_tokens=True)
            bar.advance(len(pairs))
    same = [ours.strip() == theirs.strip() for ours, theirs in zip(written, wanted, strict=True)]
    found = {"exact_match": float(np.mean(same))}
    if find_spec("sacrebleu") is None:
        progress.warn("BLEU is left out: pip install 'llmos[eval]'")
        return found
    from sacrebleu.metrics.bleu import BLEU

    return found | {"bleu": float(BLEU().corpus_score(written, [wanted]).score)}


def _write(task: TranslatedTask, model: Any, sources: list[np.ndarray], eos_id: int) -> list[list[int]]:
    """The ids that the model writes after each source, up to the end of text."""
    longest = max(map(len, sources))
    ids = np.full((len(sources), longest), task.pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, source in enumerate(sources):
        # What goes on from the source must stand right behind it.
        where = slice(0, len(source)) if task.start_id is not None else slice(longest - len(source), None)
        ids[row, where], mask[row, where] = source, 1
    room = task.longest if task.start_id is not None else max(1, task.longest - longest)
    device = model.get_input_embeddings().weight.device
    more = {} if task.start_id is None else {"decoder_start_token_id": task.start_id}
    with torch.no_grad():
        told = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            pad_token_id=task.pad_id,
            eos_token_id=eos_id,
            **more,
        ).cpu()
    begin = 1 if task.start_id is not None else longest
    return [_until(row[begin:].tolist(), eos_id) for row in told]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
