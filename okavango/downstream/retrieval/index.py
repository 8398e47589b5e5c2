"""An index of global descriptors in a folder: exact by default, any FAISS factory string, memory-mapped, grown by adding to it.

| file | content |
|---|---|
| `index.json` | format version, sizes, factory, storage, facts, sha256 of each file; written last, so that an index is whole |
| `names-N.txt`, `vectors-N.npy` | names, one a line, and descriptors of one part |
| `scales-N.npy` | what the rows of int8 descriptors are multiplied by |
| `mean.npy`, `components.npy` | PCA or whitening that descriptors went through |
| `faiss-N.index` | the approximate index, where there is one; N counts the parts in it |
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from okavango.downstream.retrieval.search import Nearest
from okavango.files import write_json, write_whole
from okavango.zoo.checkpoint import file_sha256

FORMAT_VERSION = 1
STORAGE = ("float32", "float16", "int8")
PART = 2**16  # rows of a part: 256 MiB at 1024 numbers
PORTION = 2**13  # rows that are read at once
TRAINING = 2**18  # rows at most that an approximate index, PCA or whitening is fitted to


class IndexFormatError(ValueError):
    """A folder that is no index, or whose files are not those that were written."""


@dataclass(frozen=True, eq=False)
class Projection:
    """PCA, or PCA whitening, followed by unit length (Jegou and Chum, ECCV 2012).

    Attributes:
        mean: float32 (D,); components: float32 (D, K), columns divided by their standard deviation when whitening.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray, width: int, *, whiten: bool = True) -> Projection:
        """Fit to descriptors (N, D), keeping the `width` directions of greatest variance.

        Raises:
            ValueError: `width` is more than D, or than N - 1.
        """
        if not 1 <= width <= min(vectors.shape[1], len(vectors) - 1):
            raise ValueError(
                f"{'whitening' if whiten else 'PCA'} to {width} numbers: {len(vectors)} descriptors of {vectors.shape[1]} numbers "
                f"allow 1..{min(vectors.shape[1], len(vectors) - 1)}"
            )
        mean = vectors.mean(0, dtype=np.float64)
        centred = vectors - mean.astype(np.float32)
        values, directions = np.linalg.eigh(np.asarray(centred.T @ centred, np.float64) / len(vectors))
        values, directions = values[::-1][:width], directions[:, ::-1][:, :width]
        directions = directions * np.where(directions[np.abs(directions).argmax(0), np.arange(width)] < 0, -1, 1)  # signs are free
        if whiten:
            directions = directions / np.sqrt(values.clip(1e-9 * values[0]))
        return cls(mean.astype(np.float32), directions.astype(np.float32))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> float32 (N, K) of unit length."""
        projected = (vectors.astype(np.float32) - self.mean) @ self.components
        return projected / np.linalg.norm(projected, axis=1, keepdims=True).clip(1e-12)


class Index:
    """Opens an index that `build_index` wrote; see there.

    Args:
        folder: the index.
        check: compare the sha256 of all files, which reads them whole.
    Attributes:
        config: what `index.json` holds; width: numbers of a descriptor before PCA or whitening.
    Raises:
        IndexFormatError: no index, another format version, or files that are missing or differ.
    """

    def __init__(self, folder: str | os.PathLike, *, check: bool = False):
        self.folder = Path(folder)
        try:
            self.config: dict[str, Any] = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise IndexFormatError(f"{self.folder}: no index; `okavango index build` writes one") from None
        except ValueError:
            raise IndexFormatError(f"{self.folder}: index.json is torn; build the index anew") from None
        if self.config.get("format_version") != FORMAT_VERSION:
            found = self.config.get("format_version")
            raise IndexFormatError(f"{self.folder}: format_version {found!r}; this version reads {FORMAT_VERSION}")
        for name, facts in self.config["files"].items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != facts["bytes"] or (check and file_sha256(path) != facts["sha256"]):
                raise IndexFormatError(f"{path}: missing, or not the file that was written; build the index anew")
        self.width: int = self.config["width"]
        self.projection = Projection(self._array("mean"), self._array("components")) if self.config["projection"] else None
        self._faiss: Any = None

    def __len__(self) -> int:
        return sum(self.config["parts"])

    @property
    def names(self) -> list[str]:
        """Of all rows, in order."""
        files = (self.folder / f"names-{part:05d}.txt" for part in range(len(self.config["parts"])))
        return [line for file in files for line in file.read_text("utf-8", "surrogateescape").split("\n")[:-1]]

    @property
    def bytes_each(self) -> float:
        """Bytes of all files per row."""
        return sum(facts["bytes"] for facts in self.config["files"].values()) / max(1, len(self))

    def chunks(self) -> Iterator[np.ndarray]:
        """Stored descriptors, float32 (n, width after projection), `PORTION` rows at most at a time, in order."""
        for part in range(len(self.config["parts"])):
            stored = np.load(self.folder / f"vectors-{part:05d}.npy", mmap_mode="c", allow_pickle=False)
            scales = self._array(f"scales-{part:05d}") if self.config["storage"] == "int8" else None
            for first in range(0, len(stored), PORTION):
                rows = torch.from_numpy(stored[first : first + PORTION]).float()  # torch is quicker at this than numpy
                yield rows.numpy() if scales is None else rows.numpy() * scales[first : first + PORTION]

    def search(self, queries: np.ndarray, count: int, *, exactly: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The nearest rows of each query by Euclidean distance.

        Args:
            queries: descriptors (Q, D) as they come from the model; PCA or whitening is applied here.
            count: neighbours, all rows at most.
            exactly: read every row even where there is an approximate index.
        Returns:
            squared distances, float32 (Q, K), ascending, and rows int64 (Q, K); an exact search puts the lower of equally distant
            rows first, an approximate one may find fewer and fills up with -1 at infinity.
        Raises:
            ValueError: descriptors of another size.
            ImportError: an approximate index, and faiss is not installed.
        """
        queries = self._fitting(queries)
        count = min(count, len(self))
        if self.config["factory"] == "Flat" or exactly:
            return self._exact(queries, count)
        distances, rows = self._approximate().search(np.ascontiguousarray(queries), count)
        return np.where(rows < 0, np.inf, distances), rows

    def _exact(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        nearest = Nearest(torch.from_numpy(np.ascontiguousarray(queries)), count)
        for chunk in self.chunks():
            nearest.look(torch.from_numpy(chunk))
        return nearest.distances.numpy(), nearest.rows.numpy()

    def recall(self, queries: np.ndarray, count: int = 10) -> float:
        """Share of the `count` truly nearest rows that a search finds, over all queries; 1 for an exact index."""
        found, true = self.search(queries, count)[1], self.search(queries, count, exactly=True)[1]
        return float(np.mean([np.isin(wanted, got).mean() for wanted, got in zip(true, found, strict=True)]))

    def add(self, parts: Iterable[tuple[list[str], np.ndarray]]) -> None:
        """Append descriptors; other processes see all of them or none.

        Args:
            parts: names and descriptors (n, D), in any portions.
        Raises:
            ValueError: descriptors of another size or not finite, a name with a line break, or not one name a descriptor.
        """
        config = json.loads(json.dumps(self.config))
        ann = self._read(mapped=False) if config["factory"] != "Flat" else None
        written: list[Path] = []
        try:
            for names, rows in _regroup(parts, PART):
                rows = self._fitting(rows)
                if ann is not None:
                    ann.add(np.ascontiguousarray(rows))
                number = len(config["parts"])
                stored = _stored(rows, config["storage"])
                files: dict[str, Any] = {f"{name}-{number:05d}.npy": partial(np.save, arr=array) for name, array in stored.items()}
                lines = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
                files[f"names-{number:05d}.txt"] = lambda file, lines=lines: file.write(lines)
                for name, write in files.items():
                    write_whole(self.folder / name, write)
                    written.append(self.folder / name)
                    config["files"][name] = _facts(self.folder / name)
                config["parts"].append(len(rows))
            old = [name for name in config["files"] if name.startswith("faiss-")]
            if ann is not None:
                import faiss

                name = f"faiss-{len(config['parts']):05d}.index"
                faiss.write_index(ann, str(self.folder / name))
                written.append(self.folder / name)
                config["files"] = {key: value for key, value in config["files"].items() if key not in old}
                config["files"][name] = _facts(self.folder / name)
            write_json(self.folder / "index.json", config)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        self.config, self._faiss = config, None
        for name in old if ann is not None else ():
            (self.folder / name).unlink(missing_ok=True)

    def _fitting(self, vectors: np.ndarray) -> np.ndarray:
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise ValueError(
                f"{self.folder}: descriptors of shape {list(vectors.shape)}, the index holds {self.width} numbers each; describe "
                "them with the model that the index was built with"
            )
        if not np.isfinite(vectors).all():
            raise ValueError(f"{self.folder}: descriptors hold values that are not finite; check the model")
        return vectors if self.projection is None else self.projection(vectors)

    def _approximate(self) -> Any:
        if self._faiss is None:
            self._faiss = self._read(mapped=True)
        return self._faiss

    def _read(self, *, mapped: bool) -> Any:
        faiss = _faiss(self.config["factory"])
        (name,) = (name for name in self.config["files"] if name.startswith("faiss-"))
        found = faiss.read_index(str(self.folder / name), faiss.IO_FLAG_MMAP if mapped else 0)
        if self.config["search"]:
            faiss.ParameterSpace().set_index_parameters(found, self.config["search"])
        return found

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", allow_pickle=False)


def build_index(
    folder: str | os.PathLike,
    parts: Iterable[tuple[list[str], np.ndarray]],
    *,
    factory: str = "Flat",
    search: str = "",
    storage: str = "float32",
    pca: int = 0,
    whiten: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> Index:
    """Write descriptors to a folder as an index. It appears only when it is whole.

    Memory holds one part, and of what an approximate index, PCA or whitening is fitted to, `TRAINING` rows.

    Args:
        folder: must not exist yet, or be empty.
        parts: names and descriptors (n, D), in any portions.
        factory: "Flat" reads every row; others are FAISS factory strings such as "IVF1024,Flat", "HNSW32" or "IVF1024,PQ64".
        search: parameters of a FAISS index while it searches, such as "nprobe=16" or "efSearch=64".
        storage: "float32", "float16" or "int8" (with a scale per row) for the rows themselves.
        pca, whiten: keep so many numbers of each descriptor, by PCA or by PCA and whitening; 0 leaves them alone.
        facts: what else `index.json` shall say: the model, the source ...
    Raises:
        ValueError: nothing to index, an unknown factory or storage, or a folder that holds something.
        ImportError: a factory other than "Flat", and faiss is not installed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; name another folder, or add to that index")
    if storage not in STORAGE:
        raise ValueError(f"storage {storage!r}: expected {', '.join(STORAGE)}")
    if pca and whiten:
        raise ValueError(f"PCA to {pca} and whitening to {whiten} numbers: choose one of them")
    if factory != "Flat":
        _faiss(factory)
    groups = _regroup(parts, PART)
    ahead: list[tuple[list[str], np.ndarray]] = []
    fitted = factory != "Flat" or pca or whiten
    for group in groups:
        ahead.append(group)
        if not fitted or sum(len(rows) for _, rows in ahead) >= TRAINING:
            break
    if not ahead:
        raise ValueError(f"{folder}: no descriptors, so there is nothing to index")
    width = ahead[0][1].shape[1]
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "width": width,
        "factory": factory,
        "search": search,
        "storage": storage,
        "projection": {"rule": "whitening" if whiten else "pca", "width": whiten or pca} if pca or whiten else None,
        "facts": dict(facts or {}),
        "parts": [],
        "files": {},
    }
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        training = np.concatenate([rows for _, rows in ahead])[:TRAINING] if fitted else ahead[0][1][:0]
        if config["projection"]:
            projection = Projection.fit(training, whiten or pca, whiten=bool(whiten))
            training = projection(training)
            for name, array in (("mean", projection.mean), ("components", projection.components)):
                np.save(aside / f"{name}.npy", array)
                config["files"][f"{name}.npy"] = _facts(aside / f"{name}.npy")
        if factory != "Flat":
            faiss = _faiss(factory)
            try:
                ann = faiss.index_factory(whiten or pca or width, factory, faiss.METRIC_L2)
                ann.train(np.ascontiguousarray(training))
                if search:
                    faiss.ParameterSpace().set_index_parameters(ann, search)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(f"factory {factory!r}, search {search!r}: faiss cannot build it: {reason}") from None
            faiss.write_index(ann, str(aside / "faiss-00000.index"))
            config["files"]["faiss-00000.index"] = _facts(aside / "faiss-00000.index")
        del training
        write_json(aside / "index.json", config)
        Index(aside).add(_chained(ahead, groups))
        if folder.exists():
            folder.rmdir()
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Index(folder)


def _chained(ahead: list, rest: Iterable) -> Iterator:
    while ahead:
        yield ahead.pop(0)  # so that its memory is free when the next is read
    yield from rest


def _regroup(parts: Iterable[tuple[list[str], np.ndarray]], size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """The same rows in portions of `size`, the last one smaller."""
    names: list[str] = []
    held: list[np.ndarray] = []
    for some, rows in parts:
        rows = np.asarray(rows)
        if rows.ndim != 2 or len(some) != len(rows) or (held and held[0].shape[1] != rows.shape[1]):
            raise ValueError(
                f"descriptors of shape {list(rows.shape)} for {len(some)} names; expected one row a name, all of one size"
            )
        if any("\n" in name or "\r" in name for name in some):
            raise ValueError(f"name {next(name for name in some if chr(10) in name or chr(13) in name)!r}: holds a line break")
        while len(names) + len(some) >= size:
            room = size - len(names)
            yield [*names, *some[:room]], np.concatenate([*held, rows[:room]])
            names, held, some, rows = [], [], some[room:], rows[room:]
        names, held = [*names, *some], [*held, rows] if len(rows) else held
    if names:
        yield names, np.concatenate(held)


def _stored(rows: np.ndarray, storage: str) -> dict[str, np.ndarray]:
    if storage != "int8":
        return {"vectors": rows.astype(storage)}
    scales = np.abs(rows).max(1, keepdims=True).clip(1e-12) / 127
    return {"vectors": (rows / scales).round().astype(np.int8), "scales": scales.astype(np.float32)}


def _faiss(factory: str) -> Any:
    try:
        import faiss
    except ImportError:
        raise ImportError(f"the index {factory!r} needs faiss: pip install 'okavango[retrieval]'; 'Flat' does without") from None
    return faiss


def _facts(path: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}
