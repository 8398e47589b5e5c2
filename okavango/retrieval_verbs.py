"""What users call for retrieval: `evaluate` under a retrieval protocol, `compare`, and `build`, `add` and `search` of an index."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from okavango import caches
from okavango.data.places import Places, find_places
from okavango.data.sources import Source, open_source
from okavango.downstream.retrieval import metrics
from okavango.downstream.retrieval.describe import BASELINES, BackboneDescriber, Describer, described
from okavango.downstream.retrieval.evaluate import Plan, Ranking, load_ranking, rank, save_ranking, settings
from okavango.downstream.retrieval.index import Index, build_index
from okavango.downstream.retrieval.page import render
from okavango.downstream.retrieval.protocols import find_card, resolve
from okavango.downstream.retrieval.rerankers import find_reranker
from okavango.models.backbone import Backbone, Elastic, latency
from okavango.verbs import Opened, Say, chosen_subnets, command_line, open_model
from okavango.zoo.leaderboard.records import Record, bootstrap, environment, now, paired_bootstrap, read_records, write_record


def evaluate(
    checkpoint: str | Backbone | Opened,
    *,
    data: str | Source | None = None,
    protocol: str = "retrieval",
    subnets: Sequence[str] | str = (),
    report: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    seed: int = 0,
    batch: int = 32,
    workers: int = 0,
    say: Say = print,
    database: str | Source | None = None,
    queries: str | Source | None = None,
    card: str = "",
    pairs: str | os.PathLike | None = None,
    rerank: str = "",
    top: int = 100,
    factory: str = "Flat",
    search: str = "",
    storage: str = "float32",
    pca: int = 0,
    whiten: int = 0,
) -> list[Record]:
    """Measure how well a backbone finds places, with or without re-ranking.

    Args:
        checkpoint: anything `ok.load` takes, a backbone, or a baseline: "thumbnail" (grey, 16 x 16) or "chance" (random vectors).
        data: a folder with ``database`` and ``queries`` in it, or ``samples/places``; or give the two parts.
        protocol: "retrieval/utm25" and others; see `okavango.downstream.retrieval.protocols`.
        subnets: names such as "w64_d2", or "all", of an elastic backbone.
        report: folder that gets ``index.html``, ``ranking.npz`` and, for the next run, descriptors and index.
        out: file of records to append to.
        seed: of intervals.
        batch: pictures per forward pass; workers: processes that read pictures.
        database, queries: the two parts, folders or other sources of pictures.
        card: name of a dataset card, which checks the numbers of pictures and sets dataset and protocol.
        pairs: the file of "retrieval/pairs".
        rerank: "mutual-nn", "similarity" or "ransac", on the first `top` candidates.
        factory, search, storage, pca, whiten: see `okavango.downstream.retrieval.index.build_index`.
    Returns:
        one record per subnet and metric: R@1, R@5, ... and mAP.
    Raises:
        ValueError: a part is missing, empty or has names that the protocol cannot use; or no query has a positive.
    """
    known, asked, dataset = database_and_queries(data, database, queries)
    if card:
        chosen = find_card(card)
        chosen.check(known.ids, asked.ids)
        if protocol not in ("retrieval", chosen.protocol):
            raise ValueError(f"card {card} goes with protocol {chosen.protocol}, not {protocol}")
        protocol, dataset = chosen.protocol, chosen.name
    protocol, rule = resolve(protocol, pairs)
    index: dict[str, Any] = {"factory": factory, "search": search, "storage": storage, "pca": pca, "whiten": whiten}
    plan = Plan(rerank=rerank, top=top, batch=batch, workers=workers, **index)
    reranker = find_reranker(rerank) if rerank else None
    if out is not None and Path(out).exists():
        read_records(out)  # refuses a file that holds something else, before anything is measured
    records: list[Record] = []
    jobs = describers(checkpoint, subnets, local=bool(rerank))
    for describer, facts in jobs:
        with tempfile.TemporaryDirectory() as temporary, ExitStack() as ending:
            folder = Path(report or temporary) / (facts["subnet"] if len(jobs) > 1 else "")
            if report is not None:
                ending.enter_context(caches.used(folder / "descriptors", "descriptors"))
            ranking, known_described, asked_described = rank(
                describer, known, asked, rule, plan, folder, reranker=reranker, say=say
            )
            caches.touch(folder / "descriptors" / "store.json")
            about = settings(ranking, rule, plan) | ({"card": chosen.to_json()} if card else {})
            fields = {
                "dataset": dataset,
                "protocol": protocol,
                "test_manifest_sha256": hashlib.sha256(f"{known.digest} {asked.digest}".encode()).hexdigest(),
                "label": f"{facts['model']} + {rerank} {top}" if rerank else "",
                **facts,
            }
            new = ranking_records(ranking, about, seed=seed, **fields)
            if report is not None:
                save_ranking(folder / "ranking.npz", ranking, {"name": new[0].name, "dataset": dataset, "protocol": protocol})
                page = render(
                    folder / "index.html",
                    ranking,
                    known,
                    asked,
                    known=known_described,
                    asked=asked_described,
                    title=f"{new[0].name} on {dataset}, {protocol}",
                    summary=_summary(ranking, about, new),
                    details=json.dumps({"command": command_line(), **about}, indent=1),
                    upsampled=describer.upsampled,
                )
                say(f"the page is {page}")
        for record in new:
            if out is not None:
                write_record(out, record)
            low, high = record.interval or (record.value, record.value)
            say(f"{record.name} {record.subnet} {record.protocol} {record.metric}: {record.value:.4f} [{low:.4f}, {high:.4f}]")
        records += new
    return records


def database_and_queries(
    data: str | Source | None, database: str | Source | None, queries: str | Source | None
) -> tuple[Any, Any, str]:
    """The two parts as sources, and a name for both.

    Raises:
        ValueError: a part is missing, or both ways of naming them are used.
    """
    if (data is None) == (database is None and queries is None) or (database is None) != (queries is None):
        raise ValueError("retrieval needs a database and queries: give --data FOLDER with both in it, or --database and --queries")
    if database is not None and queries is not None:
        parts = [open_source(part) for part in (database, queries)]
        return _with_ids(parts[0]), _with_ids(parts[1]), f"{parts[0].name}+{parts[1].name}"
    if isinstance(data, str) and data.startswith("samples/"):
        places = open_source(data if ":" in data else f"{data}:test")
    elif isinstance(data, str | os.PathLike):
        places = Places(find_places(data, "test") or data)
    else:
        places = data  # type: ignore[assignment]
    if not isinstance(places, Places):
        raise ValueError(f"{getattr(places, 'name', data)}: no database and queries in it; give --database and --queries")
    return places.parts[0], places.parts[1], places.name


def _with_ids(source: Any) -> Any:
    if not hasattr(source, "ids"):
        raise ValueError(f"source {source.name!r} has no list of names; retrieval needs them before it reads pictures")
    return source


def describers(
    checkpoint: str | Backbone | Opened, subnets: Sequence[str] | str = (), *, local: bool
) -> list[tuple[Describer, dict]]:
    """How to describe pictures with a checkpoint, each of its subnets, or a baseline; with the facts of their records."""
    if isinstance(checkpoint, str) and checkpoint in BASELINES:
        return [(BASELINES[checkpoint](), {"model": checkpoint, "baseline": checkpoint, "subnet": ""})]
    model, name, sha256 = open_model(checkpoint)
    jobs: list[tuple[Describer, dict]] = []
    for subnet in chosen_subnets(model, subnets):
        sized = model.extract(subnet) if subnet is not None and isinstance(model, Elastic) else model
        facts = {"model": name, "subnet": str(subnet or ""), "weights_sha256": sha256, "latency_ms": latency(sized)}
        facts["parameters"] = sum(parameter.numel() for parameter in sized.parameters())
        jobs.append((BackboneDescriber(sized.eval(), local=local), facts))
    return jobs


def ranking_records(ranking: Ranking, about: dict[str, Any], *, seed: int, **facts: Any) -> list[Record]:
    """R@N over all queries and mAP over the answerable ones, as records with intervals.

    Args:
        about: settings of the records; facts: their other fields.
    """
    right, kept = ranking.right, ranking.predictions.shape[1]
    values = {f"R@{count}": metrics.hits(right, count).astype(float) for count in metrics.COUNTS if count <= kept}
    precisions = metrics.average_precisions(right, ranking.positives)
    values["mAP"] = precisions[~np.isnan(precisions)]
    versions, hardware = environment()
    common: dict[str, Any] = {
        "settings": about,
        "versions": versions,
        "hardware": hardware,
        "command": command_line(),
        "created": now(),
    }
    return [
        Record(metric=name, value=float(each.mean()), n=len(each), interval=bootstrap(each, seed), seed=seed, **common, **facts)
        for name, each in values.items()
    ]


def _summary(ranking: Ranking, about: dict[str, Any], records: Sequence[Record]) -> dict[str, str]:
    def text(record: Record) -> str:
        low, high = record.interval or (record.value, record.value)
        return f"{100 * record.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    found, costs = about["results"], about["costs"]
    shown = {record.metric: text(record) for record in records}
    shown |= {f"{name}, answerable": f"{100 * value:.1f} %" for name, value in list(found["recall_answerable"].items())[:1]}
    if "median_error_m" in found:
        shown["median error"] = f"{found['median_error_m']:.1f} m"
    shown["queries"] = f"{len(ranking.queries):,}"
    shown["database"] = f"{len(ranking.database):,}"
    shown["extraction"] = f"{costs['extraction_ms_per_image']:.1f} ms a picture"
    shown["search"] = f"{costs['search_ms_per_query']:.2f} ms a query"
    if ranking.scores is not None:
        shown["re-ranking"] = f"{costs['rerank_ms_per_query']:.1f} ms a query"
    shown["descriptor"] = " + ".join(f"{size:,} B {name}" for name, size in costs["bytes_per_image"].items() if size)
    return shown


def compare(first: str | os.PathLike, second: str | os.PathLike, *, count: int = 1, seed: int = 0, say: Say = print) -> tuple:
    """Whether one method finds more than another on the same queries, by a paired bootstrap of Recall@`count`.

    Args:
        first, second: report folders, or ``ranking.npz`` files.
    Returns:
        (recall of the first - recall of the second, low, high), 95 %.
    Raises:
        ValueError: runs of other protocols, pictures or queries.
    """
    paths = [Path(path) / "ranking.npz" if Path(path).is_dir() else Path(path) for path in (first, second)]
    (a, about), (b, other) = map(load_ranking, paths)
    if about["protocol"] != other["protocol"] or (a.database, a.queries) != (b.database, b.queries):
        raise ValueError(f"{first} and {second}: not the same protocol, database and queries, so there is nothing to compare")
    difference, low, high = paired_bootstrap(metrics.hits(a.right, count), metrics.hits(b.right, count), seed)
    verdict = "the same within chance" if low <= 0 <= high else "better" if low > 0 else "worse"
    say(f"{about['name']} - {other['name']}, R@{count}: {difference:+.4f} [{low:+.4f}, {high:+.4f}], {verdict}")
    return difference, low, high


# -- an index of one's own ----------------------------------------------------------------------------------------------------


def build(
    checkpoint: str,
    data: str | Source,
    out: str | os.PathLike,
    *,
    subnet: str = "",
    batch: int = 32,
    workers: int = 0,
    say: Say = print,
    **options: Any,
) -> Index:
    """Describe pictures and write an index of them.

    Args:
        checkpoint: see `evaluate`; data: any source of pictures; out: folder of the index, must not exist.
        **options: factory, search, storage, pca, whiten; see `okavango.downstream.retrieval.index.build_index`.
    """
    source = open_source(data)
    describer = describers(checkpoint, [subnet] if subnet else [], local=False)[0][0]
    facts = {"model": checkpoint, "subnet": subnet, "describer": describer.digest, "source": source.name}
    bad: list[tuple[int, str]] = []
    index = build_index(out, described(describer, source, batch=batch, workers=workers, bad=bad), facts=facts, **options)
    _told(index, bad, say)
    return index


def add(
    index: str | os.PathLike, data: str | Source, *, checkpoint: str = "", batch: int = 32, workers: int = 0, say: Say = print
) -> Index:
    """Describe more pictures with the model of an index and add them to it."""
    opened = Index(index)
    bad: list[tuple[int, str]] = []
    opened.add(described(_describer_of(opened, checkpoint), open_source(data), batch=batch, workers=workers, bad=bad))
    _told(opened, bad, say)
    return opened


def search(
    index: str | os.PathLike,
    data: str | Source,
    *,
    top: int = 5,
    checkpoint: str = "",
    recall: bool = False,
    batch: int = 32,
    workers: int = 0,
    say: Say = print,
) -> list[tuple[str, list[tuple[str, float]]]]:
    """The nearest pictures of an index for each query picture.

    Args:
        index: folder that `build` wrote; data: the query pictures.
        top: neighbours per query.
        checkpoint: where the index's model lies now, when it has moved.
        recall: also say how many of the truly nearest an approximate index finds.
    Returns:
        (query, [(name, Euclidean distance), ...]) for each query that could be read.
    """
    opened = Index(index)
    names = opened.names
    bad: list[tuple[int, str]] = []
    results: list[tuple[str, list[tuple[str, float]]]] = []
    vectors = []
    for ids, rows in described(_describer_of(opened, checkpoint), open_source(data), batch=batch, workers=workers, bad=bad):
        squared, found = opened.search(rows, top)
        for id, distances, own in zip(ids, np.sqrt(squared), found, strict=True):
            results.append((id, [(names[row], float(d)) for row, d in zip(own, distances, strict=True) if row >= 0]))
            say(f"{id}\t" + "\t".join(f"{name} {distance:.4f}" for name, distance in results[-1][1]))
        if recall:
            vectors.append(rows)
    for _, reason in bad:
        say(f"left out {reason}")
    if recall and vectors:
        say(f"of the {top} truly nearest, the index finds {opened.recall(np.concatenate(vectors), top):.4f}")
    return results


def _describer_of(index: Index, checkpoint: str) -> Describer:
    facts = index.config["facts"]
    name, subnet = checkpoint or facts.get("model", ""), facts.get("subnet", "")
    if not name:
        raise ValueError(f"{index.folder}: does not say which model describes its pictures; give --checkpoint")
    describer = describers(name, [subnet] if subnet else [], local=False)[0][0]
    if describer.digest != facts.get("describer", describer.digest):
        raise ValueError(f"{index.folder}: was built with other weights or another input than {name} has; give that --checkpoint")
    return describer


def _told(index: Index, bad: Sequence[tuple[int, str]], say: Callable[[str], None]) -> None:
    for _, reason in bad:
        say(f"left out {reason}")
    say(f"{len(index):,} descriptors of {index.width} numbers, {index.bytes_each:,.0f} bytes each, are in {index.folder}")
