"""A study of encoders on images of any bands: data set x encoder x size x normalisation, by probes that choose nothing.

Every row is an encoder with one contract, measured by each protocol. What an encoder has to beat is always there: statistics of
the pixels, random convolutions, whitened patches, a network that was never trained, one trained on ImageNet. Features are kept
under the hash of what they depend on, and a row that the file of records has is not measured again, so a study that was killed goes
on by the same command. After Corley et al., arXiv 2305.13456.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from okavango import caches
from okavango.data.labels import LabelSets, read_label_sets
from okavango.data.sources import BadSample, Source, cached
from okavango.data.statistics import Statistics, Streaming
from okavango.downstream.classification.baselines import BASELINES, SEEDED, baseline, untrained
from okavango.downstream.classification.features import Embedded, extract_features, image_modality
from okavango.downstream.classification.probes import PROBES
from okavango.downstream.classification.protocols import fit, resolve
from okavango.files import write_whole
from okavango.models.backbone import Backbone
from okavango.models.features import Subnet
from okavango.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Image, Normalise, Preprocess, Raster, Resize
from okavango.models.raster import Bands
from okavango.verbs import Say, chosen_subnets, named_subnets, open_model, outcome_record, train_and_test
from okavango.zoo.leaderboard.records import Record, paired_bootstrap, read_records, write_record

FORMAT_VERSION = 1
NORMALISATIONS = ("own", "none", "divide", "minmax", "imagenet", "standardise", "percentile")
RGB = ("red", "green", "blue")
FULL = {"u8": 255.0, "dn": 10000.0, "reflectance": 1.0}  # what "divide" divides by
RESIZES = {
    "antialiased": Resize(rule="exact", interpolation="bilinear", on="normalised"),
    "aligned": Resize(rule="exact", interpolation="bilinear", antialias=False, corners="aligned", on="normalised"),
}


class StudyError(ValueError):
    """A study that cannot be made as asked."""


class NotApplicable(StudyError):
    """A row that does not exist: this normalisation means nothing for these bands."""


# -- contracts ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """The data of a study, as far as contracts depend on them.

    Attributes:
        train, test: labelled sources.
        picture: of the first sample that can be read: `Bands` without values, or None for 8-bit pictures.
        size: height and width of that sample; channels: names of what it has.
        allow: what the reconciliation of rasters would refuse and why it may pass, see `okavango.models.raster.plan`.
    """

    train: Source
    test: Source
    picture: Bands | None
    size: tuple[int, int]
    channels: tuple[str, ...]
    allow: Mapping[str, str]

    @classmethod
    def of(cls, train: Source, test: Source, allow: Mapping[str, str] | None = None) -> Subject:
        """Look at the first sample."""
        for index in range(len(train)):
            try:
                image = train[index]["image"]
            except BadSample:
                continue
            if isinstance(image, Bands):
                size = tuple(image.values.shape[-2:])  # type: ignore[union-attr]
                return cls(train, test, image.describe(), size, image.channels, allow or {})
            channels = RGB if len(image) == 3 else ("grey",)
            return cls(train, test, None, tuple(image.shape[-2:]), channels, allow or {})
        raise StudyError(f"{train.name}: none of its {len(train)} samples could be read")

    def plain(self, channels: Sequence[str]) -> Preprocess:
        """These channels in the data's own unit and size."""
        return self.contract(tuple(channels), Normalise(), 0, RESIZES["antialiased"])

    def contract(self, channels: tuple[str, ...], rule: Normalise, size: int, resize: Resize, **more: Any) -> Preprocess:
        """A contract for these data: channels, normalisation in the data's own unit, size in pixels (0 for their own)."""
        shared: dict[str, Any] = {
            "channels": channels,
            "size": (size, size) if size else self.size,
            "resize": resize if size else Resize(rule="none"),
            "normalise": rule,
        }
        if self.picture is None:
            return Preprocess(image=Image(scale=1.0, **shared))
        where: dict[str, Any] = {"sensor": self.picture.sensor, "level": self.picture.level, "units": self.picture.units}
        return Preprocess(image=Raster(**where, **shared, **more))

    def statistics(self, channels: tuple[str, ...]) -> Statistics:
        """Of the training set, in the units that a contract for these channels normalises; unmeasured cells are left out."""
        more: dict[str, Any] = {} if self.picture is None else {"nodata_fill": float("nan")}
        plain, streaming = self.contract(channels, Normalise(), 0, RESIZES["antialiased"], **more), Streaming(channels, "train")
        for index in range(len(self.train)):
            try:
                image = self.train[index]["image"]
            except BadSample:
                continue
            streaming.update(plain(allow=self.allow, image=image)["image"][0].numpy())
        units = "u8" if self.picture is None else self.picture.units
        return streaming.finish(units=units, source=self.train.name, digest=self.train.digest)


