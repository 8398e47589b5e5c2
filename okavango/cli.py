"""The command line. Exit status 0, 1 (failed, one clear line) or 2 (usage). Nothing heavy is imported before a command runs."""

from __future__ import annotations

import difflib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional


def quickstart(out: Path = Path("quickstart"), steps: int = 0, seed: int = 0) -> None:
    """Pretrain a small elastic network on real pictures, cut models out of it, measure them, write a page.

    Args:
        out: folder for run, records and page.
        steps: optimiser steps, 0 for what fits into a few minutes on two cores.
        seed: everything random follows from it.
    """
    at_least(0, steps=steps, seed=seed)
    from okavango.recipes.quickstart import quickstart

    quickstart(out, steps=steps, seed=seed, say=say)


@dataclass(frozen=True)
class Retrieval:
    """Options of `evaluate` for retrieval protocols."""

    database: str | None = None
    """folder of pictures that are searched, where `data` does not hold it"""
    queries: str | None = None
    """folder of pictures that are looked for"""
    card: str = ""
    """dataset card, such as pitts30k-test: checks the numbers of pictures, sets protocol and name"""
    pairs: Path | None = None
    """JSON of {query: [database pictures]} for retrieval/pairs"""
    rerank: str = ""
    """mutual-nn, similarity or ransac"""
    top: int = 100
    """candidates that are re-ranked"""
    factory: str = "Flat"
    """FAISS factory string of the index; Flat is exact and needs no faiss"""
    search: str = ""
    """how a FAISS index searches, such as nprobe=16"""
    storage: Literal["float32", "float16", "int8"] = "float32"
    """numbers of the index"""
    pca: int = 0
    """keep so many numbers of a descriptor, by PCA on the database"""
    whiten: int = 0
    """the same, with whitening"""
    report: Path | None = None
    """folder for a page with pictures, the predictions, and descriptors for the next run"""


@dataclass(frozen=True)
class Studies:
    """Options of `evaluate` for studies of scans."""

    modalities: tuple[str, ...] = ()
    """subsets of sequences such as t1,flair t1; all that there are when not given, fifteen of four sequences"""
    overlap: float = 0.5
    """share of a window's side that neighbours share"""


def evaluate(
    checkpoint: Positional[str],
    data: str | None = None,
    protocol: tuple[str, ...] = ("knn",),
    train: str | None = None,
    subnets: tuple[str, ...] = (),
    out: Path | None = None,
    seed: int = 0,
    batch: int | None = None,
    workers: int = 0,
    retrieval: Annotated[Retrieval, tyro.conf.arg(name="")] = Retrieval(),  # noqa: B008
    studies: Annotated[Studies, tyro.conf.arg(name="")] = Studies(),  # noqa: B008
) -> None:
    """Measure a frozen backbone on labelled pictures or on pictures of places, or a fine-tuned one on studies of scans.

    Args:
        checkpoint: name in the zoo, folder, file, URL or hf://ORG/NAME; raw-pixels, or thumbnail and chance for retrieval, are
            baselines that know nothing.
        data: folder with train/ and test/ in it, or the test part; samples/fashion, samples/fashion:moved. For retrieval, a folder
            with database/ and queries/ in it; samples/places.
        protocol: knn, logistic, linear, linear-sweep ..., with or without a version such as knn/v1 (docs/evaluation.md has all);
            retrieval/utm25 and its kin, one at a time; segmentation/brats, segmentation/reference, studies/classification and
            studies/survival (docs/mri.md), one at a time.
        train: the training part, when it is not in `data`.
        subnets: w64_d2 ..., or all, of an elastic backbone.
        out: file of records (JSON lines) to append to.
        seed: of held-out parts and intervals.
        batch: samples per forward pass; when left out, 256 pictures, 32 of places, or one window of a scan.
        workers: processes that read pictures.
        retrieval: for retrieval protocols only, but for the report.
        studies: for protocols of studies only.
    """
    at_least(1, batch=batch, top=retrieval.top)
    at_least(0, workers=workers, pca=retrieval.pca, whiten=retrieval.whiten)
    from okavango import dispatch

    shared: dict[str, Any] = {"train": train, "subnets": subnets, "out": out, "seed": seed, "batch": batch, "workers": workers}
    options = {**changed(retrieval), **changed(studies)}
    with usage("evaluate"):
        dispatch.evaluate(checkpoint, data=data, protocol=protocol, say=say, **shared, **options)


