"""Order, substitutes and the loader: pure functions of seed and position, whatever the number of ranks or workers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.data.loading import Batches, DataError, Order, batch_loader, derive
from okavango.data.sources import Arrays, BadSample


def source(count: int = 20) -> Arrays:
    return Arrays(np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8))


class Torn:
    """A source in which some samples cannot be read."""

    def __init__(self, count: int, bad: set[int]):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"s{index}", "torn")
        return {"image": torch.full((1, 1, 1), index), "id": f"s{index}"}


def transform(sample, seed):
    return {**sample, "seed": seed}


def collate(samples, seed):
    images = torch.stack([sample["image"] for sample in samples])
    return {
        "image": images,
        "ids": [sample["id"] for sample in samples],
        "seeds": [sample["seed"] for sample in samples],
        "seed": seed,
    }


def batches(data=None, **changes) -> Batches:
    return Batches(source() if data is None else data, transform, collate, **{"batch": 8, "seed": 3, **changes})


def plain(batch: dict) -> dict:
    return {**batch, "image": batch["image"].tolist()}


def test_derive_is_stable_and_spreads():
    assert derive(0, 1, "masks") == 1696103777721678655  # must never change: runs resume by it
    values = [derive(seed, epoch) for seed in range(40) for epoch in range(40)]
    assert len(set(values)) == 1600 and all(0 <= value < 2**63 for value in values)
    assert derive(1, "2") != derive("1", 2) != derive(1, 2) and derive("ab") != derive("a", "b")


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**63 - 1), size=st.integers(1, 50), epoch=st.integers(0, 1000))
def test_each_epoch_is_a_permutation(seed, size, epoch):
    order = Order(seed, size)
    got = [order[epoch * size + place] for place in range(size)]
    assert {e for e, _ in got} == {epoch} and sorted(index for _, index in got) == list(range(size))


def test_epochs_and_seeds_differ_and_first_places_are_uniform():
    firsts = np.bincount([Order(seed, 10)[0][1] for seed in range(2000)], minlength=10)
    assert ((firsts - 200) ** 2 / 200).sum() < 28  # chi-squared, 9 degrees of freedom, p = 0.001
    a = [Order(0, 100)[i][1] for i in range(200)]
    assert a[:100] != a[100:] and a[:100] != [Order(1, 100)[i][1] for i in range(100)]


def test_order_of_nothing_is_refused():
    with pytest.raises(DataError, match="empty"):
        Order(0, 0)


@settings(deadline=None, max_examples=40)
@given(world=st.sampled_from([1, 2, 3, 4, 6]), accumulate=st.sampled_from([1, 2]), step=st.integers(0, 30))
def test_samples_do_not_depend_on_the_world_size(world, accumulate, step):
    one = batches(batch=24)[step, 0]
    ids, seeds = [], []
    for rank in range(world):
        for micro in range(accumulate):
            part = batches(batch=24, rank=rank, world=world, accumulate=accumulate)[step, micro]
            ids += part["ids"]
            seeds += part["seeds"]
    assert ids == one["ids"] and seeds == one["seeds"]


def test_collate_seeds_differ_between_steps_ranks_and_micro_batches():
    seen = {
        batches(world=2, rank=rank, accumulate=2)[step, micro]["seed"]
        for step in range(3)
        for rank in range(2)
        for micro in range(2)
    }
    assert len(seen) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 10, "world": 4}, "multiple of 4 = 4 processes x 1"),
        ({"batch": 6, "world": 2, "accumulate": 2}, "multiple of 4 = 2 processes x 2"),
        ({"batch": 0}, "batch size 0"),
        ({"rank": 1}, "expected 0..0"),
        ({"data": Torn(0, set())}, "empty"),
    ],
)
def test_impossible_batches_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        batches(**changes)


@settings(deadline=None, max_examples=40)
@given(bad=st.sets(st.integers(0, 9), max_size=4), step=st.integers(0, 5))
def test_bad_samples_are_replaced_the_same_way_each_time(bad, step):
    data = Torn(10, bad)
    got, again, whole = batches(data)[step, 0], batches(data)[step, 0], batches(Torn(10, set()))[step, 0]
    assert plain(got) == plain(again)
    assert len(got["ids"]) == 8 and not {int(id[1:]) for id in got["ids"]} & bad
    for id, seed, want, want_seed in zip(got["ids"], got["seeds"], whole["ids"], whole["seeds"], strict=True):
        if int(want[1:]) not in bad:
            assert (id, seed) == (want, want_seed)
        else:
            assert seed != want_seed
    missing = [id for id in whole["ids"] if int(id[1:]) in bad]
    assert [id for id, reason in got["bad"] if reason == "torn"] and len(got["bad"]) >= len(missing) if missing else not got["bad"]


def test_transform_may_find_a_sample_bad():
    def picky(sample, seed):
        if sample["id"] == "4":
            raise BadSample(sample["id"], "wrong bands")
        return transform(sample, seed)

    loaded = [Batches(source(8), picky, collate, batch=8, seed=0)[step, 0] for step in range(4)]
    assert all(("4", "wrong bands") in batch["bad"] and "4" not in batch["ids"] for batch in loaded)


def test_nothing_readable_stops():
    with pytest.raises(DataError, match="17 samples in a row cannot be read, last s"):
        batches(Torn(10, set(range(10))))[0, 0]


def test_loader_gives_the_same_with_any_number_of_workers_and_from_any_step():
    data = Torn(30, {3, 7})
    want = [(step, micro, plain(batches(data, accumulate=2)[step, micro])) for step in range(6) for micro in range(2)]
    for workers, start in ((0, 0), (1, 2), (2, 0)):
        got = [(s, m, plain(b)) for s, m, b in batch_loader(batches(data, accumulate=2), start, 6, workers=workers)]
        assert got == want[2 * start :]
    assert list(batch_loader(batches(data), 6, 6)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_leaves_global_generators_alone(workers):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(batch_loader(batches(), 0, 3, workers=workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_data_is_one_line(workers):
    with pytest.raises(DataError) as caught:
        list(batch_loader(batches(Torn(10, set(range(10)))), 0, 1, workers=workers))
    assert "\n" not in str(caught.value)


def _facts(samples, seed, descriptor):
    try:
        os.fstat(descriptor)
        held = True
    except OSError:
        held = False
    return {"held": held, "threads": torch.get_num_threads(), "term": signal.getsignal(signal.SIGTERM) == signal.SIG_IGN}


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are inherited by forked workers only")
def test_workers_close_the_lock_use_one_thread_and_ignore_signals(tmp_path):
    import functools
    import multiprocessing

    descriptor = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    try:
        data = Batches(source(), transform, functools.partial(_facts, descriptor=descriptor), batch=2, seed=0)
        for _, _, batch in batch_loader(data, 0, 2, workers=1, close_fds=(descriptor,)):
            assert batch["held"] is False or multiprocessing.get_start_method() != "fork"
            assert batch["threads"] == 1 and batch["term"]
        os.fstat(descriptor)  # this process keeps it
    finally:
        os.close(descriptor)


ORPHANS = """
import os, sys
import numpy as np, torch
from okavango.data.loading import Batches, batch_loader
from okavango.data.sources import Arrays

def transform(sample, seed):
    return sample

def collate(samples, seed):
    return {"pid": os.getpid()}

if __name__ == "__main__":
    data = Batches(Arrays(np.zeros((8, 2, 2), np.uint8)), transform, collate, batch=2, seed=0)
    pids = set()
    for step, _, batch in batch_loader(data, 0, 1000, workers=2):
        pids.add(batch["pid"])
        if len(pids) == 2:
            print(*pids, flush=True)
            sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_leave_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.communicate()

    def alive(pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
