"""What a search makes small: a stored model's mean loss on evenly spaced rows of a dataset, as its task counts it."""

from dataclasses import dataclass
from typing import Final

from llmos_cli.data.layout import check_split
from llmos_cli.formats.ids import ObjectId
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest

MOST_ROWS: Final = 1024
_MOST_TOKENS: Final = 4096  # in a batch


@dataclass(frozen=True)
class Objective:
    """Which documents are scored: those of a split of a dataset, at most `MOST_ROWS` rows of them."""

    data: ObjectId
    split: str

    def loss(self, store: Store, model: ObjectId) -> float:
        """The loss of a model or checkpoint; the caller's random state is untouched."""
        import numpy as np
        import torch

        from llmos_cli.models.config import load_config
        from llmos_cli.models.device import pick_device
        from llmos_cli.models.load import load_model
        from llmos_cli.models.quiet import quiet
        from llmos_cli.train.scoring import score
        from llmos_cli.train.tasks.opened import head_for, open_task, task_of

        data, manifest = read_manifest(store, self.data), read_manifest(store, model)
        head = head_for(task_of(data), load_config(store, manifest))
        with quiet(), torch.random.fork_rng():
            loaded = load_model(store, manifest, device=pick_device(), head=head)
            task = open_task(store, data, loaded, seed=0, split=check_split(data, self.split), progress=Silent())
            count = min(task.count, MOST_ROWS)
            chosen = np.arange(count, dtype=np.int64) * task.count // max(1, count)
            size = max(1, _MOST_TOKENS // task.longest)
            return score(task, loaded, loaded.device, batch=size, indices=chosen)["loss"]
