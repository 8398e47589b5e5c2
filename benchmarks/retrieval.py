"""What retrieval costs: re-ranking, describing and exact search, each beside the plain way of doing it.

    python benchmarks/retrieval.py [--parts rerank describe search] [--quick] [--repeats 3] [--threads 1] [--out FILE.jsonl]

rerank    mutual nearest neighbours of 61 x 61 x 128 local descriptors, 100 candidates a query, beside the formula as it stands,
          one candidate after the other, and beside the products of matrices alone, which nothing exact can do without; and how time
          and memory of a whole re-ranking follow the number of candidates.
describe  pictures a second through our describer of a wrapped timm ViT, beside a loop that calls timm's model.
search    a million descriptors of 1024 numbers, exactly: our index, memory-mapped, beside faiss's flat index.

Candidates take turns and must come to the same result. Processor time with one thread, the clock on the wall with more. Peak memory
is that of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from retrieval_million import descriptors, queries
from timing import fresh, interleave, load, peak_memory, png, publish, speed_record
from torch import Tensor

from okavango.data.sources import Arrays
from okavango.downstream.retrieval.describe import BackboneDescriber, Described, described
from okavango.downstream.retrieval.index import Index, build_index
from okavango.downstream.retrieval.rerank import match_counts
from okavango.downstream.retrieval.rerankers import mutual_nn, rerank_all
from okavango.downstream.retrieval.store import DescriptorStore
from okavango.models.backbone import create_model
from okavango.models.preprocess import Image, Preprocess, Resize
from okavango.zoo.leaderboard.records import Record

GRID, CHANNELS, CANDIDATES = 61, 128, 100
CURVE = (1, 10, 25, 50, 100, 200)  # candidates
MODEL, PICTURES, BATCH = "vit_tiny_patch16_224", 64, 16
ROWS, WIDTH, QUERIES, NEIGHBOURS = 1_000_000, 1024, 100, 100


def clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


# -- re-ranking ---------------------------------------------------------------------------------------------------------------


def local_maps(count: int, grid: int, channels: int) -> tuple[Tensor, Tensor]:
    """A query (n, C), and candidates (count, n, C) that show ever less of it: the query's cells in another order, with noise."""
    random = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(grid * grid, channels, generator=random), dim=-1)
    candidates = torch.empty(count, *query.shape)
    for number in range(count):
        noise = torch.randn(query.shape, generator=random) * (0.5 + 2 * number / count) / channels**0.5
        candidates[number] = F.normalize(query[torch.randperm(len(query), generator=random)] + noise, dim=-1)
    return query, candidates


def directly(query: Tensor, candidates: Tensor) -> Tensor:
    """i is counted when argmax_k S[k, argmax_j S[i, j]] == i, with S = Q P^T; candidate after candidate."""
    counts = []
    for candidate in candidates:
        similarity = query @ candidate.T
        there = similarity.argmax(1)
        back = similarity.argmax(0)
        counts.append((back[there] == torch.arange(len(query))).sum())
    return torch.stack(counts)


def products(query: Tensor, candidates: Tensor, rows: int = 96) -> None:
    """S alone, in blocks that stay in the cache."""
    block = torch.empty(rows, candidates.shape[1])
    for candidate in candidates:
        for part in query.split(rows):
            torch.mm(part, candidate.T, out=block[: len(part)])


