"""Several processes as one run: who this process is among them, and how they find each other.

Each computes its share of every step's rows; torch's DistributedDataParallel, by accelerate, adds up the gradients.
Rank 0 alone writes: checkpoints, the log, the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import torch
from accelerate.utils import patch_environment
from torch import distributed

T = TypeVar("T")
PATIENCE: Final = timedelta(minutes=30)  # for a rank that is slow to load; one that died is noticed at once


@dataclass(frozen=True)
class Rank:
    """This process: the `index`-th of `count`, the `local`-th of the `neighbours` on its machine. `meeting` is where
    they find each other: a file:// or a tcp:// address."""

    index: int = 0
    count: int = 1
    local: int = 0
    neighbours: int = 1
    meeting: str = ""

    @property
    def writes(self) -> bool:
        return self.index == 0


ALONE: Final = Rank()


@contextmanager
def joined(rank: Rank) -> Iterator[None]:
    """Be one of the processes of a run while the block lasts."""
    if rank.count == 1:
        yield
        return
    names: dict[str, object] = {
        "LOCAL_RANK": rank.local,
        "LOCAL_WORLD_SIZE": rank.neighbours,
        "RANK": rank.index,
        "WORLD_SIZE": rank.count,
        "MASTER_ADDR": "127.0.0.1",  # they have met when accelerate looks
        "OMP_NUM_THREADS": torch.get_num_threads(),  # accelerate would choose, and say so
    }
    if rank.neighbours == rank.count:
        names |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with patch_environment(**names):
        if torch.cuda.is_available():
            torch.cuda.set_device(rank.local)
        distributed.init_process_group(
            backend, init_method=rank.meeting, rank=rank.index, world_size=rank.count, timeout=PATIENCE
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()


def any_of(asked: bool, device: torch.device) -> bool:
    """Whether any rank asks for it; all must ask at the same place."""
    if not distributed.is_initialized():
        return asked
    flag = torch.tensor(float(asked), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())


def heard_from_first(value: T | None) -> T:
    """What rank 0 says; the others wait for it and say None."""
    if not distributed.is_initialized():
        assert value is not None
        return value
    said = [value]
    distributed.broadcast_object_list(said, src=0)
    assert said[0] is not None
    return said[0]


def agree(text: str) -> bool:
    """Whether all ranks say the same; all must ask at the same place."""
    if not distributed.is_initialized():
        return True
    said: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(said, text)
    return len(set(said)) == 1
