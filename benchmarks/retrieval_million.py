"""A million descriptors: build an index, open it, search it, and say what that took in time and memory.

    python benchmarks/retrieval_million.py --storage float16 --out million.json
    python benchmarks/retrieval_million.py --factory IVF1024,PQ64 --search nprobe=32
    python benchmarks/retrieval_million.py --against-faiss        # the same exact search by faiss, taking turns; 4 GiB more

Descriptors are random and of unit length; each query is one of them with noise, so what must come first is known.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from okavango.downstream.retrieval.evaluate import peak_memory
from okavango.downstream.retrieval.index import Index, build_index
from okavango.zoo.leaderboard.records import environment

PORTION = 8192


def descriptors(rows: int, width: int):
    """Names and unit descriptors in portions, the same on every call."""
    for first in range(0, rows, PORTION):
        random = np.random.default_rng(first)
        some = random.standard_normal((min(PORTION, rows - first), width), np.float32)
        yield [f"{first + i:08d}.jpg" for i in range(len(some))], some / np.linalg.norm(some, axis=1, keepdims=True)


def queries(rows: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy copies of some descriptors, and which: all from a few portions, so that it is quick."""
    wanted = np.sort(np.random.default_rng(1).choice(min(rows, PORTION), count, replace=False))
    last = (rows - 1) // PORTION * PORTION
    found = []
    for first in (0, last):
        random = np.random.default_rng(first)
        some = random.standard_normal((min(PORTION, rows - first), width), np.float32)
        found.append(some / np.linalg.norm(some, axis=1, keepdims=True))
    ends = [found[0][row] if i % 2 == 0 or row >= len(found[1]) else found[1][row] for i, row in enumerate(wanted)]
    numbers = [row if i % 2 == 0 or row >= len(found[1]) else last + row for i, row in enumerate(wanted)]
    noisy = np.stack(ends) + np.random.default_rng(2).standard_normal((count, width), np.float32) * (0.5 / width**0.5)
    return noisy / np.linalg.norm(noisy, axis=1, keepdims=True), np.array(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--count", type=int, default=100, help="neighbours per query")
    parser.add_argument("--storage", default="float16", choices=("float32", "float16", "int8"))
    parser.add_argument("--factory", default="Flat")
    parser.add_argument("--search", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against-faiss", action="store_true", help="also search by faiss.IndexFlatL2")
    parser.add_argument("--folder", type=Path, help="where the index goes; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        result = measure(given, folder / "index")
    finally:
        shutil.rmtree(folder)
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


def measure(given: argparse.Namespace, folder: Path) -> dict:
    load = os.getloadavg()
    began = time.perf_counter()
    options = {"storage": given.storage, "factory": given.factory, "search": given.search}
    build_index(folder, descriptors(given.rows, given.width), **options)
    built = time.perf_counter() - began
    began = time.perf_counter()
    index = Index(folder)
    opened = time.perf_counter() - began
    asked, wanted = queries(given.rows, given.width, given.queries)
    theirs, faiss_index = [], None
    if given.against_faiss:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        faiss_index = faiss.IndexFlatL2(given.width)
        for chunk in index.chunks():
            faiss_index.add(chunk)
    ours = []
    for _ in range(given.repeats):
        began = time.perf_counter()
        rows = index.search(asked, given.count)[1]
        ours.append(time.perf_counter() - began)
        if faiss_index is not None:
            began = time.perf_counter()
            their_rows = faiss_index.search(asked, given.count)[1]
            theirs.append(time.perf_counter() - began)
    versions, hardware = environment()
    return {
        **vars(given) | {"folder": None, "out": None},
        "bytes_per_row": index.bytes_each,
        "build_seconds": built,
        "open_seconds": opened,
        "search_seconds": ours,
        "faiss_seconds": theirs,
        "same_rows_as_faiss": float((rows == their_rows).mean()) if faiss_index is not None else None,
        "first_is_right": float((rows[:, 0] == wanted).mean()),
        "peak_memory_mib": peak_memory(),
        "load_before": load,
        "load_after": os.getloadavg(),
        "versions": versions,
        "hardware": hardware,
    }


if __name__ == "__main__":
    main()
