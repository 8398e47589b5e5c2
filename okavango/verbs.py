"""What users call: `pretrain` and `finetune`; of pictures also `evaluate`, `embed` and `predict`; and what all verbs share."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from okavango.data.loading import derive
from okavango.data.places import Places, find_places
from okavango.data.sources import Part, Source, cached, open_source
from okavango.downstream.classification.features import Embedded, extract_features, raw_pixels
from okavango.downstream.classification.head import Classifier
from okavango.downstream.classification.protocols import SWEEPS, FittedSweep, Outcome, evaluate_features, fit, fit_sweep, resolve
from okavango.downstream.classification.studies import StudyClassifier
from okavango.downstream.classification.survival import SurvivalHead
from okavango.downstream.retrieval.describe import BackboneDescriber
from okavango.downstream.retrieval.evaluate import Plan, rank
from okavango.downstream.retrieval.protocols import Radius
from okavango.downstream.retrieval.rerankers import mutual_nn
from okavango.downstream.segmentation.head import Segmenter
from okavango.files import write_whole
from okavango.models.adapters import Adapted
from okavango.models.backbone import ArgumentError, Backbone, Elastic, create_model, latency, unknown_name
from okavango.models.features import Subnet
from okavango.models.raster import Bands
from okavango.pretrain import loop
from okavango.pretrain.settings import Recipe, own_arguments
from okavango.recipes import named
from okavango.scenes import Cut, classify_scene, embed_scene
from okavango.zoo.checkpoint import base_problem, file_sha256, read_config, save_checkpoint
from okavango.zoo.hub import base_of, load
from okavango.zoo.hub import resolve as resolve_checkpoint
from okavango.zoo.leaderboard.records import Record, bootstrap, environment, now, read_records, write_record
from okavango.zoo.loading import load_weights

Say = Callable[[str], None]
Embed = Callable[[Source], Embedded]
SCENE = (".tif", ".tiff")  # endings of maps
Sweep = Callable[[Source, str, int], FittedSweep]


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A copy of a recipe with some fields changed.

    Args:
        changes: field -> value; nested fields are written with dots (``{"optim.lr": 1e-3}``), those of the loop without
            (``{"steps": 100}``).
    Raises:
        ValueError: unknown field; the message offers the nearest.
    """
    before = recipe
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        fields = {field.name for field in dataclasses.fields(recipe)}
        loop_fields = {field.name for field in dataclasses.fields(recipe.run)} if isinstance(recipe, Recipe) else set()
        if head in fields:
            new: Any = override(getattr(recipe, head), {rest: value}) if rest else value
            recipe = dataclasses.replace(recipe, **{head: new})
        elif not rest and head in loop_fields:
            recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, **{head: value}))
        else:
            raise ValueError(unknown_name("setting", name, sorted(fields | loop_fields)))
    alone = isinstance(before, Recipe) and "model" in changes and "model_args" not in changes
    return own_arguments(recipe, before) if alone else recipe


def pretrain(
    recipe: str | Recipe, *, data: str | Source | None = None, out: str | os.PathLike, say: Say = print, **changes: Any
) -> Path:
    """Pretrain a backbone, or go on with the run that `out` holds.

    Args:
        recipe: a name that `okavango pretrain --help` lists, or a recipe.
        data: folder of pictures (nested or flat), tar shards, ``samples/fashion`` or a `Source`; None takes the recipe's.
        out: run folder.
        say: receives lines of progress.
        **changes: see `override`; dots are written as ``**{"optim.lr": 1e-3}``.
    Returns:
        The run folder; `export/` in it holds the checkpoint.
    """
    recipe = named(recipe, "pretrain") if isinstance(recipe, str) else recipe
    return _run(override(recipe, changes), data, Path(out), say)


def finetune(
    recipe: str | Recipe, *, data: str | Source | None = None, out: str | os.PathLike, say: Say = print, **changes: Any
) -> Path:
    """Fine-tune a checkpoint (`start=...`) for a task on your own data; otherwise as `pretrain`."""
    recipe = named(recipe, "finetune") if isinstance(recipe, str) else recipe
    return _run(override(recipe, changes), data, Path(out), say)


