"""One data loader in one process, for tests.bench.data: `with_loader.py NAME ACTION FOLDER ROWS [STEP]`.

Run by the python of a virtual environment that has the loader; imports nothing of this repository but for `llmos`.
ROWS is a .npy of token rows, two bytes a token. Actions: `convert` (into FOLDER), `read` (a shuffled epoch), `cut`
(read to batch STEP, keep the state, then say what comes next) and `resume` (from that state). Prints one JSON object.
"""

import hashlib
import json
import os
import pickle
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, SEED = 8, 5
Batches = Iterator[Any]
Opened = tuple[Batches, Callable[[], Any]]  # batches of int64 [8, length]; the state to go on from


class Loader:
    """A way to keep rows and to read them shuffled; `state` is what an earlier process kept, after `done` batches."""

    def convert(self, rows: np.ndarray, folder: Path) -> None:
        raise NotImplementedError

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        raise NotImplementedError


class Memmap(Loader):
    """The yardstick: rows sliced out of a mapped file, a permutation from a seed."""

    def convert(self, rows: np.ndarray, folder: Path) -> None:
        rows.tofile(folder / "rows.bin")
        (folder / "length").write_text(str(rows.shape[1]))
        _sync(folder)

    def rows(self, folder: Path) -> np.ndarray:
        length = int((folder / "length").read_text())
        return np.memmap(folder / "rows.bin", np.uint16, "r").reshape(-1, length)

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        rows = self.rows(folder)
        order = np.random.default_rng(SEED).permutation(len(rows))

        def batches() -> Batches:
            for start in range(done * BATCH, len(rows) - BATCH + 1, BATCH):
                yield rows[order[start : start + BATCH]].astype(np.int64)

        return batches(), lambda: None


class NanoGpt(Memmap):
    """nanoGPT's get_batch: the file is opened anew for each batch, rows begin anywhere. There is no epoch."""

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        import torch

        length = int((folder / "length").read_text())
        torch.manual_seed(SEED)

        def batches() -> Batches:
            for _ in range(len(self.rows(folder)) // BATCH):
                data = np.memmap(folder / "rows.bin", np.uint16, "r")
                starts = torch.randint(len(data) - length, (BATCH,))
                yield torch.stack([torch.from_numpy(data[at : at + length].astype(np.int64)) for at in starts])

        return batches(), lambda: None


class Llmos(Loader):
    """FOLDER is a store that holds the dataset `data`."""

    def convert(self, rows: np.ndarray, folder: Path) -> None:
        from llmos_cli.data.encode import Encoded
        from llmos_cli.data.layout import dtype_name
        from llmos_cli.data.shards import Shape, write_shards
        from llmos_cli.formats.manifest import Manifest
        from llmos_cli.formats.names import parse_ref
        from llmos_cli.progress import Silent
        from llmos_cli.store.local import init_store, open_store
        from llmos_cli.store.transaction import begin

        init_store(folder / "store")
        shape = Shape("lm", rows.shape[1], 64_000_000, rows.dtype, 0)
        with (
            open_store(folder / "store") as store,
            begin(store, purpose="bench", ref=parse_ref("data")) as tx,
            Silent().task("", total=1) as task,
        ):
            runs = (
                Encoded(
                    part.reshape(-1),
                    np.arange(1, len(part) + 1) * rows.shape[1],
                    0,
                    np.full((len(part), 3), -1),
                )
                for part in np.array_split(rows, max(1, len(rows) // 512))
            )
            shards = write_shards(tx, runs, shape, task=task)
            meta = {"seq_len": rows.shape[1], "dtype": dtype_name(rows.dtype), **shards.facts(shape)}
            tx.commit(Manifest("dataset", shards.files, meta, None), message="")

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        from llmos_cli.data.batches import TokenRows
        from llmos_cli.data.mixing import training_order
        from llmos_cli.store.local import open_store
        from llmos_cli.store.packs.objects import read_manifest
        from llmos_cli.store.refs.resolve import resolve

        store = open_store(folder / "store")
        found = resolve(store, "data")
        manifest = read_manifest(store, found.id)
        rows = TokenRows(store, manifest)
        order = training_order(found.id, manifest, rows.row_bytes, SEED)
        order.tell(rows.expect)
        step = done

        def batches() -> Batches:
            nonlocal step
            while (step + 1) * BATCH <= rows.rows:
                batch = rows.batch(order.batch(step, BATCH))
                step += 1
                yield batch.input_ids

        return batches(), lambda: step


class LitData(Loader):
    def convert(self, rows: np.ndarray, folder: Path) -> None:
        from litdata import TokensLoader, optimize

        parts = np.array_split(np.arange(len(rows)), 2)
        np.save(folder.parent / "litdata-rows.npy", rows)
        inputs = [(str(folder.parent / "litdata-rows.npy"), int(part[0]), int(part[-1]) + 1) for part in parts]
        optimize(
            fn=_litdata_rows,
            inputs=inputs,
            output_dir=str(folder / "data"),
            chunk_bytes="16MB",
            item_loader=TokensLoader(block_size=rows.shape[1]),
            num_workers=2,
        )
        _sync(folder)

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        length = np.load(folder.parent / "rows.npy", mmap_mode="r").shape[1]
        loader = TokensLoader(block_size=length)
        dataset = StreamingDataset(str(folder / "data"), item_loader=loader, shuffle=True, seed=SEED, drop_last=True)
        batches = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
        if state is not None:
            batches.load_state_dict(state)
        return (batch.long() for batch in batches), batches.state_dict


def _litdata_rows(item: tuple[str, int, int]) -> Iterator[Any]:
    import torch

    path, first, last = item
    rows = np.load(path, mmap_mode="r")
    for number in range(first, last):
        yield torch.from_numpy(rows[number].copy())


class Mds(Loader):
    """MosaicML Streaming."""

    def convert(self, rows: np.ndarray, folder: Path) -> None:
        _without_vision()
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "data"), columns={"ids": f"ndarray:uint16:{rows.shape[1]}"}) as out:
            for row in rows:
                out.write({"ids": row})
        _sync(folder)

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        _without_vision()
        import torch
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        dataset = StreamingDataset(local=str(folder / "data"), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)

        def join(items: list[Any]) -> Any:
            return torch.from_numpy(np.stack([item["ids"] for item in items]).astype(np.int64))

        batches = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True, collate_fn=join)
        if state is not None:
            batches.load_state_dict(state)
        return iter(batches), batches.state_dict


