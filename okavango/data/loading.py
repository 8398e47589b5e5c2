"""Which sample stands where, and the loader: everything is a pure function of (seed, epoch, index) or (seed, step, rank).

No generator is advanced by workers or iterators, so a run that was killed goes on bit for bit, with any number of workers; at
another world size with the same global batch the order of samples is the same.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from okavango.data.sources import BadSample, Source

TRIES = 16  # substitutes for one position before the data counts as broken


class DataError(ValueError):
    """The data cannot be used as it is; one line that says what to do."""


def derive(*parts: int | str) -> int:
    """A seed in 0 .. 2**63 - 1 that depends on all parts and their order, equal on every machine and in every version.

    Example:
        >>> derive(0, 1) == derive(0, 1), derive(0, 1) == derive(1, 0), derive(1, 23) == derive(12, 3)
        (True, False, False)
    """
    text = "\0".join(f"{'s' if isinstance(part, str) else 'i'}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # ranks of a raw Philox stream: numpy promises that stream for ever, its `permutation` it does not
    raw = np.random.Philox(key=derive(seed, "order", epoch)).random_raw(size)
    return np.argsort(raw, kind="stable")


class Order:
    """The endless shuffled order of a source: one permutation per epoch, epochs back to back.

    Args:
        seed: names the order.
        size: number of samples, at least 1.
    Example:
        >>> order = Order(seed=0, size=5)
        >>> sorted(order[position] for position in range(5, 10))
        [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    """

    def __init__(self, seed: int, size: int):
        if size < 1:
            raise DataError("the source is empty")
        self.seed, self.size = seed, size

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, index) of a position 0, 1, 2, ..."""
        if position < 0:
            raise IndexError(f"position {position}: positions start at 0")
        epoch, place = divmod(position, self.size)
        return epoch, int(_permutation(self.seed, epoch, self.size)[place])


class Batches(Dataset):
    """Micro-batches by (step, micro). Step s takes the positions s * batch ... of the order; rank r of w takes the r-th of w
    contiguous slices of them, micro-batch m of a the m-th of a slices of that.

    A sample that cannot be read is replaced by another one, found by hashing (seed, epoch, index, try), and named in the batch.

    Args:
        source: the samples.
        transform: ``transform(sample, seed=...)``, seed derived from (seed, epoch, index); may raise `BadSample`.
        collate: ``collate(samples, seed=...) -> dict``, seed derived from (seed, step, rank, micro).
        batch: samples per step over all ranks and micro-batches.
        seed: of order, transforms and collation.
        rank, world: this process and the number of them.
        accumulate: micro-batches per step and rank.
    Raises:
        DataError: the batch cannot be divided, or the source is empty.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Any],
        collate: Callable[..., dict],
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ):
        if batch < 1 or batch % (world * accumulate):
            raise DataError(
                f"batch size {batch} (over all processes) must be a multiple of {world * accumulate} = "
                f"{world} processes x {accumulate} accumulated micro-batches"
            )
        if not 0 <= rank < world:
            raise DataError(f"rank {rank}: expected 0..{world - 1}")
        self.source, self.order = source, Order(seed, len(source))
        self.transform, self.collate = transform, collate
        self.batch, self.seed, self.rank, self.world, self.accumulate = batch, seed, rank, world, accumulate

    def positions(self, step: int, micro: int = 0) -> range:
        """Positions in the order that this rank's micro-batch takes."""
        size = self.batch // (self.world * self.accumulate)
        first = step * self.batch + (self.rank * self.accumulate + micro) * size
        return range(first, first + size)

    def __getitem__(self, where: tuple[int, int]) -> dict:
        """The collated batch, with the extra key "bad": [(id, reason), ...] of samples that were replaced; and "absent", what
        samples that count nevertheless say under that name of parts that they lack, in one list, where there are any.

        Raises:
            DataError: no substitute could be read either.
        """
        step, micro = where
        bad: list[tuple[str, str]] = []
        samples = [self._load(position, bad) for position in self.positions(step, micro)]
        absent = [part for sample in samples if isinstance(sample, Mapping) for part in sample.get("absent", ())]
        batch = self.collate(samples, seed=derive(self.seed, step, self.rank, micro))
        return {**batch, "bad": bad, **({"absent": absent} if absent else {})}

    def _load(self, position: int, bad: list[tuple[str, str]]) -> Any:
        epoch, index = self.order[position]
        seed, chosen = derive(self.seed, epoch, index), index
        for attempt in range(1, TRIES + 2):
            try:
                return self.transform(self.source[chosen], seed=seed)
            except BadSample as error:
                bad.append((error.id, error.reason))
            seed = derive(self.seed, epoch, index, attempt)
            chosen = seed % len(self.source)
        raise DataError(f"{TRIES + 1} samples in a row cannot be read, last {bad[-1][0]}: {bad[-1][1]}; check the data")


def batch_loader(
    batches: Batches,
    start_step: int,
    stop_step: int,
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    close_fds: Sequence[int] = (),
) -> Generator[tuple[int, int, dict], None, None]:
    """Yield (step, micro, batch) in order, for all micro-batches of steps start_step .. stop_step - 1.

    The generator may be closed at any point: nothing but the step has to be remembered to go on. Close it (`contextlib.closing`)
    rather than leave it to the interpreter's end, which would wait for the workers.

    Args:
        batches: see there.
        workers: processes that load; 0 loads in this one.
        prefetch: micro-batches that each worker prepares ahead.
        pin_memory: page-locked tensors, for copies to a GPU.
        close_fds: file descriptors (of a lock, for one) that forked workers must not keep open.
    Raises:
        DataError: from a batch, in whichever process it happened.
    """
    forked = multiprocessing.get_start_method() == "fork"
    loader = DataLoader(
        _Caught(batches),
        batch_size=None,
        sampler=_Steps(start_step, stop_step, batches.accumulate),
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_start_worker, tuple(close_fds) if forked else ()),
        generator=torch.Generator().manual_seed(0),  # iterators draw a seed: not from the global generator, please
    )
    iterator = iter(loader)
    try:
        for step, micro in loader.sampler:
            batch = next(iterator)
            if isinstance(batch, ValueError):
                raise batch
            yield step, micro, batch
    finally:
        del iterator  # ends the workers


class _Steps:
    """(step, micro) pairs in order, without a list of them all."""

    def __init__(self, start: int, stop: int, accumulate: int):
        self.start, self.stop, self.accumulate = start, stop, accumulate

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in range(self.start, self.stop) for micro in range(self.accumulate))


class _Caught(Dataset):
    """Hands a user's mistake over as a value: torch would bury it in a worker's traceback."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, where: tuple[int, int]) -> dict | ValueError:
        try:
            return self.batches[where]
        except ValueError as error:
            return error


def _same(batch):
    return batch


def _start_worker(close_fds: Sequence[int], worker: int) -> None:
    torch.set_num_threads(1)
    # a signal to the whole group must not take the batches from a parent that is about to save and leave in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for descriptor in close_fds:
        try:
            os.close(descriptor)
        except OSError:
            continue  # closed before this worker was made
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
