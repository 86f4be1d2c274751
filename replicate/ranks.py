"""One point on several processes: what the trainer needs of torch.distributed, behind one small object.

Determinants are split into contiguous key ranges, which are subtrees (replicate/tree.py); every rank holds
the same parameters and works on its own range. `ALONE`, a group of one, does nothing: the trainer has one
text for both. Random numbers are drawn by the first rank for all: the number of ranks changes a run by
rounding only, a run can be resumed on another number, and ranks that round differently (another processor)
cannot disagree on a sample. Tensors on a GPU travel by NCCL, those on a CPU and all control by gloo.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: by then a rank is stuck, not slow
FIRST_TIMEOUT = datetime.timedelta(
    days=2
)  # of what the first rank does alone (a molecule's FCI), if it lives
PROBES = 64  # keys per rank and range that the borders of the ranges are chosen from
GRACE_SECONDS = 1.0  # for the error of a rank that has just ended to arrive
FAILED = "failed"  # key of that error
END = torch.iinfo(torch.int64).max


class RankLostError(RuntimeError):
    """Another process of the group has ended or hangs; the text is that process's error where it left one."""


@dataclass(frozen=True)
class Group:
    """`size` processes that work on one point; this one is number `rank`. All call the same methods in the
    same order. `cuts`, where they occur: ascending int (size + 1), rank r has rows [cuts[r], cuts[r + 1])."""

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, compare=False, repr=False)  # the rendezvous' key-value store
    _turns: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this rank draws samples, writes files and talks."""
        return self.rank == 0

    # -- shares of work -------------------------------------------------------------------------------------

    def even(self, total: int) -> tuple[int, ...]:
        """Cuts of `total` rows into equal shares; some are empty where there are fewer rows than ranks."""
        return tuple(total * r // self.size for r in range(self.size + 1))

    def balanced(self, cost: Tensor) -> tuple[int, ...]:
        """Cuts into shares of about equal `cost`: (rows,), not negative."""
        if self.size == 1:
            return self.even(cost.shape[0])
        running = cost.to(torch.float64).cumsum(0)
        inner = running[-1] * torch.arange(1, self.size, device=cost.device) / self.size
        return (0, *torch.searchsorted(running, inner).tolist(), cost.shape[0])

    def own(self, cuts: Sequence[int]) -> slice:
        """This rank's rows."""
        return slice(cuts[self.rank], cuts[self.rank + 1])

    # -- tensors --------------------------------------------------------------------------------------------

    def gather(self, part: Tensor, cuts: Sequence[int]) -> Tensor:
        """All rows, on every rank, from each rank's own: (own rows, ...) -> (cuts[-1], ...)."""
        if self.size == 1:
            return part
        if part.is_complex():
            return torch.view_as_complex(self.gather(torch.view_as_real(part), cuts))
        longest = max(b - a for a, b in itertools.pairwise(cuts))
        padded = part.new_zeros((longest, *part.shape[1:]))  # all_gather wants equal lengths
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._reachable():
            dist.all_gather(parts, padded)
        return torch.cat(
            [rows[: b - a] for rows, (a, b) in zip(parts, itertools.pairwise(cuts), strict=True)]
        )

    def broadcast(self, values: Tensor) -> Tensor:
        """The first rank's tensor; the others give one of the same shape and type, which is overwritten."""
        if self.size > 1:
            with self._reachable():
                dist.broadcast(values, src=0)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; the same bits on every rank."""
        if self.size > 1:
            with self._reachable():
                dist.all_reduce(torch.view_as_real(values) if values.is_complex() else values)
        return values

    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """Add the gradients of all ranks: one flat bucket, one collective."""
        if self.size == 1:
            return
        weights = list(weights)
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        bucket = self.sum(torch.cat([grad.reshape(-1) for grad in grads]))
        for weight, grad in zip(weights, bucket.split([w.numel() for w in weights]), strict=True):
            weight.grad = grad.view_as(weight)

    def by_range(self, keys: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Send keys to the rank that their range belongs to; ranges are chosen to hold about equally many.

        `keys`: int64 (own,), ascending. Returns the keys that arrived, sender after sender, and the way back:
        a function of what this rank has found for each of them, (arrived, ...), to the same for `keys`.
        """
        if self.size == 1:
            return keys, lambda found: found
        count = PROBES * self.size
        probes = torch.full((count,), END, dtype=torch.int64, device=keys.device)
        if keys.shape[0]:
            probes = keys[torch.arange(count, device=keys.device) * keys.shape[0] // count]
        probes = self.gather(probes, range(0, count * self.size + 1, count)).sort().values
        borders = torch.searchsorted(keys, probes[count::count].contiguous())
        ends = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), keys.shape[0])])
        table = self.gather(ends.diff(), range(0, self.size**2 + 1, self.size)).view(self.size, self.size)
        sizes = table.tolist()
        sent, arriving = sizes[self.rank], [row[self.rank] for row in sizes]
        return self._all_to_all(keys, sent, arriving), partial(self._all_to_all, sent=arriving, arriving=sent)

    def _all_to_all(self, rows: Tensor, sent: list[int], arriving: list[int]) -> Tensor:
        out = rows.new_empty((sum(arriving), *rows.shape[1:]))
        with self._reachable():
            dist.all_to_all_single(out, rows.contiguous(), arriving, sent)
        return out

    # -- control, through host memory: no waiting for the device --------------------------------------------

    def agree(self, value: int) -> int:
        """The first rank's number."""
        return value if self.size == 1 else int(self.broadcast(torch.tensor(value)))

    def total(self, parts: Mapping[str, int]) -> dict[str, int]:
        """Sum over ranks of each number."""
        if self.size == 1:
            return dict(parts)
        sums = self.sum(torch.tensor(list(parts.values()), dtype=torch.int64))
        return dict(zip(parts, sums.tolist(), strict=True))

    def share(self, make: Callable[[], T]) -> T:
        """What the first rank makes (or raises), however long it takes; the others get a copy."""
        if self.size == 1:
            return make()
        ready = f"share/{next(self._turns)}"
        made: list[Any] = [None]
        if self.first:
            try:
                made[0] = make()
            finally:  # after an error, too: the others go on to notice that this rank has ended
                self.store.set(ready, "")
        with self._reachable():
            if not self.first:
                self.store.wait([ready], FIRST_TIMEOUT)
            dist.broadcast_object_list(made, src=0)
        return made[0]

    # -- the end of a rank ----------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Leave this rank's error for the others, before it ends."""
        lines = str(error).splitlines() or [""]
        self.store.set(FAILED, f"rank {self.rank}: {type(error).__name__}: {lines[0]}")

    def failure(self, patience: float = 0.0) -> str:
        """The error that a rank has left, or leaves within `patience` seconds; "" if none."""
        deadline = time.monotonic() + patience
        while not self.store.check([FAILED]):
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.05)
        return str(self.store.get(FAILED).decode())

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            killed = f"a rank has ended without a word (killed, out of memory?): {str(error).splitlines()[0]}"
            raise RankLostError(self._last_words() or killed) from error

    def _last_words(self) -> str:
        try:
            return self.failure(patience=GRACE_SECONDS)
        except RuntimeError:  # the store has gone with its host
            return ""


ALONE = Group()


def join(device: str) -> Group:
    """The group that the launcher's environment describes (torchrun: RANK, WORLD_SIZE, MASTER_ADDR, ...).

    `device`: cpu or cuda; with cuda this process takes the GPU number LOCAL_RANK.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    store = dist.PrefixStore("replicate", store)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return Group(rank, size, store)


def leave() -> None:
    """End the group after work well done."""
    dist.destroy_process_group()