def _run(recipe: Recipe, data: str | Source | None, out: Path, say: Say) -> Path:
    if data is None and not recipe.data:
        raise ValueError(f"recipe {recipe.name} has no data of its own; give --data FOLDER")
    recipe.check()
    accelerator = loop.make_accelerator(recipe, out)
    source = training_part(data if data is not None else recipe.data)
    if isinstance(data, str):
        recipe = dataclasses.replace(recipe, data=data)
    if recipe.run.epochs:
        steps = max(1, round(recipe.run.epochs * len(source) / recipe.run.batch))
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, steps=steps))
    torch.manual_seed(derive(recipe.run.seed, "initial weights"))
    backbone = starting_backbone(recipe)
    if recipe.run.activation_checkpointing:
        backbone.activation_checkpointing = True
    objective = recipe.objective.build(backbone, tuple(source.classes), recipe.run)
    if recipe.run.compile:
        blocks = getattr(backbone, "blocks", None)
        if blocks is None:
            raise ValueError(f"--compile: {backbone.architecture} has no list of blocks to compile one by one; leave it off")
        for block in blocks:
            block.compile()
    card = {"data": source.name, "data_sha256": source.digest, "samples": len(source), "command": command_line()}
    evaluators: dict[str, Any] = {}
    if recipe.run.eval_every and source.labels is not None:
        evaluators["knn"] = OnlineKnn(source, recipe.run.seed)
    if recipe.run.eval_every and isinstance(source, Places):
        evaluators |= validation(recipe, data)
    base = None
    if getattr(recipe.objective, "adapters_only", False):
        base = frozen_base(objective.backbone, recipe.start, out, main=accelerator.is_main_process)
    loop.train(
        objective,
        source,
        recipe,
        out,
        preprocess=backbone.preprocess,
        accelerator=accelerator,
        evaluators=evaluators,
        card=card,
        base=base,
        say=say,
    )
    if "knn" in evaluators and accelerator.is_main_process and (out / "export" / "config.json").exists():
        _final_record(evaluators["knn"], out, recipe)
    return out


def _final_record(online: OnlineKnn, out: Path, recipe: Recipe) -> None:
    """The last k-NN of a run, on what it exported, as a record in its folder."""
    file, export = out / "records.jsonl", out / "export"
    file.unlink(missing_ok=True)
    facts: dict[str, Any] = {
        "model": recipe.name,
        "baseline": "pretrained",
        "weights_sha256": file_sha256(export / "model.safetensors"),
    }
    for embed_source, more in backbone_jobs(load(str(export)), **facts):
        measure(embed_source, online.bank, [online.queries], ["knn/v1"], seed=recipe.run.seed, out=file, **more)


def starting_backbone(recipe: Recipe) -> Backbone:
    """The recipe's architecture with fresh weights, or those of the checkpoint it starts from.

    Without an architecture of its own a recipe takes the checkpoint's; its `model_args` change arguments of that one then.

    Raises:
        ValueError: the architecture does not take an argument, or the weights do not fit.
    """
    if not recipe.start:
        return create_model(recipe.model, **recipe.model_args)
    found = load(recipe.start)
    if not recipe.model and not recipe.model_args:
        return found.requires_grad_(True)
    own = {} if recipe.model else found.arguments
    try:
        backbone = create_model(recipe.model or found.architecture, **{**own, **recipe.model_args})
    except ArgumentError as error:
        if recipe.model:
            raise
        raise ValueError(
            f"recipe {recipe.name} sets {', '.join(recipe.model_args)} of {recipe.start}, but {error}; "
            "extract a subnet first (okavango zoo extract), or use a recipe without model_args"
        ) from error
    load_weights(backbone, found.state_dict())
    backbone.preprocess = found.preprocess
    return backbone


class OnlineKnn:
    """k-NN accuracy during a run: every fifth of at most `limit` labelled training samples asks the others."""

    def __init__(self, source: Source, seed: int, limit: int = 2500):
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(source))[:limit]
        self.queries, self.bank = Part(source, order[::5]), Part(source, np.delete(order, np.s_[::5]))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        backbone = model if isinstance(model, Backbone) else cast(Backbone, model.backbone)
        bank, queries = (extract_features(backbone, part) for part in (self.bank, self.queries))
        return {"accuracy": evaluate_features(bank, queries, "knn/v1").value}


