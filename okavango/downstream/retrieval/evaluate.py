"""Describe, index, search, re-rank, measure: one run of a retrieval protocol from pictures to numbers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from okavango.data.sources import Source
from okavango.downstream.retrieval import metrics
from okavango.downstream.retrieval.describe import Described, Describer, describe_source
from okavango.downstream.retrieval.index import PART, Index, build_index
from okavango.downstream.retrieval.protocols import Rule, names_digest, positions
from okavango.downstream.retrieval.rerankers import Reranker, rerank_all
from okavango.downstream.retrieval.store import DescriptorStore
from okavango.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to search and re-rank.

    Attributes:
        factory, search, storage, pca, whiten: of the index; see `build_index`.
        rerank: name of a re-ranker, "" for none; top: candidates that it scores.
        keep: predictions per query that are kept.
        batch: pictures per forward pass; workers: processes that read pictures.
    """

    factory: str = "Flat"
    search: str = ""
    storage: str = "float32"
    pca: int = 0
    whiten: int = 0
    rerank: str = ""
    top: int = 100
    keep: int = 100
    batch: int = 32
    workers: int = 0


@dataclass(frozen=True, eq=False)
class Ranking:
    """What was found for every query, and what it cost.

    Attributes:
        database, queries: names of all pictures that could be read.
        predictions: rows of the database, int64 (Q, K), best first, -1 where a search found fewer.
        distances: between global descriptors, float32 (Q, K), in the order of `predictions`.
        scores: of the re-ranker, float64 (Q, top), or None; higher is better.
        positives: per query, the rows of its place.
        bad: "name: reason" of pictures that could not be read.
        costs: milliseconds, seconds, bytes and MiB, named; fit for JSON.
    """

    database: list[str]
    queries: list[str]
    predictions: np.ndarray
    distances: np.ndarray
    scores: np.ndarray | None
    positives: list[np.ndarray]
    bad: list[str]
    costs: dict[str, Any]

    @property
    def right(self) -> np.ndarray:
        """bool (Q, K); see `okavango.downstream.retrieval.metrics.right`."""
        return metrics.right(self.predictions, self.positives)

    @property
    def answerable(self) -> np.ndarray:
        """bool (Q,): which queries have a place in the database."""
        return np.array([len(own) > 0 for own in self.positives])

    @property
    def located(self) -> bool:
        """Whether all names tell positions."""
        try:
            positions([*self.queries, *self.database])
        except ValueError:
            return False
        return True

    def results(self) -> dict[str, Any]:
        """All numbers, fit for JSON: recall over all and over answerable queries, mAP, precision and recall, metres."""
        right, answerable, kept = self.right, self.answerable, self.predictions.shape[1]
        counts = [count for count in metrics.COUNTS if count <= kept]
        sure = -self.distances[:, 0] if self.scores is None else self.scores[:, 0]
        curve = metrics.precision_recall(sure, right[:, 0], answerable)
        found: dict[str, Any] = {
            "recall": {f"R@{count}": float(metrics.hits(right, count).mean()) for count in counts},
            "recall_answerable": {f"R@{count}": float(metrics.hits(right, count)[answerable].mean()) for count in counts},
            "answerable": int(answerable.sum()),
            "mAP": float(np.nanmean(metrics.average_precisions(right, self.positives))),
            "average_precision_of_first": curve.area,
            "recall_at_full_precision": curve.recall_at(1.0),
        }
        if self.located:
            errors = metrics.distance_errors(self.predictions, positions(self.queries), positions(self.database))
            found["median_error_m"] = float(np.median(errors[np.isfinite(errors)]))
            found["within_m"] = {str(metres): float((errors <= metres).mean()) for metres in (5, 25, 100)}
        return found