def normalisation(name: str, statistics: Statistics, picture_like: bool) -> Normalise:
    """A normalisation by its name, in the units of the statistics.

    Args:
        name: of `NORMALISATIONS` but "own": "none"; "divide" by the greatest number of the unit; "minmax" of the training set;
            "imagenet", which is "divide" and then ImageNet's statistics; "standardise" by the training set's; "percentile", the 2nd
            and 98th of the training set become 0 and 1, cut, then ImageNet's statistics where the channels are red, green and blue.
        picture_like: the channels are red, green and blue.
    Raises:
        NotApplicable: the unit has no greatest number, or ImageNet has no statistics of these channels.
        StudyError: unknown name.
    """
    count, origin = len(statistics.channels), f"{statistics.source} train, {statistics.digest[:12]}"
    full = FULL.get(statistics.units)
    if name == "none":
        return Normalise()
    if name in ("divide", "imagenet") and full is None:
        raise NotApplicable(f"{name} has no meaning for values in {statistics.units}")
    if name == "divide" and full is not None:
        return Normalise(rule="minmax", low=(0.0,) * count, high=(full,) * count)
    if name == "minmax":
        return Normalise(rule="minmax", low=statistics.low, high=statistics.high, origin=origin)
    if name == "standardise":
        return statistics.normalise()
    if name == "imagenet" and full is not None:
        if not picture_like:
            raise NotApplicable("ImageNet has statistics of red, green and blue only")
        mean, std = (tuple(value * full for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return Normalise(rule="standard", mean=mean, std=std, origin="imagenet-1k train")
    if name == "percentile":
        low, high = (tuple(map(float, statistics.percentile(share))) for share in (2.0, 98.0))
        after: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if picture_like else {}
        return Normalise(rule="stretch", low=low, high=high, origin=origin, **after)
    raise StudyError(f"unknown normalisation {name!r}; expected one of {', '.join(NORMALISATIONS)}")


# -- encoders -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Something that makes features once it has a contract.

    Attributes:
        model, baseline, seed, sha256, parameters: of the records.
        identity: what its features depend on besides contract and data.
        build: (contract, data) -> backbone.
        channels: what it takes; None takes whatever the data have. modality: that the pictures feed.
        own: the contract of its checkpoint; None for a baseline.
        subnet: of an elastic checkpoint.
        network: architecture and arguments, of a checkpoint.
    """

    model: str
    baseline: str
    identity: str
    build: Callable[[Preprocess, Subject], Backbone]
    channels: tuple[str, ...] | None = None
    modality: str = "image"
    own: Preprocess | None = None
    subnet: str = ""
    network: tuple[str, Mapping[str, Any]] = ("", {})
    seed: int = 0
    sha256: str = ""
    parameters: int | None = None


def checkpoint_encoders(checkpoint: str, baseline: str = "pretrained") -> Iterator[Encoder]:
    """A checkpoint, or each of its subnets, with the contract that it carries.

    Args:
        checkpoint: as for `okavango.verbs.evaluate`; ``NAME@w64_d2`` or ``NAME@all`` takes subnets, see
            `okavango.verbs.named_subnets`.
    Raises:
        ValueError: there is no such checkpoint or subnet, or it does not take pictures or rasters.
    """
    name, subnets = named_subnets(checkpoint)
    model, _, sha256 = open_model(name)
    own, modality, digest = model.preprocess, image_modality(model.preprocess), state_digest(model)

    def build(contract: Preprocess, subject: Subject, subnet: Subnet | None) -> Backbone:
        sized = model if subnet is None else model.extract(subnet)
        sized.preprocess = contract
        return sized

    for subnet in chosen_subnets(model, subnets):
        sized = model if subnet is None else model.extract(subnet)
        yield Encoder(
            model=name,
            baseline=baseline,
            identity=digest if subnet is None else f"{digest} {subnet}",
            build=partial(build, subnet=subnet),
            channels=own.array(modality).channels,
            modality=modality,
            own=own,
            subnet=str(subnet or ""),
            network=(sized.architecture, sized.arguments),
            sha256=sha256,
            parameters=sum(each.numel() for each in sized.parameters()),
        )


def untrained_encoder(
    architecture: str, arguments: Mapping[str, Any], channels: tuple[str, ...] | None, modality: str, seed: int
) -> Encoder:
    """A network with the initial weights of a seed."""

    def build(contract: Preprocess, subject: Subject) -> Backbone:
        return untrained(architecture, contract, seed=seed, **arguments)

    identity = f"untrained {architecture} {json.dumps(arguments, sort_keys=True, default=str)} {seed} torch {torch.__version__}"
    return Encoder(architecture, "untrained", identity, build, channels, modality, seed=seed)


def baseline_encoder(name: str, seed: int) -> Encoder:
    """One of `BASELINES`."""

    def build(contract: Preprocess, subject: Subject) -> Backbone:
        return baseline(name, subject.train, contract, seed=seed, allow=subject.allow)

    return Encoder(name, "no network", f"{name} {seed}", build, seed=seed)


def state_digest(model: Backbone) -> str:
    """sha256 of what a backbone computes with: architecture, arguments and every tensor."""
    hasher = hashlib.sha256(f"{model.architecture} {json.dumps(model.arguments, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


# -- rows -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One encoder with one contract."""

    encoder: Encoder
    contract: Preprocess
    normalisation: str
    bands: str
    size: tuple[int, int]

    @property
    def label(self) -> str:
        """What stands in tables: encoder, bands, size, normalisation."""
        height, width = self.size
        pixels = f"{height} px" if height == width else f"{height} x {width} px"
        name = self.encoder.model.rstrip("/").rpartition("/")[2]
        training = f"{self.encoder.baseline} " if self.encoder.baseline == "untrained" else ""
        return f"{training}{name} · {self.bands} · {pixels} · {self.normalisation}"

    def key(self, *more: str) -> str:
        """Hash of what the features depend on, and of `more`."""
        parts = [str(FORMAT_VERSION), self.encoder.identity, json.dumps(self.contract.to_json(), sort_keys=True), *more]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def rows(
    subject: Subject,
    encoders: Sequence[Encoder],
    sizes: Sequence[int],
    normalisations: Sequence[str],
    bands: Sequence[str] = ("rgb",),
    resize: str = "antialiased",
    say: Say = print,
) -> Iterator[Row]:
    """The grid, encoder by encoder; what does not apply is said and left out.

    Args:
        sizes: pixels, 0 for the data's own size.
        normalisations: see `normalisation`; "own" is the checkpoint's contract with nothing but the size changed.
        bands: of baselines, which take any: "rgb" and "all".
        resize: of `RESIZES`; "own" resizes as the checkpoint says.
    """
    for name in normalisations:
        if name not in NORMALISATIONS:
            raise StudyError(f"unknown normalisation {name!r}; expected one of {', '.join(NORMALISATIONS)}")
    if resize not in RESIZES or not set(bands) <= {"rgb", "all"} or min(sizes, default=0) < 0:
        raise StudyError(f"resize {resize!r}, bands {bands}, sizes {sizes}; expected {', '.join(RESIZES)}; rgb, all; 0 or more")
    known: dict[tuple[str, ...], Statistics] = {}

    def statistics(channels: tuple[str, ...]) -> Statistics:
        if channels not in known:
            known[channels] = subject.statistics(channels)
        return known[channels]

    for encoder in encoders:
        for channels, called in _channels(encoder, subject, bands):
            for size in dict.fromkeys(sizes):
                for name in normalisations:
                    try:
                        contract = _contract(subject, encoder, channels, size, name, resize, statistics)
                    except NotApplicable as error:
                        say(f"left out: {encoder.model}, {called}, {name}: {error}")
                        continue
                    if contract is not None:
                        yield Row(encoder, contract, name, called, contract.array(image_modality(contract)).size[-2:])


def _channels(encoder: Encoder, subject: Subject, bands: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    if encoder.channels is not None:
        names = "rgb" if set(encoder.channels) == set(RGB) else f"{len(encoder.channels)} bands"
        return [(encoder.channels, names)]
    found = {"rgb": RGB if subject.channels != ("grey",) else ("grey",), "all": subject.channels}
    chosen = [(found[name], name) for name in bands]
    return chosen[:1] if subject.picture is None else chosen  # pictures have nothing besides


def _contract(
    subject: Subject,
    encoder: Encoder,
    channels: tuple[str, ...],
    size: int,
    name: str,
    resize: str,
    statistics: Callable[[tuple[str, ...]], Statistics],
) -> Preprocess | None:
    """None where the row is no row: baselines have no contract of their own."""
    if name == "own":
        if encoder.own is None:
            return None
        if not size:
            return encoder.own.replace(encoder.modality, size=subject.size, resize=Resize(rule="none"))
        return encoder.own.replace(encoder.modality, size=(size, size))
    grey = subject.channels == ("grey",)
    rule = normalisation(name, statistics(("grey",) if grey else channels), set(channels) == set(RGB))
    contract = subject.contract(channels, _repeated(rule, len(channels)) if grey else rule, size, RESIZES[resize])
    return Preprocess({encoder.modality: contract["image"]})


def _repeated(rule: Normalise, count: int) -> Normalise:
    """The rule of one channel for several copies of it."""
    numbers = {name: getattr(rule, name) for name in ("mean", "std", "low", "high")}
    return dataclasses.replace(rule, **{name: values * count for name, values in numbers.items() if len(values) == 1})


# -- features and measurements --------------------------------------------------------------------------------------------------


def row_features(row: Row, subject: Subject, source: Source, cache: Path, backbone: Callable[[], Backbone], batch: int) -> Embedded:
    """Features of a source, from the cache where they are there and whole."""
    file = cache / f"{row.key(source.digest)}.safetensors"
    if (found := read_features(file)) is not None:
        caches.touch(file)
        return found
    embedded = extract_features(backbone(), source, batch=batch, allow=subject.allow)
    write_features(file, embedded)
    return embedded


def write_features(file: Path, embedded: Embedded) -> None:
    """Vectors and labels as safetensors, ids in its metadata; the file appears whole or not at all."""
    tensors = {"features": np.ascontiguousarray(embedded.features)}
    if embedded.labels is not None:
        tensors["labels"] = np.ascontiguousarray(embedded.labels)
    about = {"ids": json.dumps(embedded.ids), "bad": json.dumps(embedded.bad)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda stream: stream.write(save(tensors, about)))


def read_features(file: Path) -> Embedded | None:
    """What `write_features` wrote; None where there is no such file or it is torn."""
    try:
        with safe_open(file, framework="numpy") as stored:
            about = stored.metadata()
            labels = stored.get_tensor("labels") if "labels" in stored.keys() else None  # noqa: SIM118 (no mapping)
            bad = [(index, reason) for index, reason in json.loads(about["bad"])]
            return Embedded(stored.get_tensor("features"), labels, json.loads(about["ids"]), bad)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def measure_rows(
    subject: Subject,
    grid: Iterator[Row] | Sequence[Row],
    protocols: Sequence[str],
    *,
    out: str | os.PathLike,
    cache: str | os.PathLike,
    batch: int = 64,
    say: Say = print,
) -> list[Record]:
    """Measure what `out` does not have yet; a row whose contract refuses the data is said and left out.

    Returns:
        The new records; `settings` hold size, normalisation, bands, all metrics, and "row", by which `paired` finds them again.
    """
    cache, digests = Path(cache), (subject.train.digest, subject.test.digest)
    new: list[Record] = []
    for row in grid:
        keys = {protocol: row.key(*digests, protocol) for protocol in protocols}
        known = {record.settings.get("row") for record in read_records(out)} if Path(out).exists() else set()
        left = [protocol for protocol in protocols if keys[protocol] not in known]  # looked up anew: others may write there too
        called = f"{row.label} {row.encoder.subnet}".strip()
        if not left:
            say(f"{called}: measured already")
            continue
        backbone = _once(partial(row.encoder.build, row.contract, subject))
        try:
            train, test = (row_features(row, subject, source, cache, backbone, batch) for source in (subject.train, subject.test))
        except ValueError as error:
            say(f"left out: {called}: {str(error).splitlines()[0]}")
            continue
        for protocol in left:
            outcome = fit(train, protocol, row.encoder.seed).score(test)
            key = keys[protocol]
            write_whole(cache / f"{key}.npy", partial(np.save, arr=outcome.correct))
            about = {"bands": row.bands, "size": list(row.size), "normalisation": row.normalisation, "row": key}
            spec = row.contract.to_json()["specs"]
            record = outcome_record(
                protocol,
                dataclasses.replace(outcome, settings={**about, **outcome.settings, "preprocess": spec}),
                seed=row.encoder.seed,
                model=row.encoder.model,
                subnet=row.encoder.subnet,
                baseline=row.encoder.baseline,
                label=row.label,
                dataset=subject.test.name,
                parameters=row.encoder.parameters,
                weights_sha256=row.encoder.sha256,
                train_manifest_sha256=subject.train.digest,
                test_manifest_sha256=subject.test.digest,
            )
            write_record(out, record)
            low, high = record.interval or (record.value, record.value)
            say(f"{called}, {protocol}: {record.metric} {record.value:.4f} [{low:.4f}, {high:.4f}]")
            new.append(record)
    return new


def _once(build: Callable[[], Backbone]) -> Callable[[], Backbone]:
    """The same backbone every time, built when it is first asked for."""
    made: list[Backbone] = []

    def backbone() -> Backbone:
        if not made:
            made.append(build())
        return made[0]

    return backbone


def paired(first: Record, second: Record, cache: str | os.PathLike, seed: int = 0) -> tuple[float, float, float]:
    """How much more of the same test samples `first` has right than `second`: mean, and 95 % interval by paired bootstrap.

    Args:
        first, second: records of one study, on the same data and under the same protocol. cache: its cache.
    Raises:
        StudyError: other data or another protocol, or the cache has no results of them.
    """
    if (first.test_manifest_sha256, first.protocol) != (second.test_manifest_sha256, second.protocol):
        raise StudyError(f"{first.name} and {second.name}: measured on other data or under another protocol")
    correct = []
    for record in (first, second):
        file = Path(cache) / f"{record.settings.get('row')}.npy"
        if not file.exists():
            raise StudyError(f"{file}: not there, so {record.name} cannot be compared sample by sample; measure it again")
        correct.append(np.load(file, allow_pickle=False))
    return paired_bootstrap(correct[0], correct[1], seed)


# -- the verb -------------------------------------------------------------------------------------------------------------------


def run_study(
    data: str | Source,
    *,
    out: str | os.PathLike,
    checkpoints: Sequence[str] = (),
    imagenet: str = "torchvision/resnet50",
    train: str | Source | None = None,
    labels: str | os.PathLike | None = None,
    sizes: Sequence[int] = (0, 224),
    normalisations: Sequence[str] = ("own", "divide", "standardise"),
    bands: Sequence[str] = ("rgb",),
    protocols: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    resize: Literal["antialiased", "aligned"] = "antialiased",
    cache: str | os.PathLike | None = None,
    allow: Mapping[str, str] | None = None,
    batch: int = 64,
    say: Say = print,
) -> list[Record]:
    """Measure checkpoints and everything they have to beat; go on with what `out` holds.

    Args:
        data, train: see `okavango.verbs.train_and_test`.
        out: file of records to append to.
        checkpoints: see `checkpoint_encoders`.
        imagenet: the network trained on ImageNet, a checkpoint or TIMM/NAME or TORCHVISION/NAME; where its weights cannot be had,
            that is said, and its untrained twin is measured all the same.
        labels: JSON of {id: [labels]} of both parts, for sets of labels.
        sizes, normalisations, bands, resize: see `rows`.
        protocols: `knn-5` and `linear-c1` when left out, or their kin for sets of labels.
        seeds: of what is drawn: random and whitened filters, initial weights.
        cache: folder of features; beside `out` when left out.
        allow: see `Subject`.
    Returns:
        The new records.
    Raises:
        ValueError: data without labels, unknown names, or a file of records that is none.
    """
    train_part, test_part = train_and_test(data, train)
    if labels is not None:
        sets = read_label_sets(labels)
        classes = sorted({name for names in sets.values() for name in names})
        train_part, test_part = (cast(Source, LabelSets(part, sets, classes)) for part in (train_part, test_part))
    if train_part.labels is None or test_part.labels is None:
        raise StudyError("a study needs labels: a sub-folder per class, or --labels for sets of them")
    if tuple(train_part.classes) != tuple(test_part.classes):
        raise StudyError(f"classes {train_part.classes} in training and {test_part.classes} in test; they must be the same")
    several = np.ndim(train_part.labels) == 2
    names = [resolve(name) for name in protocols or (("multilabel-" * several) + name for name in ("knn-5", "linear-c1"))]
    if unfit := [name for name in names if name not in PROBES or PROBES[name].label_sets != several]:
        fitting = ", ".join(name for name, probe in PROBES.items() if probe.label_sets == several)
        raise StudyError(f"protocol {unfit[0]}: not one for a study of these data; expected {fitting}")
    subject = Subject.of(cached(train_part), cached(test_part), allow)
    encoders = list(all_encoders(checkpoints, imagenet, seeds, say))
    grid = rows(subject, encoders, sizes, normalisations, bands, resize, say)
    cache = Path(out).with_suffix(".cache") if cache is None else cache
    with caches.used(cache, "features"):
        return measure_rows(subject, grid, names, out=out, cache=cache, batch=batch, say=say)


def all_encoders(checkpoints: Sequence[str], imagenet: str, seeds: Sequence[int], say: Say = print) -> Iterator[Encoder]:
    """The baselines, the network of ImageNet and its untrained twins, the checkpoints."""
    for name in BASELINES:
        for seed in seeds if name in SEEDED else seeds[:1]:
            yield baseline_encoder(name, seed)
    architecture, modality = imagenet, "image"
    arguments: Mapping[str, Any] = {}
    channels: tuple[str, ...] | None = RGB
    for name in dict.fromkeys((imagenet, *checkpoints)):
        try:
            found = list(checkpoint_encoders(name, "ImageNet" if name == imagenet else "pretrained"))
        except (ValueError, OSError, RuntimeError) as error:  # whatever a library raises for weights that it does not know
            if name in checkpoints:
                raise
            say(f"left out: {imagenet} trained on ImageNet: {str(error).splitlines()[0]}")
            continue
        if name == imagenet:
            (architecture, arguments), channels, modality = found[0].network, found[0].channels, found[0].modality
        yield from found
    for seed in seeds:
        yield untrained_encoder(architecture, arguments, channels, modality, seed)