class OnlinePlaces:
    """Recall during a run, on places that are not trained with; with local descriptors also after re-ranking."""

    def __init__(self, places: Places, top: int):
        self.places, self.top = places, top

    def __call__(self, model: nn.Module) -> dict[str, float]:
        backbone = cast(Backbone, model)
        local = bool(self.top) and getattr(backbone, "local", None) is not None
        plan = Plan(rerank="mutual-nn" if local else "", top=self.top, keep=5, batch=16)
        database, queries = self.places.parts
        with tempfile.TemporaryDirectory() as folder:
            describer = BackboneDescriber(backbone, local=local)
            reranker = mutual_nn if local else None
            ranking = rank(describer, database, queries, Radius(), plan, folder, reranker=reranker, say=lambda line: None)[0]
        recall = ranking.results()["recall"]
        return {name: recall[name] for name in ("R@5", "R@1") if name in recall}


def validation(recipe: Recipe, data: str | Source | None) -> dict[str, OnlinePlaces]:
    """Where a run of place recognition finds its places for evaluations.

    Raises:
        ValueError: nowhere.
    """
    given, top = getattr(recipe, "val", ""), getattr(recipe, "val_top", 0)
    found = find_places(given) if given else find_places(data, "val") if isinstance(data, str) else None
    if given.startswith("samples/"):
        return {"val": OnlinePlaces(cast(Places, open_source(given)), top)}
    if found is None:
        where = f" in {given}" if given else ""
        raise ValueError(f"--eval-every: no places to measure{where}; give --val FOLDER with database/ and queries/ in it")
    return {"val": OnlinePlaces(Places(found), top)}


def frozen_base(model: Backbone, start: str, out: Path, *, main: bool = True) -> dict[str, Any]:
    """`base` and `parent` of `save_checkpoint` for an adapted backbone: where its frozen network lies.

    That is the checkpoint that a run starts from; its own base, where it holds only what was trained before; or, where there is no
    such checkpoint, or it was changed (another input size), one that is written to ``base/`` in the run folder.

    Raises:
        ValueError: the backbone is not an adapted one.
    """
    if not isinstance(model, Adapted):
        raise ValueError(f"--objective.adapters-only: {model.architecture} is not adapted, there is no frozen network to leave out")
    if start:
        folder = resolve_checkpoint(start)
        own = base_of(folder)
        name = read_config(folder)["parent"]["name"] if own is not None else start
        base = own or folder
        if base_problem(model, base) is None:
            return {"base": base, "parent": None if Path(name).exists() or Path(folder, name).exists() else {"name": name}}
    if main and not (out / "base" / "config.json").exists():
        save_checkpoint(model.backbone, out / "base", card={"title": f"{model.backbone.architecture}, frozen"})
    return {"base": out / "base", "parent": None}


# -- data in two parts ------------------------------------------------------------------------------------------------------


def training_part(data: str | Source) -> Source:
    """The source itself, or its `train` folder where there is one; pictures of places where it holds a database and queries."""
    if isinstance(data, str) and (places := find_places(data, "train")):
        return Places(places)
    if isinstance(data, str) and Path(data).is_dir() and (Path(data) / "train").is_dir():
        return open_source(str(Path(data) / "train"))
    return open_source(data)


def train_and_test(data: str | Source, train: str | Source | None = None) -> tuple[Source, Source]:
    """Training and test part: two sources given, or a folder with `train` and `test` (or `val`), or a shipped sample.

    Raises:
        ValueError: only one part can be found.
    """
    if train is not None:
        return open_source(train), open_source(data)
    if isinstance(data, str):
        if data == "samples/fashion" or data.startswith("samples/fashion:"):
            return open_source("samples/fashion:train"), open_source("samples/fashion:test" if data == "samples/fashion" else data)
        for name in ("test", "val", "valid", "validation"):
            if (Path(data) / name).is_dir() and (Path(data) / "train").is_dir():
                return open_source(Path(data) / "train"), open_source(Path(data) / name)
        if not Path(data).exists() and "*" not in data and ":" not in data:
            raise ValueError(f"{data}: no such file or folder")
    raise ValueError(f"{data}: needs a training and a test part: a folder with train/ and test/ in it, or give --train as well")


# -- measuring --------------------------------------------------------------------------------------------------------------


