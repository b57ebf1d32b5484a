"""Models that read texts rather than write them: what a text means (a vector), which label it has, how well two fit.

Texts of about the same length are computed together, so that little is spent on padding; what arrives while one batch
computes goes into the next. One thread computes. It knows nothing of HTTP.
"""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import torch

from llmos_cli.errors import Busy, LlmosError
from llmos_cli.serve.refusal import Refused

BATCH_TOKENS: Final = 4096  # of a batch, padding included
WAITING: Final = 2048  # texts


@dataclass(frozen=True)
class Read:
    """A text, or two, as tokens; `first` of them are those of the first text, where there are two."""

    ids: list[int]
    first: int | None = None


class Reader:
    """A model with its tokenizer. Without `labels` a text becomes the mean of its last states, of length 1."""

    def __init__(self, model: Any, tokenizer: Any, *, classifies: bool) -> None:
        self.classifies = classifies
        self._model = model.eval()
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pad = tokenizer.pad_token_id or 0
        self._types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
        self.context = int(model.config.max_position_embeddings)
        self.vocabulary = int(model.config.vocab_size)
        self.scores = classifies and model.config.num_labels == 1
        names = model.config.id2label or {}
        self.labels = (
            [str(names.get(number, number)) for number in range(model.config.num_labels)] if classifies else []
        )

    def text(self, text: str, second: str | None = None, *, field: str) -> Read:
        """One text or two, with what the tokenizer puts around them; raises Refused where they are too long."""
        try:
            found = self._tokenizer.encode(text, second)
        except (TypeError, ValueError, UnicodeEncodeError) as exc:
            raise Refused(f"{field} is not valid Unicode", field=field) from exc
        first = None if second is None else sum(1 for kind in found.type_ids if kind == 0)
        return self._checked(Read(found.ids, first), field)

    def ids(self, ids: Sequence[int], *, field: str) -> Read:
        """Ids that the user gave."""
        if any(not 0 <= token < self.vocabulary for token in ids):
            raise Refused(f"{field} has tokens that the model does not know", field=field)
        return self._checked(Read(list(ids)), field)

    @torch.inference_mode()
    def read(self, texts: Sequence[Read]) -> torch.Tensor:
        """[texts, labels] probabilities (or one score), or [texts, width] vectors of length 1."""
        longest = max(len(text.ids) for text in texts)
        ids = torch.full((len(texts), longest), self._pad)
        mask = torch.zeros((len(texts), longest), dtype=torch.long)
        types = torch.zeros((len(texts), longest), dtype=torch.long)
        for row, text in enumerate(texts):
            size = len(text.ids)
            ids[row, :size] = torch.tensor(text.ids)
            mask[row, :size] = 1
            if text.first is not None:
                types[row, text.first : size] = 1
        device = self._model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self._types:
            inputs["token_type_ids"] = types.to(device)
        if self.classifies:
            logits = self._model(**inputs).logits.float()
            found = logits if self.scores else logits.softmax(-1)
        else:
            states = self._model.base_model(**inputs).last_hidden_state.float()
            weights = inputs["attention_mask"].unsqueeze(-1).float()
            mean = (states * weights).sum(1) / weights.sum(1)
            found = torch.nn.functional.normalize(mean, dim=-1)
        rows: torch.Tensor = found.cpu()
        return rows

    def _checked(self, read: Read, field: str) -> Read:
        if not read.ids:
            raise Refused(f"{field} is empty: it has no tokens", field=field)
        if len(read.ids) > self.context:
            raise Refused(
                f"{field} has {len(read.ids)} tokens, and the model reads at most {self.context}",
                field=field,
                reason="context_length_exceeded",
                hint="send a shorter text",
            )
        return read


class ReadingRoom:
    """One thread that reads what is handed in, in batches; more than `waiting` texts at once are refused."""

    def __init__(self, reader: Reader, *, waiting: int = WAITING) -> None:
        self.reader, self.waiting, self.running, self.batches = reader, waiting, 0, 0
        self._inbox: queue.SimpleQueue[tuple[Read, Future[torch.Tensor]] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._count = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="llmos-model", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        self._stopping.set()
        self._inbox.put(None)
        self._thread.join(timeout)

    def hand_in(self, texts: Sequence[Read]) -> list[Future[torch.Tensor]]:
        """Futures of a row each; cancelled ones are not computed. Raises Busy where there are too many texts."""
        if not self.alive:
            raise LlmosError("the model thread has stopped")
        with self._count:
            if self.running + len(texts) > self.waiting:
                raise Busy(f"{self.running} texts are already waiting for the model")
            self.running += len(texts)
        futures: list[Future[torch.Tensor]] = []
        for text in texts:
            future: Future[torch.Tensor] = Future()
            future.add_done_callback(self._one_over)
            futures.append(future)
            self._inbox.put((text, future))
        return futures

    def _one_over(self, _: "Future[torch.Tensor]") -> None:
        with self._count:
            self.running -= 1

    def _run(self) -> None:
        left: list[tuple[Read, Future[torch.Tensor]]] = []
        try:
            while not self._stopping.is_set():
                left += self._arrived(wait=not left)
                left = [(text, future) for text, future in left if not future.cancelled()]
                if left:
                    left.sort(key=lambda item: len(item[0].ids))
                    batch = _fitting(left)
                    del left[: len(batch)]
                    self._read(batch)
        finally:
            self._stopping.set()
            for _, future in [*left, *self._arrived(wait=False)]:
                if future.set_running_or_notify_cancel():
                    future.set_exception(LlmosError("the model thread has stopped"))

    def _read(self, batch: Sequence[tuple[Read, "Future[torch.Tensor]"]]) -> None:
        open_ = [(text, future) for text, future in batch if future.set_running_or_notify_cancel()]
        if not open_:
            return
        self.batches += 1
        try:
            rows = self.reader.read([text for text, _ in open_])
        except Exception as exc:  # noqa: BLE001 - it is raised again where the texts are awaited
            for _, future in open_:
                future.set_exception(exc)
            return
        for (_, future), row in zip(open_, rows, strict=True):
            future.set_result(row)

    def _arrived(self, *, wait: bool) -> list[tuple[Read, "Future[torch.Tensor]"]]:
        found = []
        with suppress(queue.Empty):
            while True:
                item = self._inbox.get(block=wait)
                wait = False
                if item is not None:
                    found.append(item)
        return found


def _fitting(texts: Sequence[tuple[Read, Any]]) -> Sequence[tuple[Read, Any]]:
    """As many as BATCH_TOKENS hold, padding included, of texts in the order of their lengths; one at least."""
    count = 1
    while count < len(texts) and (count + 1) * len(texts[count][0].ids) <= BATCH_TOKENS:
        count += 1
    return texts[:count]