@dataclass(frozen=True)
class Tiling:
    """Options of maps of one scene."""

    tile: int = 0
    """side of a tile in pixels of the scene, 0 for the checkpoint's input size"""
    overlap: int = 0
    """pixels that neighbouring tiles share"""
    measured: float = 0.5
    """least share of a tile that must be measured; others become nodata"""
    allow: tuple[str, ...] = ()
    """what would be refused and is not, as SWITCH=REASON: saturated, range, baseline ... (docs/remote_sensing.md)"""


def _whole(options: Tiling) -> dict[str, Any]:
    """The options as the verbs take them."""
    if options == Tiling():
        return {}
    from okavango.scenes import Cut

    at_least(0, tile=options.tile, overlap=options.overlap)
    reasons = dict(switch.partition("=")[::2] for switch in options.allow)
    return {"cut": Cut(tile=options.tile, overlap=options.overlap, measured=options.measured), "allow": reasons}


def embed(
    checkpoint: Positional[str],
    data: Positional[str],
    out: Path,
    subnet: str = "",
    batch: int | None = None,
    workers: int = 0,
    scene: Annotated[Tiling, tyro.conf.arg(name="")] = Tiling(),  # noqa: B008
    components: int = 0,
    half: bool = False,
    modalities: str = "",
) -> None:
    """Write one embedding per picture or study to a Parquet file, or one per tile of a scene to a GeoTIFF.

    Args:
        checkpoint: see `evaluate`.
        data: folder of pictures, tar shards, samples/fashion; a folder or table of NIfTI studies; or a scene, a GeoTIFF or a folder
            of its bands.
        out: file that ends in .parquet, or in .tif for a scene. A map that was interrupted goes on by the same command.
        subnet: w64_d2 ... of an elastic backbone.
        batch: samples per forward pass; when left out, 64 pictures or tiles, or one study.
        workers: processes that read pictures or studies.
        scene: for maps only.
        components: of maps, keep so many principal components; 0 keeps all numbers.
        half: of maps, store 16 bits a number.
        modalities: of studies, sequences that may be used, such as t1,flair; all that there are when not given.
    """
    at_least(1, batch=batch)
    at_least(0, workers=workers, components=components)
    from okavango import dispatch

    options: dict[str, Any] = {"components": components, "half": half, "modalities": modalities, **_whole(scene)}
    with usage("embed"):
        dispatch.embed(checkpoint, data, out, subnet=subnet, batch=batch, workers=workers, say=say, **options)


@dataclass(frozen=True)
class Scans:
    """Options of `predict` for studies of scans."""

    synthesize: str = ""
    """sequence that is made of the others, such as flair, by a checkpoint of pretraining"""
    modalities: str = ""
    """sequences that may be used, such as t1,flair; all that there are when not given"""
    codes: Literal["brats", "brats2023", "brats2024"] = "brats"
    """convention of the label numbers that are written"""
    pictures: bool = False
    """also draw three planes of each segmentation"""


def predict(
    checkpoint: Positional[str],
    data: Positional[str],
    out: Path | None = None,
    top: int = 1,
    batch: int | None = None,
    scene: Annotated[Tiling, tyro.conf.arg(name="")] = Tiling(),  # noqa: B008
    scans: Annotated[Scans, tyro.conf.arg(name="")] = Scans(),  # noqa: B008
) -> None:
    """Classify pictures or the tiles of a scene with a fine-tuned checkpoint; segment or classify studies of scans, or make a
    sequence of the others.

    Args:
        checkpoint: folder that `okavango finetune` exported; to synthesise, export-full of a pretraining run.
        data: folder of pictures; a scene, which is a GeoTIFF or a folder of its bands; a folder of NIfTI studies.
        out: of a scene, the map to write, a file that ends in .tif; of studies, the folder of segmentations or synthesised volumes.
        top: classes per picture.
        batch: samples per forward pass; when left out, 64 pictures or tiles, or one window of a scan.
        scene: for maps only.
        scans: for studies only.
    """
    at_least(1, top=top, batch=batch)
    if scans.synthesize:
        if out is None:
            raise Usage("predict: --synthesize writes volumes, give --out FOLDER")
        from okavango import volume_verbs

        volume_verbs.synthesize(checkpoint, data, scans.synthesize, out, say=say)
        return
    from okavango import dispatch

    options = {**changed(scans), **_whole(scene), **({"top": top} if top > 1 else {})}
    with usage("predict"):
        dispatch.predict(checkpoint, data, out, batch=batch, say=say, **options)