def evaluate(
    checkpoint: str | Backbone | Opened,
    *,
    data: str | Source,
    protocol: str | Sequence[str] = "knn",
    train: str | Source | None = None,
    subnets: Sequence[str] | str = (),
    out: str | os.PathLike | None = None,
    seed: int = 0,
    batch: int = 256,
    workers: int = 0,
    say: Say = print,
) -> list[Record]:
    """Measure a frozen backbone on labelled pictures.

    Args:
        checkpoint: anything `ok.load` takes, a backbone, or "raw-pixels" for the baseline that knows nothing.
        data: the test part, or both parts; see `train_and_test`. train: the training part.
        protocol: "knn", "logistic", "linear", "linear-sweep" ..., or several; see `okavango.downstream.classification.protocols`.
        subnets: names such as "w64_d2", or "all", of an elastic backbone; none means the model as it is.
        out: file of records to append to.
        seed: of held-out parts and intervals.
        batch: pictures per forward pass; workers: processes that read them, 0 for none but this one.
    Returns:
        One record per subnet and protocol.
    """
    protocols = [resolve(name) for name in ([protocol] if isinstance(protocol, str) else protocol)]
    train_source, test_source = train_and_test(data, train)
    if train_source.labels is None or test_source.labels is None:
        raise ValueError("evaluation needs labels: pictures in one sub-folder per class, or shards with .cls members")
    if tuple(train_source.classes) != tuple(test_source.classes):
        raise ValueError(
            f"the training part has {len(train_source.classes)} classes and the test part {len(test_source.classes)}; "
            "they must be the same"
        )
    if out is not None and Path(out).exists():
        read_records(out)  # refuses a file that holds something else, before anything is measured
    if (subnets or set(protocols) & set(SWEEPS)) and not workers:  # several passes
        train_source, test_source = cached(train_source), cached(test_source)
    passes: dict[str, Any] = {"batch": batch, "workers": workers, "say": say}
    jobs: Iterable[tuple[Embed, dict[str, Any]]]
    if checkpoint == "raw-pixels":
        if isinstance(test_source[0]["image"], Bands):
            raise ValueError(f"raw-pixels measures pictures, and {test_source.name} holds rasters of bands")
        jobs = [raw_pixels_job(tuple(test_source[0]["image"].shape[-2:]))]
    else:
        model, name, sha256 = open_model(cast("str | Backbone | Opened", checkpoint))
        jobs = backbone_jobs(model, subnets, **passes, model=name, weights_sha256=sha256)
    records: list[Record] = []
    for embed_source, facts in jobs:
        for record in measure(embed_source, train_source, [test_source], protocols, seed=seed, out=out, **facts):
            interval = f"[{record.interval[0]:.4f}, {record.interval[1]:.4f}]" if record.interval else ""
            say(f"{record.model} {record.subnet} {record.protocol}: {record.value:.4f} {interval}, n {record.n}")
            records.append(record)
    return records


def raw_pixels_job(size: tuple[int, int], channels: int = 3) -> tuple[Embed, dict[str, Any]]:
    """The baseline that knows nothing, for `measure`."""
    return lambda source: raw_pixels(source, size, channels), {"model": "raw-pixels", "baseline": "raw pixels"}


def backbone_jobs(
    model: Backbone,
    /,
    subnets: Sequence[str] | str = (),
    *,
    batch: int = 256,
    workers: int = 0,
    say: Say = print,
    **facts: Any,
) -> Iterator[tuple[Embed, dict[str, Any]]]:
    """How to embed a source with a backbone, or with each of its subnets, and the other arguments of `measure`.

    Args:
        subnets: see `chosen_subnets`.
        batch: pictures per forward pass; workers: processes that read them; say: receives lines of progress of sweeps.
        **facts: fields of the records: model, baseline, weights_sha256 ...
    """
    for subnet in chosen_subnets(model, subnets):
        sized = model
        if subnet is not None:
            assert isinstance(model, Elastic)  # `chosen_subnets` refuses others
            sized = model.extract(subnet)
        own = {"parameters": sum(p.numel() for p in sized.parameters()), "latency_ms": latency(sized)}
        sweep = partial(fit_sweep, sized, batch=batch, workers=workers, say=say)
        embed_source = partial(extract_features, sized, batch=batch, workers=workers)
        yield embed_source, {"subnet": str(subnet or ""), "sweep": sweep, **own, **facts}


def _no_sweep(train: Source, protocol: str, seed: int) -> FittedSweep:
    raise ValueError(f"protocol {protocol}: needs a backbone; bare pixels can be measured by knn, logistic and linear")


