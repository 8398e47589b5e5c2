"""An index in a folder: exact against brute force, approximate against exact, storage, growth, damage."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.downstream.retrieval import index as module
from okavango.downstream.retrieval.index import Index, IndexFormatError, Projection, build_index


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def vectors():
    return unit(np.random.default_rng(0).normal(size=(300, 16)))


def named(vectors: np.ndarray, portion: int = 37):
    """Names and descriptors in uneven portions."""
    for first in range(0, len(vectors), portion):
        rows = vectors[first : first + portion]
        yield [f"picture {first + i}.jpg" for i in range(len(rows))], rows


def nearest(vectors: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(((queries[:, None].astype(float) - vectors) ** 2).sum(2), axis=1, kind="stable")[:, :count]


def test_exact_search_is_brute_force_over_all_parts(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr(module, "PART", 64)
    index = build_index(tmp_path / "index", named(vectors), facts={"model": "m"})
    assert len(index) == 300 and index.config["parts"] == [64, 64, 64, 64, 44] and index.config["facts"] == {"model": "m"}
    assert index.names == [f"picture {i}.jpg" for i in range(300)]
    queries = unit(np.random.default_rng(1).normal(size=(9, 16)))
    distances, rows = Index(tmp_path / "index", check=True).search(queries, 7)
    assert rows.tolist() == nearest(vectors, queries, 7).tolist()
    assert distances == pytest.approx(((queries[:, None] - vectors[rows]) ** 2).sum(2), abs=1e-5)
    assert index.search(queries, 1000)[1].shape == (9, 300) and index.recall(queries) == 1.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), part=st.integers(1, 12))
def test_equal_distances_keep_the_order_of_rows(tmp_path_factory, seed, count, part):
    random = np.random.default_rng(seed)
    vectors = random.integers(0, 2, (12, 2)).astype(np.float32)  # four points, many times each
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", part)
        index = build_index(tmp_path_factory.mktemp("ties") / "index", named(vectors))
    queries = random.integers(0, 2, (3, 2)).astype(np.float32)
    assert index.search(queries, count)[1].tolist() == nearest(vectors, queries, count).tolist()


@pytest.mark.parametrize(("storage", "width", "error"), [("float32", 64, 0), ("float16", 32, 1e-3), ("int8", 16, 1e-2)])
def test_storage(tmp_path, vectors, storage, width, error):
    index = build_index(tmp_path / "index", named(vectors), storage=storage)
    (stored,) = index.chunks()
    assert np.abs(stored - vectors).max() <= error and stored.dtype == np.float32
    assert index.search(vectors, 1)[1].ravel().tolist() == list(range(300))
    assert width <= sum(f["bytes"] for n, f in index.config["files"].items() if n.startswith("vectors")) / 300 < width + 1


def test_adding_is_all_or_nothing(tmp_path, vectors):
    whole = build_index(tmp_path / "whole", named(vectors))
    index = build_index(tmp_path / "index", named(vectors[:100]))
    index.add((names, rows + 0) for names, rows in list(named(vectors))[:0])  # nothing
    index.add([([f"picture {i}.jpg" for i in range(100, 300)], vectors[100:])])
    assert len(index) == 300 and Index(tmp_path / "index", check=True).names == whole.names
    assert index.search(vectors[:5], 4)[1].tolist() == whole.search(vectors[:5], 4)[1].tolist()

    before = sorted(path.name for path in (tmp_path / "index").iterdir())

    def torn(part=70_000):
        yield [f"new {i}" for i in range(part)], np.zeros((part, 16), np.float32)  # more than a part: written first
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        index.add(torn())
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before
    assert len(index) == len(Index(tmp_path / "index", check=True)) == 300


def test_projection_decorrelates_and_keeps_unit_length(tmp_path, vectors):
    stretched = unit(vectors * np.linspace(1, 4, 16) + 2)
    projection = Projection.fit(stretched, 6)
    raw = (stretched - projection.mean) @ projection.components
    assert np.cov(raw.T, bias=True) == pytest.approx(np.eye(6), abs=1e-3)
    plain = Projection.fit(stretched, 16, whiten=False)
    centred = stretched - stretched.mean(0)
    assert ((centred @ plain.components) ** 2).sum(1) == pytest.approx((centred**2).sum(1), rel=1e-4)  # a rotation
    index = build_index(tmp_path / "index", named(stretched), whiten=6)
    again = Index(tmp_path / "index")
    assert again.search(stretched[:20], 1)[1].ravel().tolist() == list(range(20)) and again.width == 16
    (stored,) = index.chunks()
    assert stored == pytest.approx(projection(stretched), abs=1e-5) and np.linalg.norm(stored, axis=1) == pytest.approx(
        np.ones(300)
    )
    with pytest.raises(ValueError, match="whitening to 17 numbers: 300 descriptors of 16 numbers allow 1..16"):
        build_index(tmp_path / "other", named(stretched), whiten=17)


def test_approximate_index_and_its_recall(tmp_path, vectors):
    wide = build_index(tmp_path / "wide", named(vectors[:200]), factory="IVF8,Flat", search="nprobe=8")
    assert wide.recall(vectors[:50], 5) == 1.0  # every list is read
    narrow = build_index(tmp_path / "narrow", named(vectors[:200]), factory="IVF8,Flat", search="nprobe=1")
    found, true = narrow.search(vectors[:50], 5)[1], nearest(vectors[:200], vectors[:50], 5)
    expected = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, true, strict=True)])
    assert narrow.recall(vectors[:50], 5) == pytest.approx(expected) and 0.2 < expected < 1
    wide.add([([f"more {i}" for i in range(100)], vectors[200:])])
    again = Index(tmp_path / "wide", check=True)
    assert len(again) == 300 and again.search(vectors[250:260], 1)[1].ravel().tolist() == list(range(250, 260))
    assert len(list((tmp_path / "wide").glob("faiss-*"))) == 1
    distances, rows = narrow.search(vectors[:1], 200)
    assert (rows == -1).any() and np.isinf(distances[rows == -1]).all()


def test_bad_input(tmp_path, vectors, monkeypatch):
    index = build_index(tmp_path / "index", named(vectors))
    with pytest.raises(ValueError, match=r"descriptors of shape \[3, 8\], the index holds 16 numbers each"):
        index.search(np.zeros((3, 8), np.float32), 1)
    with pytest.raises(ValueError, match="not finite"):
        index.search(np.full((1, 16), np.nan, np.float32), 1)
    for make, message in (
        (lambda: build_index(tmp_path / "index", named(vectors)), "not empty"),
        (lambda: build_index(tmp_path / "b", named(vectors), factory="IVF8,Falt"), "factory 'IVF8,Falt'"),
        (lambda: build_index(tmp_path / "b", named(vectors), factory="IVF8,Flat", search="nprob=1"), "nprob=1"),
        (lambda: build_index(tmp_path / "b", named(vectors), factory="IVF5000,Flat"), "faiss cannot build it"),
        (lambda: build_index(tmp_path / "b", named(vectors), storage="int4"), "storage 'int4'"),
        (lambda: build_index(tmp_path / "b", named(vectors), pca=2, whiten=2), "choose one"),
        (lambda: build_index(tmp_path / "b", []), "nothing to index"),
        (lambda: build_index(tmp_path / "b", [(["a"], vectors[:2])]), "for 1 names"),
        (lambda: build_index(tmp_path / "b", [(["a\nb"], vectors[:1])]), "line break"),
        (lambda: build_index(tmp_path / "b", [(["a"], vectors[:1]), (["b"], vectors[:1, :4])]), "all of one size"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]  # nothing is left behind

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: _missing() if name == "faiss" else real(name, *rest))
    with pytest.raises(ImportError, match="needs faiss: pip install"):
        build_index(tmp_path / "b", named(vectors), factory="HNSW8")
    assert index.search(vectors[:2], 1)[1].ravel().tolist() == [0, 1]  # "Flat" does without


def _missing():
    raise ImportError("No module named 'faiss'")


def test_damage_is_named(tmp_path, vectors):
    with pytest.raises(IndexFormatError, match="no index"):
        Index(tmp_path)
    folder = tmp_path / "index"
    build_index(folder, named(vectors))
    file = folder / "vectors-00000.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    Index(folder)  # sizes alone
    with pytest.raises(IndexFormatError, match="vectors-00000.npy: missing, or not the file that was written"):
        Index(folder, check=True)
    file.write_bytes(data[:-1])
    with pytest.raises(IndexFormatError, match="vectors-00000.npy"):
        Index(folder)
    config = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**config, "format_version": 9}))
    with pytest.raises(IndexFormatError, match="format_version 9"):
        Index(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(IndexFormatError, match="torn"):
        Index(folder)