def _without_vision() -> None:
    """Streaming imports torchvision at once, which need not fit the torch that is there; tokens do without."""
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")


class HfArrow(Loader):
    """Hugging Face datasets, map-style, with torchdata's or no state: batches that are done are skipped."""

    def convert(self, rows: np.ndarray, folder: Path) -> None:
        from datasets import Dataset

        Dataset.from_dict({"ids": rows}).save_to_disk(str(folder / "data"))
        _sync(folder)

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        from datasets import load_from_disk

        dataset = load_from_disk(str(folder / "data")).with_format("numpy").shuffle(seed=SEED)

        def batches() -> Batches:
            for start in range(done * BATCH, len(dataset) - BATCH + 1, BATCH):
                yield dataset[start : start + BATCH]["ids"].astype(np.int64)

        return batches(), lambda: None


class HfStream(HfArrow):
    """Hugging Face datasets, iterable with a shuffle buffer of 1000 rows, and its state."""

    def open(self, folder: Path, state: Any, done: int) -> Opened:
        from datasets import load_from_disk

        dataset = load_from_disk(str(folder / "data")).to_iterable_dataset(num_shards=1).with_format("numpy")
        dataset = dataset.shuffle(seed=SEED, buffer_size=1000)
        if state is not None:
            dataset.load_state_dict(state)
        items = (batch["ids"] for batch in dataset.iter(BATCH, drop_last_batch=True))
        return (np.asarray(ids).astype(np.int64) for ids in items), dataset.state_dict


LOADERS: dict[str, Loader] = {
    "memmap": Memmap(),
    "nanogpt": NanoGpt(),
    "llmos": Llmos(),
    "litdata": LitData(),
    "mds": Mds(),
    "hf": HfArrow(),
    "hf-stream": HfStream(),
}


def main() -> None:
    name, action, place, source, *rest = sys.argv[1:]
    loader, folder = LOADERS[name], Path(place)
    step = int(rest[0]) if rest else 0
    if action == "convert":
        folder.mkdir(parents=True)
        rows = np.load(source)
        began = time.perf_counter()
        loader.convert(rows, folder)
        _say(seconds=time.perf_counter() - began)
        return
    kept = folder.with_name(f"{name}.state")
    state = pickle.loads(kept.read_bytes()) if action == "resume" else None
    began = time.perf_counter()
    batches, ask = loader.open(folder, state, step if action == "resume" else 0)
    first = next(batches)
    opened = time.perf_counter() - began
    if action == "resume":
        _say(first=opened, digest=_digest(first))
    elif action == "cut":
        for _ in range(step - 1):
            next(batches)
        kept.write_bytes(pickle.dumps(ask()))
        _say(digest=_digest(next(batches)))
    else:
        tokens = 0
        began = time.perf_counter()
        for batch in batches:
            tokens += batch.shape[0] * batch.shape[1]
        seconds = time.perf_counter() - began
        _say(first=opened, rate=tokens / seconds / 1e6)


def _digest(batch: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(batch)).tobytes()).hexdigest()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def _say(**facts: Any) -> None:
    facts["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