def measure(
    embed: Embed,
    train: Source,
    tests: Sequence[Source],
    protocols: Sequence[str],
    *,
    seed: int,
    out: str | os.PathLike | None = None,
    sweep: Sweep = _no_sweep,
    **facts: Any,
) -> list[Record]:
    """Embed the training set once, fit each protocol once, measure on every test set.

    Args:
        embed: source -> vectors.
        out: file of records to append to.
        sweep: (training set, protocol, seed) -> fitted, for protocols that take pictures; the default refuses them.
        **facts: fields of the records.
    """
    records = []
    for record, _ in outcomes(embed, train, tests, protocols, seed=seed, sweep=sweep, **facts):
        records.append(record)
        if out is not None:
            write_record(out, record)
    return records


def outcomes(
    embed: Embed,
    train: Source,
    tests: Sequence[Source],
    protocols: Sequence[str],
    *,
    seed: int,
    sweep: Sweep = _no_sweep,
    **facts: Any,
) -> Iterator[tuple[Record, Outcome]]:
    """As `measure`, each record together with what became of every test picture."""
    protocols = [resolve(protocol) for protocol in protocols]
    sweeps = [sweep(train, protocol, seed) for protocol in protocols if protocol in SWEEPS]
    bank = embed(train) if len(sweeps) < len(protocols) else None
    fitted = [] if bank is None else [fit(bank, protocol, seed) for protocol in protocols if protocol not in SWEEPS]
    for test in tests:
        where = {
            "dataset": test.name,
            "train_manifest_sha256": train.digest,
            "test_manifest_sha256": test.digest,
        }
        found = {each.protocol: each.score(test) for each in sweeps}
        if fitted:
            queries = embed(test)
            found |= {each.protocol: each.score(queries) for each in fitted}
        for protocol in protocols:
            yield outcome_record(protocol, found[protocol], seed=seed, **where, **facts), found[protocol]


class Opened(NamedTuple):
    """A model, and what records and files say of it."""

    model: Any
    name: str  # as the user called it, or its architecture
    sha256: str = ""  # of its file of weights; "" where a library or the caller brought them


def open_model(checkpoint: str | os.PathLike | Backbone | Opened) -> Opened:
    """A backbone; in eval mode, unless the caller brought it.

    Args:
        checkpoint: what `ok.load` takes, or ``timm/NAME`` and the like with that library's pretrained weights; or the model itself.
    """
    if isinstance(checkpoint, Opened):
        return checkpoint
    if isinstance(checkpoint, Backbone):
        return Opened(checkpoint, checkpoint.architecture)
    checkpoint = os.fspath(checkpoint)
    if checkpoint.partition("/")[0] in ("timm", "torchvision", "open_clip") and not Path(checkpoint).exists():
        return Opened(create_model(checkpoint, pretrained=True).eval(), checkpoint)
    return Opened(load(checkpoint), checkpoint, file_sha256(resolve_checkpoint(checkpoint) / "model.safetensors"))


def open_head(checkpoint: str | os.PathLike | nn.Module | Opened) -> Opened:
    """What was fine-tuned, with its head; a checkpoint without one gives its backbone.

    Args:
        checkpoint: what `ok.load` takes, the run folder that holds its export, or the model itself.
    """
    if isinstance(checkpoint, Opened):
        return checkpoint
    if isinstance(checkpoint, nn.Module):
        return Opened(checkpoint, cast(Backbone, getattr(checkpoint, "backbone", checkpoint)).architecture)
    checkpoint = os.fspath(checkpoint)
    run = Path(checkpoint) / "export"
    where = str(run) if (run / "config.json").is_file() else checkpoint
    return Opened(load(where, heads=heads()), checkpoint, file_sha256(resolve_checkpoint(where) / "model.safetensors"))