def explain(
    checkpoint: Positional[str], data: Positional[str], out: Path, subnet: str = "", layer: int = -1, count: int = 8
) -> None:
    """Draw attention maps and patch features of some pictures.

    Args:
        checkpoint: see `evaluate`.
        data: folder of pictures, tar shards, samples/fashion.
        out: file that ends in .png.
        subnet: w64_d2 ... of an elastic backbone.
        layer: block whose attention is drawn; negative ones count from the end.
        count: how many pictures.
    """
    if out.suffix != ".png":
        raise ValueError(f"--out {out}: expected a name that ends in .png")
    at_least(1, count=count)
    from okavango import explain as pictures
    from okavango import verbs
    from okavango.data.sources import open_source

    model, source = verbs.open_model(checkpoint)[0], open_source(data)
    (chosen,) = verbs.chosen_subnets(model, [subnet] if subnet else [])
    images = [source[i]["image"] for i in range(0, len(source), max(1, len(source) // count))][:count]
    batch = pictures.as_batch(model, images)
    heads = pictures.attention(model, batch, layer=layer, subnet=chosen, class_maps=True)
    columns = {"picture": pictures.pictures(model, batch), "patch features": pictures.pca(model, batch, subnet=chosen)}
    columns |= {f"attention, head {head}": heads[:, head] for head in range(heads.shape[1])}
    pictures.save_grid(out, columns)
    say(f"{len(images)} pictures are in {out}")


def index_build(
    checkpoint: Positional[str],
    data: Positional[str],
    out: Path,
    factory: str = "Flat",
    search: str = "",
    storage: Literal["float32", "float16", "int8"] = "float32",
    pca: int = 0,
    whiten: int = 0,
    subnet: str = "",
    batch: int = 32,
    workers: int = 0,
) -> None:
    """Write an index of pictures, to be searched with others.

    Args:
        checkpoint: see `evaluate`.
        data: folder of pictures, tar shards, samples/fashion.
        out: folder of the index.
        factory: FAISS factory string, such as IVF1024,Flat or HNSW32; Flat is exact and needs no faiss.
        search: how a FAISS index searches, such as nprobe=16.
        storage: of the descriptors.
        pca: keep so many numbers of a descriptor, by PCA.
        whiten: the same, with whitening.
        subnet: w64_d2 ... of an elastic backbone.
        batch: pictures per forward pass.
        workers: processes that read pictures.
    """
    at_least(1, batch=batch)
    at_least(0, workers=workers, pca=pca, whiten=whiten)
    from okavango import retrieval_verbs

    options: dict[str, Any] = {"factory": factory, "search": search, "storage": storage, "pca": pca, "whiten": whiten}
    retrieval_verbs.build(checkpoint, data, out, subnet=subnet, batch=batch, workers=workers, say=say, **options)


def index_add(index: Positional[Path], data: Positional[str], checkpoint: str = "", batch: int = 32, workers: int = 0) -> None:
    """Add pictures to an index.

    Args:
        index: folder of the index.
        data: folder of pictures, tar shards, samples/fashion.
        checkpoint: where the index's model lies now, when it has moved.
        batch: pictures per forward pass.
        workers: processes that read pictures.
    """
    at_least(1, batch=batch)
    at_least(0, workers=workers)
    from okavango import retrieval_verbs

    retrieval_verbs.add(index, data, checkpoint=checkpoint, batch=batch, workers=workers, say=say)


def index_search(
    index: Positional[Path],
    data: Positional[str],
    top: int = 5,
    checkpoint: str = "",
    recall: bool = False,
    batch: int = 32,
    workers: int = 0,
) -> None:
    """Find the nearest pictures of an index for each of some pictures.

    Args:
        index: folder of the index.
        data: folder of pictures, tar shards, samples/fashion.
        top: how many are listed, with their distances.
        checkpoint: where the index's model lies now, when it has moved.
        recall: also search exactly, and say how many of the truly nearest the index finds.
        batch: pictures per forward pass.
        workers: processes that read pictures.
    """
    at_least(1, top=top, batch=batch)
    at_least(0, workers=workers)
    from okavango import retrieval_verbs

    retrieval_verbs.search(index, data, top=top, checkpoint=checkpoint, recall=recall, batch=batch, workers=workers, say=say)


def preprocess_check(
    checkpoint: str,
    data: str,
    out: Path | None = None,
    suggestion: Path | None = None,
    reference: Path | None = None,
    samples: int = 512,
    seed: int = 0,
) -> None:
    """Look at data under a checkpoint's contract: what would be done, what looks wrong, and what a change is worth.

    Nothing is changed. The exit status is 1 when something is wrong.

    Args:
        checkpoint: see `evaluate`; or a contract alone, such as ssl4eo_s12_s2 (docs/remote_sensing.md).
        data: folder of pictures or rasters, tar shards, samples/fashion; with a folder per class, accuracies are measured too.
        out: folder for a page with histograms and pictures, and a report in JSON.
        suggestion: JSON file to write, the contract with what is suggested.
        reference: file of `preprocess statistics`: how the pictures should be, such as those of the training set.
        samples: how many are looked at, evenly over the classes.
        seed: of the intervals.
    """
    at_least(1, samples=samples)
    from okavango.doctor import check

    options: dict[str, Any] = {"out": out, "suggestion": suggestion, "reference": reference}
    report = check.preprocess_check(checkpoint, data, samples=samples, seed=seed, say=say, **options)
    if report.wrong:
        raise ValueError(f"{data}: {len(report.wrong)} wrong ({', '.join(each.check for each in report.wrong)}), see above")


def preprocess_statistics(
    data: Positional[str], out: Path | None = None, split: Literal["", "train", "val", "test"] = "", samples: int = 0
) -> None:
    """Mean, deviation and percentiles of each channel as stored, with where they come from.

    Args:
        data: folder of pictures or rasters, tar shards, samples/fashion; of a folder with train/ in it, that part.
        out: JSON file to write.
        split: which part of a data set this is; by default its name tells.
        samples: at most so many, evenly chosen, 0 for all.
    """
    at_least(0, samples=samples)
    from okavango.doctor import check

    check.preprocess_statistics(data, out, split=split, samples=samples, say=say)


def zoo_list(pattern: Positional[str] = "*", licence: str | None = None, weights: bool | None = None) -> None:
    """List models: name, parameters, input, licence.

    Args:
        pattern: shell pattern such as elastic*, timm/vit*.
        licence: an SPDX name, or permissive.
        weights: only those with (or without) weights.
    """
    from okavango.zoo.catalogue import list_models

    found = list_models(pattern, licence=licence, weights=weights)
    if not found:
        raise ValueError(f"no model matches {pattern!r}; `okavango zoo list` shows all")
    for model in found:
        say(str(model) if "/" in model else f"{model:44} {model.parameters / 1e6:9.2f} M  {model.input:28} {model.licence or '-'}")


def zoo_show(name: Positional[str]) -> None:
    """Show a checkpoint's card.

    Args:
        name: see `evaluate`.
    """
    from okavango.zoo.checkpoint import read_config
    from okavango.zoo.hub import resolve

    folder = resolve(name)
    read_config(folder)
    say((folder / "README.md").read_text(encoding="utf-8"))


def zoo_pull(name: Positional[str]) -> None:
    """Fetch a checkpoint into the cache and say where it lies.

    Args:
        name: see `evaluate`.
    """
    from okavango.zoo.checkpoint import read_config
    from okavango.zoo.hub import resolve

    folder = resolve(name)
    read_config(folder)
    say(str(folder))


def zoo_extract(checkpoint: Positional[str], subnet: str, out: Path) -> None:
    """Cut a stand-alone model out of an elastic checkpoint.

    Args:
        checkpoint: see `evaluate`.
        subnet: w64_d2 ...
        out: folder to write.
    """
    from okavango.models.backbone import Elastic
    from okavango.models.features import Subnet
    from okavango.zoo.checkpoint import file_sha256, save_checkpoint
    from okavango.zoo.hub import load, resolve

    model = load(checkpoint)
    if not isinstance(model, Elastic):
        raise ValueError(f"{checkpoint} is not elastic: there is nothing to extract")
    if out.resolve() == resolve(checkpoint).resolve():
        raise ValueError(f"--out {out}: is the checkpoint itself; choose another folder")
    parent = {"name": checkpoint, "sha256": file_sha256(resolve(checkpoint) / "model.safetensors")}
    save_checkpoint(model.extract(Subnet.parse(subnet)), out, parent=parent, card={"subnet": subnet, "extracted from": checkpoint})
    say(f"{subnet} of {checkpoint} is in {out}")


def zoo_export(
    checkpoint: Positional[str], out: Path, subnet: str = "", format: Literal["file", "monai-bundle"] = "file", modalities: str = ""
) -> None:
    """Export to ONNX (.onnx) or a torch program (.pt2), with a free batch size; or a segmenter of studies to a MONAI bundle.

    Args:
        checkpoint: see `evaluate`.
        out: file that ends in .onnx or .pt2; of a bundle, a new folder.
        subnet: w64_d2 ... of an elastic backbone.
        format: what is written.
        modalities: of a bundle, its input channels in order, such as t1,flair; all that the segmenter has when not given.
    """
    if format == "monai-bundle":
        from okavango import volume_verbs

        volume_verbs.bundle(checkpoint, out, modalities=modalities, say=say)
        return
    if modalities:
        raise Usage("zoo export: --modalities goes with --format monai-bundle")
    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--out {out}: expected a name that ends in .onnx or .pt2")
    from okavango import verbs
    from okavango.zoo.export import export_onnx, export_program
    from okavango.zoo.hub import load

    model = load(checkpoint)
    (chosen,) = verbs.chosen_subnets(model, [subnet] if subnet else [])
    (export_onnx if out.suffix == ".onnx" else export_program)(model, out, subnet=chosen)
    say(f"{checkpoint} is in {out}")


def zoo_convert(
    weights: Positional[Path],
    out: Path,
    family: Literal["poa", "selavpr", "bm_mae", "torchvision", "monai_bundle"] = "poa",
    architecture: str = "",
    image_size: int = 224,
    patch_size: int = 16,
    head_dim: int = 64,
) -> None:
    """Turn a published checkpoint (of POA, SelaVPR, BM-MAE, torchvision, a MONAI bundle) into a zoo checkpoint.

    Args:
        weights: .safetensors or .pth file; a pickle is read with weights_only. Of a bundle, its folder.
        out: folder to write.
        family: the published code that wrote it.
        architecture: torchvision's name of the network, such as mobilenet_v2.
        image_size: side of the training image.
        patch_size: side of a patch of a ViT; the others' weights tell what they need.
        head_dim: channels per head of a ViT; the others' weights tell what they need.
    """
    from okavango.zoo.checkpoint import save_checkpoint

    if family == "selavpr":
        from okavango.zoo import selavpr

        adapted, report = selavpr.read_official(weights, image_size=image_size, head_dim=head_dim)
        save_checkpoint(adapted, out, card={"converted from": weights.name})
        say(f"{report}\nthe model is in {out}")
        return
    if family == "bm_mae":
        from okavango.pretrain.objectives.bm_mae import MaskedModalities
        from okavango.zoo import bm_mae

        whole: dict[str, Any] = {}
        network: Any
        if bm_mae.is_fine_tuned(weights):
            from okavango import volume_verbs

            network, report = bm_mae.read_head(weights, volume_verbs.published_head)
        else:
            network, report = bm_mae.read_official(weights, objective=MaskedModalities)
        if hasattr(network, "head_config"):
            kind = "objective" if isinstance(network, MaskedModalities) else "head"
            whole = {"kind": kind, "head": network.head_config(), "backbone_prefix": network.backbone_prefix}
        save_checkpoint(network, out, card={"licence": bm_mae.LICENCE, "converted from": weights.name}, **whole)
        say(f"{report}\nthe model is in {out}; its licence is CC BY-NC 4.0, not for commercial use")
        return
    if family == "monai_bundle":
        from okavango.zoo import monai_bundle

        bundled, filled = monai_bundle.read_bundle(weights)
        save_checkpoint(bundled, out, card={"converted from": weights.name})
        say(f"{filled}\nthe model is in {out}; the bundle's LICENSE says what its weights may be used for")
        return
    if family == "torchvision":
        from okavango.zoo import torchvision

        if not architecture:
            raise Usage("zoo convert: --family torchvision needs --architecture, such as mobilenet_v2")
        tower, left_out = torchvision.read_official(weights, architecture)
        save_checkpoint(tower, out, card={"converted from": weights.name})
        say(f"{left_out}\nthe model is in {out}")
        return
    from okavango.zoo.poa import read_official

    model, left = read_official(weights, image_size=image_size, patch_size=patch_size, head_dim=head_dim)
    save_checkpoint(model, out, card={"converted from": weights.name})
    say(f"{len(left)} tensors of the projection heads were left out; the backbone is in {out}")


def zoo_verify(checkpoint: Positional[str]) -> None:
    """Check a checkpoint: files, hashes, configuration, output on a known input.

    Args:
        checkpoint: see `evaluate`.
    """
    from okavango.zoo.checkpoint import verify_checkpoint
    from okavango.zoo.hub import base_of, resolve

    folder = resolve(checkpoint)
    if problems := verify_checkpoint(folder, base=base_of(folder)):
        raise ValueError("; ".join(problems))
    say(f"{checkpoint} is in order")


def zoo_push(folder: Positional[Path], repo: Positional[str], private: bool = False) -> None:
    """Upload a checkpoint to the Hugging Face hub, after verifying it.

    Args:
        folder: checkpoint.
        repo: ORG/NAME.
        private: make a new repository private.
    """
    from okavango.zoo.hub import push

    push(folder, repo, private=private)
    say(f"{folder} is at {repo}")


def leaderboard_run(
    checkpoints: Positional[tuple[str, ...]],
    data: str,
    out: Path = Path("records.jsonl"),
    protocol: tuple[str, ...] = ("knn", "logistic"),
    train: str | None = None,
    seed: int = 0,
) -> None:
    """Measure several checkpoints under several protocols; what is in the file of records already is not measured again.

    Args:
        checkpoints: see `evaluate`; NAME@all or NAME@w64_d2 takes subnets.
        data: see `evaluate`.
        out: file of records (JSON lines).
        protocol: knn, logistic, linear, linear-sweep ...; docs/evaluation.md has all.
        train: the training part, when it is not in `data`.
        seed: of held-out parts and intervals.
    """
    if not checkpoints:
        raise Usage("leaderboard run: name at least one checkpoint")
    from okavango import verbs

    verbs.run_leaderboard(checkpoints, data=data, train=train, protocols=protocol, out=out, seed=seed, say=say)


def leaderboard_study(
    data: Positional[str],
    checkpoints: Positional[tuple[str, ...]] = (),
    out: Path = Path("study.jsonl"),
    imagenet: str = "torchvision/resnet50",
    train: str | None = None,
    labels: Path | None = None,
    sizes: tuple[int, ...] = (0, 224),
    normalisations: tuple[str, ...] = ("own", "divide", "standardise"),
    bands: tuple[str, ...] = ("rgb",),
    protocol: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    resize: Literal["antialiased", "aligned"] = "antialiased",
    allow: tuple[str, ...] = (),
    cache: Path | None = None,
    batch: int = 64,
) -> None:
    """Measure checkpoints, and what they have to beat, at several sizes and normalisations; go on where it was stopped.

    Args:
        data: see `evaluate`; pictures, or rasters of named bands.
        checkpoints: see `evaluate`.
        out: file of records (JSON lines).
        imagenet: the network trained on ImageNet that is always measured, with its untrained twin.
        train: the training part, when it is not in `data`.
        labels: JSON of {id: [labels]}, for several labels to one picture.
        sizes: pixels, 0 for the data's own size.
        normalisations: own, none, divide, minmax, imagenet, standardise, percentile (docs/remote_sensing.md).
        bands: of baselines, rgb and all.
        protocol: knn-5 and linear-c1 when left out; docs/evaluation.md has all.
        seeds: of what is drawn: filters, patches, initial weights.
        resize: antialiased, or aligned as Corley et al. did it.
        allow: of rasters, what would be refused and is not, as SWITCH=REASON.
        cache: folder of features; beside `out` when left out.
        batch: pictures per forward pass.
    """
    at_least(1, batch=batch)
    if not sizes or not normalisations or not seeds:
        raise Usage("leaderboard study: give at least one each of --sizes, --normalisations and --seeds")
    from okavango import study

    study.run_study(
        data,
        out=out,
        checkpoints=checkpoints,
        imagenet=imagenet,
        train=train,
        labels=labels,
        sizes=sizes,
        normalisations=normalisations,
        bands=bands,
        protocols=protocol,
        seeds=seeds,
        resize=resize,
        allow=dict(switch.partition("=")[::2] for switch in allow),
        cache=cache,
        batch=batch,
        say=say,
    )
    say(f"the records are in {out}; `okavango leaderboard render {out}` draws them")


def leaderboard_render(
    records: Positional[tuple[Path, ...]], out: Path = Path("leaderboard.html"), published: tuple[str, ...] = ()
) -> None:
    """Draw records as one HTML page that needs nothing else.

    Args:
        records: files of records (JSON lines).
        out: file to write.
        published: tables of publications to put beside them, such as corley2023, each under a protocol of its own.
    """
    if not records and not published:
        raise Usage("leaderboard render: name at least one file of records")
    from okavango.zoo.leaderboard.page import render, table
    from okavango.zoo.leaderboard.records import published_file, read_records

    found = read_records([*records, *map(published_file, published)])
    if not found:
        raise ValueError(f"no records in {', '.join(map(str, records))}")
    render(found, out)
    say(table(found))
    say(f"the page is {out}")


def leaderboard_compare(first: Positional[Path], second: Positional[Path], count: int = 1, seed: int = 0) -> None:
    """Say whether one retrieval method finds more than another on the same queries, beyond chance.

    Args:
        first: folder that `evaluate --report` wrote.
        second: another one, of the same protocol and pictures.
        count: of Recall@count.
        seed: of the paired bootstrap.
    """
    at_least(1, count=count)
    from okavango import retrieval_verbs

    retrieval_verbs.compare(first, second, count=count, seed=seed, say=say)


def cache_list(kind: str = "") -> None:
    """List what is kept on disk to be faster the next time: size, last use, kind, place.

    Args:
        kind: web, hf, features, studies or descriptors; all when left out.
    """
    from okavango import caches

    items = caches.find(kind)
    folders: dict[tuple[str, Path], list[caches.Item]] = {}
    for item in items:
        folders.setdefault((item.kind, item.folder), []).append(item)
    for (name, folder), some in folders.items():
        day = time.strftime("%Y-%m-%d", time.localtime(max(item.used for item in some)))
        say(f"{sum(item.bytes for item in some) / 1e6:12,.1f} MB  {day}  {name:11}  {folder}")
    say(f"{sum(item.bytes for item in items) / 1e6:12,.1f} MB in all; what is fetched lies in {caches.home()}")


def cache_clean(kind: str = "", older: float = 0.0, max_gb: float | None = None) -> None:
    """Remove what `cache list` shows; without options all of it. What a run is using stays.

    Args:
        kind: web, hf, features, studies or descriptors; all when left out.
        older: only what was not used for so many days.
        max_gb: the least recently used, until so many gigabytes are left.
    """
    from okavango import caches

    removed, left = caches.clean(kind, older=older, max_gb=max_gb, say=say)
    say(f"{removed / 1e6:,.1f} MB are removed, {left / 1e6:,.1f} MB are left")


COMMANDS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "quickstart": quickstart,
    "evaluate": evaluate,
    "embed": embed,
    "predict": predict,
    "explain": explain,
    "preprocess": {"check": preprocess_check, "statistics": preprocess_statistics},
    "index": {"build": index_build, "add": index_add, "search": index_search},
    "zoo": {
        "list": zoo_list,
        "show": zoo_show,
        "pull": zoo_pull,
        "convert": zoo_convert,
        "extract": zoo_extract,
        "export": zoo_export,
        "verify": zoo_verify,
        "push": zoo_push,
    },
    "leaderboard": {
        "run": leaderboard_run,
        "study": leaderboard_study,
        "render": leaderboard_render,
        "compare": leaderboard_compare,
    },
    "cache": {"list": cache_list, "clean": cache_clean},
}
RUNS = {
    "pretrain": "Pretrain a backbone on a folder of pictures, or go on with a run.",
    "finetune": "Fine-tune a checkpoint for a task on pictures of your own, or go on with a run.",
}


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def at_least(least: int, **values: int | None) -> None:
    """Refuse smaller values of options; None is one that was not given.

    Raises:
        ValueError: names the option.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected at least {least}")


def changed(options: Any) -> dict[str, Any]:
    """Those options of a group that are not what they are by default."""
    return {name: value for name, value in vars(options).items() if value != getattr(type(options)(), name)}


@contextmanager
def usage(command: str) -> Iterator[None]:
    """Options that do not go together are a mistake in the command line."""
    from okavango.dispatch import OptionError

    try:
        yield
    except OptionError as error:
        raise Usage(f"{command}: {error}") from None


def one_line(error: Exception) -> str:
    """What went wrong, for a person."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") or type(error).__name__


class Usage(Exception):
    """The command line cannot be understood."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    format_before, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"okavango: {message}\n"
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # tyro has printed help (0) or what is wrong with the options (2)
        return int(stop.code or 0)
    except Usage as error:
        print(f"okavango: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("okavango: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("OKAVANGO_TRACEBACK"):
            raise
        print(f"okavango: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = format_before


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import okavango

        print(okavango.__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in RUNS:
        return _run(name, rest)
    command = _pick(name, {**COMMANDS, **RUNS}, "command")
    if isinstance(command, dict):
        if not rest or rest[0] in ("-h", "--help"):
            print(f"usage: okavango {name} COMMAND ...\n\n{_lines(command)}")
            return 0 if rest else 2
        name, command, rest = f"{name} {rest[0]}", _pick(rest[0], command, f"{name} command"), rest[1:]
    _cli(command, name, rest)
    return 0


def _run(verb: str, rest: list[str]) -> int:
    from okavango.pretrain.settings import own_arguments
    from okavango.recipes import named, recipes

    if not rest or rest[0] in ("-h", "--help"):
        listed = _lines(recipes(verb))
        print(f"usage: okavango {verb} RECIPE --out DIR [--data DATA] [options]\n\n{RUNS[verb]}\n\nrecipes:\n{listed}")
        print(f"\n`okavango {verb} RECIPE --help` lists the options of a recipe with its values.")
        return 0 if rest else 2
    try:
        recipe = named(rest[0], verb)
    except ValueError as error:
        raise Usage(str(error)) from None

    default = recipe

    def run(out: Path, recipe=recipe) -> None:
        recipe = own_arguments(recipe, default)
        recipe.check()  # before torch is imported
        from okavango import verbs

        getattr(verbs, verb)(recipe, out=out, data=recipe.data or None, say=say)

    # The recipe's own type and values become the options.
    run.__annotations__ = {"out": Path, "recipe": Annotated[type(recipe), tyro.conf.arg(name="")], "return": None}
    run.__doc__ = f"{RUNS[verb]}\n\nArgs:\n    out: run folder; a run that is found there is continued."
    _cli(run, f"{verb} {rest[0]}", rest[1:])
    return 0


def _cli(command: Callable[..., Any], name: str, arguments: list[str]) -> Any:
    return tyro.cli(command, prog=f"okavango {name}", args=arguments)


def _pick(name: str, known: dict, what: str):
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise Usage(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")
    return known[name]


def _overview() -> str:
    flat: dict[str, str] = dict(RUNS)
    for name, command in COMMANDS.items():
        if isinstance(command, dict):
            flat |= {f"{name} {sub}": (function.__doc__ or "").splitlines()[0] for sub, function in command.items()}
        else:
            flat[name] = (command.__doc__ or "").splitlines()[0]
    first = ("quickstart", "pretrain", "finetune")
    order = [*first, *(name for name in flat if name not in first)]
    listed = "\n".join(f"  {name:20} {flat[name]}" for name in order)
    head = "usage: okavango COMMAND ...\n\nPretrain once, take the model that fits."
    return f"{head}\n\n{listed}\n\n`okavango COMMAND --help` says more."


def _lines(commands: dict[str, Callable[..., Any]]) -> str:
    return "\n".join(f"  {name:18} {(function.__doc__ or '').splitlines()[0]}" for name, function in commands.items())