def rerank(repeats: int, threads: int, sizes: tuple[int, int, int], curve: Sequence[int]) -> tuple[list[Record], dict[str, bytes]]:
    """Time per query beside the formula, and the curve over the number of candidates."""
    (grid, channels, count), before = sizes, load()
    query, candidates = local_maps(count, grid, channels)
    ways = {"okavango": partial(match_counts, query, candidates), "formula": partial(directly, query, candidates)}
    if not torch.equal(*(way() for way in ways.values())):
        raise SystemExit("the scores differ, so there is nothing to compare")
    times = interleave({**ways, "products": partial(products, query, candidates)}, repeats, clock(threads))
    peaks = {name: fresh(_peak_of_matching, name, sizes, threads) for name in ("nothing", *ways)}
    facts = {
        "protocol": "rerank_speed/v1",
        "n": count,
        "dataset": f"random local descriptors, {grid} x {grid} x {channels}",
        "times": times,
        "loads": (before, load()),
        "settings": {"candidates": count, "threads": threads, "clock": clock(threads).__name__, "scores": "equal"},
    }
    seconds = {name: median(values) for name, values in times.items()}
    make = partial(speed_record, **facts)
    records = [make(f"re-ranking, {name}", "milliseconds per query", 1e3 * seconds[name], baseline=name) for name in times]
    records.append(make("re-ranking", "time of the formula over ours", seconds["formula"] / seconds["okavango"]))
    records.append(make("re-ranking", "share of the products in our time", seconds["products"] / seconds["okavango"]))
    for name in ways:
        extra = peaks[name] - peaks["nothing"]
        records.append(make(f"re-ranking, {name}", "MiB beside the descriptors", extra, baseline=name))
    points = []
    for number in curve:
        before = load()
        taken, peak = fresh(_rerank_from_disk, number, grid, channels, threads, repeats)
        points.append((number, 1e3 * median(taken), peak))
        about = {**facts, "n": number, "times": {"okavango": taken}, "loads": (before, load())}
        about["settings"] = {"candidates": number, "threads": threads, "from": "float16 on disk, memory-mapped"}
        label = f"whole re-ranking of {number} candidates"
        records.append(speed_record(label, "milliseconds per query", points[-1][1], **about))
        records.append(speed_record(label, "peak memory of the process, MiB", peak, **about))
        print(f"{label}: {points[-1][1]:.0f} ms, {peak:.0f} MiB", flush=True)
    return records, {"Whole re-ranking of a query from disk: time and peak memory by the number of candidates": picture(points)}


def _peak_of_matching(name: str, sizes: tuple[int, int, int], threads: int) -> float:
    torch.set_num_threads(threads)
    grid, channels, count = sizes
    query, candidates = local_maps(count, grid, channels)
    if name != "nothing":
        (match_counts if name == "okavango" else directly)(query, candidates)
    return peak_memory()


def _rerank_from_disk(count: int, grid: int, channels: int, threads: int, repeats: int) -> tuple[list[float], float]:
    """In a process of its own: seconds of `rerank_all` for one query, descriptors read from their store; and the peak memory."""
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        store, keys = DescriptorStore(folder, "benchmark"), []
        for number in range(count + 1):
            local = F.normalize(torch.randn(1, grid, grid, channels, generator=random), dim=-1)
            keys.append(number.to_bytes(16, "little"))
            store.add(keys[-1:], torch.zeros(1, 8), local)
            store.flush()  # one picture a file, so that writing holds no more than reading
        parts = [Described(store, own, [key.hex() for key in own], np.arange(len(own)), [], 0.0, 0) for own in (keys[:1], keys[1:])]
        times = []
        for _ in range(repeats):
            began = clock(threads)()
            rerank_all(mutual_nn, parts[0], parts[1], np.arange(count)[None], budget=count)
            times.append(clock(threads)() - began)
    return times, peak_memory()