def run_leaderboard(
    checkpoints: Sequence[str],
    *,
    data: str | Source,
    train: str | Source | None = None,
    protocols: Sequence[str] = ("knn", "logistic"),
    out: str | os.PathLike,
    seed: int = 0,
    say: Say = print,
) -> list[Record]:
    """Measure several checkpoints; rows that the file of records has already (same weights, subnet, data, protocol, seed) are kept.

    Args:
        checkpoints: as for `evaluate`; ``NAME@w64_d2`` or ``NAME@all`` takes subnets.
    Returns:
        The new records.
    """
    known = {_row(record) for record in read_records(out)} if Path(out).exists() else set()
    test_source = train_and_test(data, train)[1]
    new: list[Record] = []
    for checkpoint in checkpoints:
        name, subnets = named_subnets(checkpoint)
        wanted: list[Subnet | None] = [None]
        model: str | Opened = name  # a baseline stays a name
        sha256 = ""
        if name != "raw-pixels":
            model = open_model(name)
            sha256, wanted = model.sha256, chosen_subnets(model.model, subnets)
        for subnet in wanted:
            left = [p for p in map(resolve, protocols) if (sha256, str(subnet or ""), test_source.digest, p, seed) not in known]
            if left:
                names = [str(subnet)] if subnet else []
                new += evaluate(model, data=data, protocol=left, train=train, subnets=names, out=out, seed=seed, say=say)
            else:
                say(f"{name} {subnet or ''}: measured already")
    return new


def _row(record: Record) -> tuple:
    return (record.weights_sha256, record.subnet, record.test_manifest_sha256, record.protocol, record.seed)


def outcome_record(protocol: str, outcome: Outcome, *, seed: int, **facts: Any) -> Record:
    """A measurement as a record, with its bootstrap interval and where it was made."""
    versions, hardware = environment()
    return Record(
        protocol=protocol,
        metric=outcome.metric,
        value=outcome.value,
        interval=outcome.interval or bootstrap(outcome.correct, seed),
        n=len(outcome.correct),
        seed=seed,
        settings=outcome.settings,
        versions=versions,
        hardware=hardware,
        command=command_line(),
        created=now(),
        **facts,
    )


def named_subnets(checkpoint: str) -> tuple[str, list[str]]:
    """A checkpoint and the subnets that are named after it: ``NAME@all``, ``NAME@w64_d2,w128_d6``.

    Example:
        >>> named_subnets("runs/a/export@w64_d2"), named_subnets("hf://org/name@main")
        (('runs/a/export', ['w64_d2']), ('hf://org/name@main', []))
    """
    match = re.fullmatch(r"(.+)@(all|w\d+_d[\d-]+(?:,w\d+_d[\d-]+)*)", checkpoint)
    return (match[1], match[2].split(",")) if match else (checkpoint, [])  # "@" may also stand before a revision


def chosen_subnets(model: Backbone, wanted: Sequence[str] | str) -> list[Subnet | None]:
    """Subnets by name, "all", or [None] for the model as it is.

    Raises:
        ValueError: the model is not elastic, or has no such subnet.
    """
    if not wanted:
        return [None]
    if not isinstance(model, Elastic):
        raise ValueError(f"{model.architecture} is not elastic: it has no subnets to choose from")
    if wanted in ("all", ["all"], ("all",)):
        return list(model.list_subnets())
    return [model.check_subnet(Subnet.parse(name)) for name in ([wanted] if isinstance(wanted, str) else wanted)]


def embed(
    checkpoint: str | Backbone | Opened,
    data: str | Source,
    out: str | os.PathLike,
    *,
    subnet: str = "",
    batch: int = 64,
    workers: int = 0,
    cut: Cut | None = None,
    components: int = 0,
    half: bool = False,
    allow: Mapping[str, str] | None = None,
    say: Say = print,
) -> Path:
    """Embed a collection of pictures into a Parquet file, or the tiles of one scene into a GeoTIFF.

    A Parquet file gets one row per picture, ``id``, ``label`` (null where unknown) and ``embedding`` (float32 list); its metadata
    name the model and the source. A GeoTIFF gets one pixel per tile, see `okavango.scenes.embed_scene`. Either appears only when it
    is complete.

    Args:
        data: pictures, see `open_source`; or a scene, see `okavango.data.geotiff.Scene`.
        out: a name that ends in .parquet or .tif, which decides.
        cut, components, half, allow: of scenes only.
    """
    out = Path(out)
    if out.suffix in SCENE:
        model = open_model(checkpoint).model
        (chosen,) = chosen_subnets(model, [subnet] if subnet else [])
        options: dict[str, Any] = {"cut": cut or Cut(), "components": components, "half": half, "allow": allow}
        return embed_scene(model, cast(str, data), out, subnet=chosen, batch=batch, say=say, **options)
    check_table(out)
    if cut or components or half or allow:
        raise ValueError(f"--out {out}: tiles and what goes with them are for one scene, whose --out ends in .tif")
    source = open_source(data)
    model, name, _ = open_model(checkpoint)
    (chosen,) = chosen_subnets(model, [subnet] if subnet else [])
    embedded = extract_features(model, source, subnet=chosen, batch=batch, workers=workers)
    return write_table(out, embedded, {"model": name, "subnet": subnet, "source_sha256": source.digest}, say)