def rank(
    describer: Describer,
    database: Source,
    queries: Source,
    rule: Rule,
    plan: Plan,
    folder: str | os.PathLike,
    *,
    reranker: Reranker | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Ranking, Described, Described]:
    """Run a protocol.

    Args:
        describer: pictures -> descriptors.
        rule: which rows are right; see `okavango.downstream.retrieval.protocols`.
        folder: keeps descriptors (``descriptors/``), so that a run that was stopped goes on, and the index (``index/``).
        reranker: the one that `plan.rerank` names.
    Returns:
        the ranking; and database and queries as they were described.
    Raises:
        ValueError: nothing can be read, a name that the rule cannot use, or no query with a positive.
    """
    folder = Path(folder)
    # names first: a mistake in them shows before hours of work
    positives_of(rule, _ids(queries), _ids(database))
    store = DescriptorStore(folder / "descriptors", describer.digest)
    known = describe_source(describer, database, store, batch=plan.batch, workers=plan.workers)
    asked = describe_source(describer, queries, store, batch=plan.batch, workers=plan.workers)
    bad = [f"{part.name}: {reason}" for part, found in ((database, known), (queries, asked)) for _, reason in found.bad]
    for line in bad:
        say(f"left out {line}")
    if reranker is not None:
        asked.local([0])  # says at once where there are none
    began = time.perf_counter()
    index = _index(folder / "index", known, plan)
    indexed = time.perf_counter() - began
    vectors = asked.pooled()
    began = time.perf_counter()
    squared, rows = index.search(vectors, max(plan.keep, plan.top if reranker else 0))
    searched = time.perf_counter() - began
    distances, scores, seconds = np.sqrt(squared), None, 0.0
    if reranker is not None:
        order, scores, seconds = rerank_all(reranker, asked, known, rows, budget=plan.top)
        rows, distances = (np.take_along_axis(array, order, 1) for array in (rows, distances))
    keep = min(plan.keep, rows.shape[1])
    total = len(asked) + len(known)
    costs = {
        "extraction_ms_per_image": 1e3 * (known.seconds + asked.seconds) / total,
        "images_computed": known.computed + asked.computed,  # the others were in the store, so their time says little
        "index_seconds": indexed,
        "search_ms_per_query": 1e3 * searched / len(asked),
        "rerank_ms_per_query": 1e3 * seconds / len(asked),
        "rerank_ms_per_candidate": 1e3 * seconds / (len(asked) * min(plan.top, len(known))),
        "bytes_per_image": store.bytes_each,
        "index_bytes_per_image": index.bytes_each,
        "index_recall_at_10": 1.0 if plan.factory == "Flat" else index.recall(vectors[:1000], 10),
        "peak_memory_mib": peak_memory(),
    }
    positives = positives_of(rule, asked.ids, known.ids)
    return Ranking(known.ids, asked.ids, rows[:, :keep], distances[:, :keep], scores, positives, bad, costs), known, asked


def positives_of(rule: Rule, queries: Sequence[str], database: Sequence[str]) -> list[np.ndarray]:
    """The rows that are right for each query.

    Raises:
        ValueError: none at all, which means that queries and database do not belong together.
    """
    positives = rule(queries, database)
    if not any(map(len, positives)):
        raise ValueError(
            f"none of {len(queries)} queries has its place among {len(database)} database pictures under {rule}; do both folders "
            "belong to one dataset?"
        )
    return positives


def _index(folder: Path, known: Described, plan: Plan) -> Index:
    """The index of what was described; one that is there already is used when it is this one."""
    facts = {"rows": names_digest(known.ids, [key.hex() for key in known.keys]), "describer": known.store.describer}
    options = {name: getattr(plan, name) for name in ("factory", "search", "storage", "pca", "whiten")}
    facts |= options
    if (folder / "index.json").exists():
        found = Index(folder)
        if found.config["facts"] == facts:
            return found
        shutil.rmtree(folder)
    parts = ((known.ids[first : first + PART], known.pooled(slice(first, first + PART))) for first in range(0, len(known), PART))
    return build_index(folder, parts, facts=facts, **options)


def _ids(source: Source) -> list[str]:
    return list(getattr(source, "ids", ())) or [source[i]["id"] for i in range(len(source))]


def peak_memory() -> float:
    """The most memory that this process has held so far, in MiB; on an accelerator, what its tensors have held there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def settings(ranking: Ranking, rule: Rule, plan: Plan) -> dict[str, Any]:
    """What a record says about a run besides its number."""
    return {
        "rule": {"kind": type(rule).__name__.lower(), **vars(rule)},
        "database": len(ranking.database),
        "queries": len(ranking.queries),
        "names_sha256": names_digest(ranking.database, ranking.queries),
        "left_out": len(ranking.bad),
        **vars(plan),
        "results": ranking.results(),
        "costs": ranking.costs,
    }


def save_ranking(path: str | os.PathLike, ranking: Ranking, about: dict[str, Any]) -> None:
    """Write predictions, distances and names, so that every number can be computed anew without the model.

    Args:
        path: a ``.npz`` file, written whole or not at all; no pickle is in it.
        about: fit for JSON.
    """
    lengths = np.array([len(own) for own in ranking.positives], np.int64)
    arrays: dict[str, Any] = {
        "predictions": ranking.predictions,
        "distances": ranking.distances,
        "scores": np.empty((0, 0)) if ranking.scores is None else ranking.scores,
        "positives": np.concatenate([*ranking.positives, np.empty(0, np.int64)]),
        "positives_per_query": lengths,
        "names": np.array(json.dumps([ranking.database, ranking.queries])),
        "about": np.array(json.dumps({**about, "bad": ranking.bad, "costs": ranking.costs})),
    }
    write_whole(Path(path), lambda file: np.savez_compressed(file, **arrays))


def load_ranking(path: str | os.PathLike) -> tuple[Ranking, dict[str, Any]]:
    """Read what `save_ranking` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        database, queries = json.loads(str(found["names"]))
        about = json.loads(str(found["about"]))
        positives = np.split(found["positives"], found["positives_per_query"].cumsum()[:-1])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a run with --report writes ranking.npz") from None
    except Exception as error:
        raise ValueError(f"{path}: not the predictions of a retrieval run ({type(error).__name__})") from None
    scores = found["scores"] if found["scores"].size else None
    fields = (database, queries, found["predictions"], found["distances"], scores, positives)
    return Ranking(*fields, bad=about.pop("bad"), costs=about.pop("costs")), about