def picture(points: Sequence[tuple[int, float, float]]) -> bytes:
    """PNG: time and memory against the number of candidates."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, column, label in zip(panels, (1, 2), ("milliseconds per query", "peak memory, MiB"), strict=True):
        panel.plot([point[0] for point in points], [point[column] for point in points], marker="o")
        panel.set_xlabel("candidates")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    return png(figure)


# -- describing ---------------------------------------------------------------------------------------------------------------


def describe(repeats: int, threads: int, model: str, count: int, batch: int) -> list[Record]:
    """Pictures per second, from 8-bit pixels in memory to unit descriptors."""
    before = load()
    torch.manual_seed(0)
    backbone = create_model(f"timm/{model}").eval()
    spec = backbone.preprocess.array()
    backbone.preprocess = Preprocess(image=Image(size=spec.size, resize=Resize(rule="exact"), normalise=spec.normalise))
    pixels = np.random.default_rng(0).integers(0, 256, (count, *spec.size, 3)).astype(np.uint8)
    describer, source = BackboneDescriber(backbone), Arrays(pixels)
    network, images = backbone.trunk, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.normalise.mean, spec.normalise.std))

    def ours() -> Tensor:
        parts = described(describer, source, batch=batch, bad=[])
        return torch.cat([torch.from_numpy(vectors) for _, vectors in parts])

    @torch.inference_mode()
    def loop() -> Tensor:
        found = []
        for part in images.split(batch):
            tokens = network.forward_features((part.float() / 255 - mean) / std)
            found.append(F.normalize(network.forward_head(tokens, pre_logits=True), dim=1))
        return torch.cat(found)

    torch.testing.assert_close(ours(), loop(), atol=1e-5, rtol=1e-4)
    times = interleave({"okavango": ours, "loop": loop}, repeats, clock(threads))
    rates = {name: count / median(values) for name, values in times.items()}
    make = partial(
        speed_record,
        protocol="describe_speed/v1",
        n=count,
        dataset=f"random pictures, {spec.size[0]} x {spec.size[1]}",
        times=times,
        loads=(before, load()),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        settings={"model": f"timm/{model}", "batch": batch, "threads": threads, "clock": clock(threads).__name__},
    )
    records = [make(f"describing, {name}", "pictures per second", rate, baseline=name) for name, rate in rates.items()]
    return [*records, make("describing", "speed of ours over the loop", rates["okavango"] / rates["loop"])]


# -- searching ----------------------------------------------------------------------------------------------------------------

_index: Any = None  # of a worker's process


def _open_ours(folder: str, threads: int) -> None:
    global _index
    torch.set_num_threads(threads)
    _index = Index(folder)


def _open_faiss(folder: str, threads: int) -> None:
    global _index
    import faiss

    faiss.omp_set_num_threads(threads)
    stored = Index(folder)
    _index = faiss.IndexFlatL2(stored.width)
    for chunk in stored.chunks():
        _index.add(chunk)


def _search(asked: np.ndarray, count: int, threads: int) -> tuple[np.ndarray, float, float]:
    began = clock(threads)()
    rows = _index.search(asked, count)[1]
    return rows, clock(threads)() - began, peak_memory()


def search(repeats: int, threads: int, sizes: tuple[int, int, int, int], folder: Path | None) -> list[Record]:
    """Seconds for all queries at once; each side in a process of its own, which take turns."""
    (rows, width, asked, count), before = sizes, load()
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        began = time.perf_counter()
        build_index(place / "index", descriptors(rows, width))
        built = time.perf_counter() - began
        vectors, wanted = queries(rows, width, asked)
        times: dict[str, list[float]] = {"okavango": [], "faiss": []}
        found, peaks = {}, {}
        with (
            ProcessPoolExecutor(1, get_context("spawn"), _open_ours, (str(place / "index"), threads)) as ours,
            ProcessPoolExecutor(1, get_context("spawn"), _open_faiss, (str(place / "index"), threads)) as theirs,
        ):
            workers = {"okavango": ours, "faiss": theirs}
            for turn in range(repeats + 1):
                for name in list(workers)[:: 1 if turn % 2 else -1]:
                    found[name], seconds, peaks[name] = workers[name].submit(_search, vectors, count, threads).result()
                    if turn:
                        times[name].append(seconds)
    finally:
        shutil.rmtree(place)
    same = float((found["okavango"] == found["faiss"]).mean())
    seconds = {name: median(values) for name, values in times.items()}
    make = partial(
        speed_record,
        protocol="exact_search/v1",
        n=asked,
        dataset=f"{rows:,} random descriptors of {width} numbers",
        times=times,
        loads=(before, load()),
        settings={
            "neighbours": count,
            "threads": threads,
            "clock": clock(threads).__name__,
            "storage": "float32",
            "build_seconds": built,
            "same rows as faiss": same,
            "first is right": float((found["okavango"][:, 0] == wanted).mean()),
        },
    )
    records = []
    for name in workers:
        records.append(make(f"exact search, {name}", "milliseconds per query", 1e3 * seconds[name] / asked, baseline=name))
        records.append(make(f"exact search, {name}", "peak memory of the process, MiB", peaks[name], baseline=name))
    return [*records, make("exact search", "time of faiss over ours", seconds["faiss"] / seconds["okavango"])]


# -- the command --------------------------------------------------------------------------------------------------------------

PARTS = ("rerank", "describe", "search")


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """All parts, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: whether all works, not how fast it is")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the index of a million goes; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="file of records, a page is written beside it")
    given = parser.parse_args(arguments)
    repeats = 1 if given.quick else given.repeats
    torch.set_num_threads(given.threads)
    records: list[Record] = []
    pictures: dict[str, bytes] = {}
    for part in given.parts:
        print(f"{part}, load {load()}", flush=True)
        if part == "rerank":
            sizes, curve = ((13, 32, 5), (1, 5)) if given.quick else ((GRID, CHANNELS, CANDIDATES), CURVE)
            found, pictures = rerank(repeats, given.threads, sizes, curve)
        elif part == "describe":
            small = ("test_vit", 4, 2)
            found = describe(repeats, given.threads, *(small if given.quick else (MODEL, PICTURES, BATCH)))
        else:
            rows = (20_000, 64, 10, 10) if given.quick else (ROWS, WIDTH, QUERIES, NEIGHBOURS)
            found = search(repeats, given.threads, rows, given.folder)
        records += found
    publish(records, given.out, "What retrieval costs", pictures)
    return records


if __name__ == "__main__":
    main()