def check_table(out: Path) -> None:
    """Refuse, before anything is computed, what cannot become a table of embeddings.

    Raises:
        ValueError: another ending, or no such folder.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: expected a name that ends in .parquet, or in .tif for one scene")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")


def write_table(out: Path, embedded: Embedded, about: Mapping[str, str], say: Say) -> Path:
    """Vectors as a Parquet file with `about` in its metadata; says what was left out."""
    import pyarrow as pa
    from pyarrow import parquet

    for _, reason in embedded.bad:
        say(f"left out {reason}")
    labels = None if embedded.labels is None else [int(label) for label in embedded.labels]
    table = pa.table(
        {
            "id": pa.array(embedded.ids, pa.string()),
            "label": pa.array(labels if labels is not None else [None] * len(embedded), pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embedded.features.reshape(-1)), embedded.features.shape[1]),
        }
    ).replace_schema_metadata(dict(about))
    write_whole(out, lambda file: parquet.write_table(table, file))
    say(f"{len(embedded)} embeddings of {embedded.features.shape[1]} numbers are in {out}")
    return out


def predict(
    checkpoint: str | Classifier | Opened,
    data: str | Source,
    out: str | os.PathLike | None = None,
    *,
    batch: int = 64,
    top: int = 1,
    cut: Cut | None = None,
    allow: Mapping[str, str] | None = None,
    say: Say = print,
) -> list[tuple[str, list]]:
    """Classes of pictures by a fine-tuned checkpoint: (id, [(class, probability), ...] best first).

    Args:
        checkpoint: see `open_head`.
        data: pictures, see `open_source`; with `out`, one scene, see `okavango.data.geotiff.Scene`.
        out: a name that ends in .tif: the map of the classes of all tiles, see `okavango.scenes.classify_scene`; nothing is
            returned then.
        batch: pictures per forward pass. top: classes per picture.
        cut, allow: of scenes only.
    Raises:
        ValueError: the checkpoint holds no classifier.
    """
    model, name, _ = open_head(checkpoint)
    if not isinstance(model, Classifier):
        raise ValueError(f"{name} holds no classifier; fine-tune one with `okavango finetune`")
    if out is not None:
        classify_scene(model, cast(str, data), out, cut=cut or Cut(), batch=batch, allow=allow, say=say)
        return []
    if cut or allow:
        raise ValueError("tiles and what goes with them are for one scene; name the map by --out FILE.tif")
    source, results = open_source(data), []
    for start in range(0, len(source), batch):
        samples = [source[i] for i in range(start, min(start + batch, len(source)))]
        images: Any = [sample["image"] for sample in samples]
        probabilities = model.predict(model.preprocess(**{model.modality: images}))
        values, classes = probabilities.topk(min(top, probabilities.shape[1]))
        for sample, row, picks in zip(samples, values.tolist(), classes.tolist(), strict=True):
            best = [(model.classes[k], p) for k, p in zip(picks, row, strict=True)]
            say(f"{sample['id']}\t" + "\t".join(f"{name} {p:.3f}" for name, p in best))
            results.append((sample["id"], best))
    return results


def heads() -> dict[str, Callable[[Backbone, dict], nn.Module]]:
    """Heads that a checkpoint may name, our own and those of other packages (entry points ``okavango.heads``)."""
    known = [
        Classifier,
        Segmenter,
        StudyClassifier,
        SurvivalHead,
        *(point.load() for point in entry_points(group="okavango.heads")),
    ]
    return {head.entry: partial(_build_head, head) for head in known}


def _build_head(head: Callable[..., nn.Module], backbone: Backbone, arguments: dict) -> nn.Module:
    return head(backbone, **arguments)


def command_line() -> str:
    """The command that is running, as it would be typed."""
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    if program.name == "__main__.py":
        return shlex.join(["okavango", *sys.argv[1:]])
    if program.suffix == ".py" and not program.is_absolute():
        return shlex.join(["python", str(program), *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])
