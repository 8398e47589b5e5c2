"""What users call for studies: `evaluate` of segmentation, classification and survival, `embed`, `predict`, `synthesize`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from okavango import verbs
from okavango.data.sources import BadSample, Source, open_source
from okavango.data.studies import REGIONS, Prepare, Prepared, _labels, regions, write_scan
from okavango.downstream.classification.features import evaluating, extract_features
from okavango.downstream.classification.studies import StudyClassifier, StudyHead
from okavango.downstream.classification.survival import SurvivalHead, evaluate_survival, risk, survival, times
from okavango.downstream.segmentation import infer, metrics
from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.volumes import chosen, stack
from okavango.models.backbone import Backbone
from okavango.models.bm_mae import BMMAE
from okavango.models.preprocess import Preprocess, PreprocessError
from okavango.models.volume import undo
from okavango.pretrain.objectives.bm_mae import load_objective
from okavango.verbs import Opened, Say, command_line
from okavango.zoo.hub import resolve as resolve_checkpoint
from okavango.zoo.leaderboard.records import Record, bootstrap, environment, now, read_records, write_record

PROTOCOLS = ("segmentation/brats/v1", "segmentation/reference/v1", "studies/classification/v1", "studies/survival/v1")
FAMILIES = ("segmentation", "studies")


def resolve(protocol: str) -> str:
    """Full name of a protocol; without a version the newest, "segmentation" alone means "segmentation/brats".

    Raises:
        ValueError: unknown.
    """
    name = "segmentation/brats" if protocol == "segmentation" else protocol
    found = [known for known in PROTOCOLS if name in (known, known.rpartition("/")[0])]
    if not found:
        raise ValueError(f"unknown protocol {protocol!r}; for studies there are {', '.join(PROTOCOLS)}")
    return found[0]


def subsets_of(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """All non-empty subsets, the largest first.

    Example:
        >>> subsets_of(("t1", "t2"))
        [('t1', 't2'), ('t1',), ('t2',)]
    """
    sizes = range(len(modalities), 0, -1)
    return [subset for size in sizes for subset in itertools.combinations(modalities, size)]


def holds_head(model: nn.Module) -> bool:
    """Whether a model has a head for studies."""
    return isinstance(model, Segmenter | StudyHead)


def open_head(checkpoint: str | os.PathLike | nn.Module | Opened) -> Opened:
    """A fine-tuned model of studies; see `okavango.verbs.open_head`.

    Raises:
        ValueError: the checkpoint holds no such head.
    """
    found = verbs.open_head(checkpoint)
    if not holds_head(found.model):
        raise ValueError(
            f"{found.name}: holds no head for studies; fine-tune one with `okavango finetune segment_bm_mae` or its kin"
        )
    return found


# -- evaluate -----------------------------------------------------------------------------------------------------------------


def evaluate(
    checkpoint: str | Segmenter | StudyHead | Opened,
    *,
    data: str | Source,
    protocol: str = "segmentation/brats",
    train: str | Source | None = None,
    report: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    seed: int = 0,
    batch: int = 1,
    say: Say = print,
    modalities: Sequence[str] = (),
    overlap: float = 0.5,
) -> list[Record]:
    """Measure a fine-tuned model on studies, for every subset of its sequences.

    Args:
        checkpoint: what `finetune` exported, its run folder, or the model itself.
        data: NIfTI studies, see `okavango.data.sources.open_source`; of a folder with train/ and test/ in it, the latter.
        protocol: one of `PROTOCOLS`. "segmentation/brats" measures what `predict` writes, over the whole volume, and counts empty
            cases as the challenge does; "segmentation/reference" is what BM-MAE's scripts measure: one pass over the cut of the
            spec's size, inside it, empty cases left out.
        train: of survival, the studies that the model was trained on: they say how patients are censored. Without them, `data`.
        report: folder for `index.html`, a table and a heat map on one page, and `scores.jsonl`, a line per study and subset; what
            stands there is not computed again by a run that goes on.
        out: file of records to append to.
        seed: of the bootstrap intervals, over studies.
        batch: windows per forward pass.
        modalities: subsets such as "t1,flair"; () for all that there are, which are fifteen of four sequences.
        overlap: of windows, as a share of their side.
    Returns:
        A record per subset, region and metric.
    Raises:
        ValueError: a protocol that does not go with the model; no study has a segmentation, a label or a time.
    """
    protocol = resolve(protocol)
    model, name, sha256 = open_head(checkpoint)
    wanted: dict[str, Any] = {"segmentation": Segmenter, "classification": StudyClassifier, "survival": SurvivalHead}
    kind = "segmentation" if protocol.startswith("segmentation") else protocol.split("/")[1]
    if not isinstance(model, wanted[kind]):
        raise ValueError(f"protocol {protocol}: the checkpoint holds a {type(model).__name__}; expected a {wanted[kind].__name__}")
    if isinstance(data, str) and (Path(data) / "test").is_dir():
        data = str(Path(data) / "test")
    source = Gaps(open_source(data))
    subsets = [chosen(model.preprocess, text.split(","), "--modalities") for text in modalities] or subsets_of(model.modalities)
    if outside := [subset for subset in subsets if not set(subset) <= set(model.modalities)]:
        raise ValueError(f"--modalities {','.join(outside[0])}: the model was made for {', '.join(model.modalities)}")
    if out is not None and Path(out).exists():
        read_records(out)
    facts: dict[str, Any] = {
        "model": name,
        "weights_sha256": sha256,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": source.name,
        "protocol": protocol,
        "test_manifest_sha256": source.digest,
        "seed": seed,
    }
    folder = None if report is None else Path(report)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    rows: list[tuple[tuple[str, ...], dict[str, tuple[float, tuple[float, float] | None, int]]]] = []
    for subset in subsets:
        if isinstance(model, Segmenter):
            about = {"overlap": overlap, "batch": batch}
            scores = segmentation_scores(model, source, subset, protocol, folder, {**facts, **about}, overlap, batch, say)
            settings = {**(about if "brats" in protocol else {}), **source.of(subset)}
            new = segmentation_records(scores, protocol, subset, settings, facts)
        else:
            training = times(open_source(train)) if train is not None else None
            new = pooled_records(model, source, subset, training, facts, say)
            new = [dataclasses.replace(record, settings={**record.settings, **source.of(subset)}) for record in new]
        for record in new:
            if out is not None:
                write_record(out, record)
            records.append(record)
        rows.append((subset, {record.metric: (record.value, record.interval, record.n) for record in new}))
        shown = ", ".join(f"{record.metric} {record.value:.4f}" for record in new)
        say(f"{'+'.join(subset)}: {shown}")
    if not records:
        raise ValueError(f"{source.name}: nothing could be measured; see the lines above")
    if counts := source.of(model.modalities):
        parts = [f"{part} in {count}" for part, count in counts.get("absent", {}).items()]
        parts += [f"{counts['studies_left_out']} left out"] if "studies_left_out" in counts else []
        say(f"of {len(source)} studies: {', '.join(parts)}")
    if folder is not None:
        from okavango.downstream.segmentation.page import render

        first = records[0]
        hidden = ("modalities", "region", "cases", "median")  # of one row alone
        shown_facts = {
            "protocol": protocol,
            "dataset": first.dataset,
            "command": first.command,
            "created": first.created,
            "seed of intervals": seed,
            "settings": {key: value for key, value in first.settings.items() if key not in hidden},
            "versions": first.versions,
            "hardware": first.hardware,
        }
        title = f"{facts['model']} on {source.name}"
        page = render(folder / "index.html", rows, model.modalities, title=title, protocol=protocol, facts=shown_facts)
        say(f"the page is {page}")
    return records


def segmentation_scores(
    model: Segmenter,
    source: Gaps,
    subset: Sequence[str],
    protocol: str,
    folder: Path | None,
    made_by: Mapping[str, Any],
    overlap: float,
    batch: int,
    say: Say,
) -> list[metrics.Score]:
    """Scores of all studies that have a segmentation and one of the sequences; those in `scores.jsonl` are taken from it."""
    known: dict[tuple[str, str], list[metrics.Score]] = {}
    path = None if folder is None else folder / "scores.jsonl"
    stamp = json.dumps(made_by, sort_keys=True)
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # its write was cut short
                continue
            if entry["made_by"] == stamp:
                known.setdefault((entry["subset"], entry["study"]), [metrics.Score.from_json(each) for each in entry["scores"]])
    name, found = "+".join(subset), []
    for index, id in enumerate(source.ids):
        if (name, id) in known:
            found += known[name, id]
            continue
        try:
            sample = source[index]
            if sample.get("seg") is None:
                raise BadSample(id, "has no segmentation")
            measure = whole_volume_score if "brats" in protocol else cut_score
            scores = measure(model, sample, subset, overlap, batch)
        except BadSample as error:
            say(f"left out {error.id or id}: {error.reason}")
            source.left_out.add(index)
            continue
        found += scores
        if path is not None:
            entry = {"subset": name, "study": id, "made_by": stamp, "scores": [each.to_json() for each in scores]}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
    return found


def whole_volume_score(
    model: Segmenter, sample: Mapping[str, Any], subset: Sequence[str], overlap: float, batch: int
) -> list[metrics.Score]:
    """What `predict` writes against the segmentation, both on the grid on which the study is stored."""
    masks = infer.segment(model, sample, modalities=subset, overlap=overlap, batch=batch)
    first = sample[sample["present"][0]]
    try:
        numbers = _labels(sample["seg"], first)
        if model.labels:
            target = torch.from_numpy(np.stack([numbers == number for number in range(1, len(model.labels) + 1)]))
        else:
            target = regions(numbers, sample.get("codes", "brats"), getattr(sample["seg"], "name", "") or "seg")
    except PreprocessError as error:
        raise BadSample(str(sample["id"]), str(error)) from None
    if model.labels:
        said = torch.stack([masks[0] == number for number in range(1, len(model.labels) + 1)])
    else:
        said = regions(infer.label_map(masks).numpy(), "brats")
    return metrics.score(said, target, first.spacing or (1.0, 1.0, 1.0), model.regions, id=str(sample["id"]))


def cut_score(
    model: Segmenter, sample: Mapping[str, Any], subset: Sequence[str], overlap: float, batch: int
) -> list[metrics.Score]:
    """One pass over the cut that the spec makes, measured inside it."""
    prepared = Prepare(Preprocess({name: model.preprocess[name] for name in subset}), model.seg)(sample)
    inputs = stack([prepared], model.preprocess, subset)
    found = model.predict(inputs, present=inputs.pop("present"))[0]
    if model.labels:
        best = torch.cat([1 - found.sum(0, keepdim=True), found]).argmax(0)
        numbers = range(1, len(model.labels) + 1)
        said, target = (torch.stack([each == number for number in numbers]) for each in (best, prepared["seg"][0]))
    else:
        said, target = found > 0.5, prepared["seg"]
    placed = prepared["geometry"].placed()
    spacing = (1.0, 1.0, 1.0) if placed is None else np.linalg.norm(placed[:3, :3], axis=0).tolist()
    return metrics.score(said, target, spacing, model.regions, id=str(sample["id"]))


def segmentation_records(
    scores: Iterable[metrics.Score],
    protocol: str,
    subset: Sequence[str],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[Record]:
    """A record per region and metric that any study has; the value of the other convention stands in the settings."""
    convention, scores = protocol.split("/")[1], list(scores)
    other = {"brats": "reference", "reference": "brats"}[convention]
    others = {(each.region, each.metric): each.value for each in metrics.summarise(scores, other)}
    found = []
    for each in metrics.summarise(scores, convention):
        if not len(each.values):
            continue
        elsewhere = others[each.region, each.metric]
        about = {
            "modalities": list(subset),
            "region": each.region,
            "cases": each.cases,
            "left_out": each.left_out,
            "median": each.median,
            f"mean_by_{other}": None if math.isnan(elsewhere) else elsewhere,
            **({"tolerance_mm": metrics.TOLERANCE} if each.metric == "nsd" else {}),
            **({"unit": "mm"} if each.metric == "hd95" else {}),
            **settings,
        }
        interval = bootstrap(each.values, facts["seed"])
        found.append(_record(f"{metrics.NAMES[each.metric]} {each.region}", each.value, interval, len(each.values), about, facts))
    return found


def pooled_records(
    model: StudyHead,
    source: Gaps,
    subset: Sequence[str],
    training: tuple[np.ndarray, np.ndarray] | None,
    facts: Mapping[str, Any],
    say: Say,
) -> list[Record]:
    """Classification: area under the ROC curve and average precision of each class, a mean over classes where there are more than
    two, and accuracy. Survival: C-index and integrated Brier score. Intervals by resampling studies.
    """
    logits, kept = [], []
    preprocess = Preprocess({name: model.preprocess[name] for name in subset})
    for index, id in enumerate(source.ids):
        try:
            sample = source[index]
            if lacking := [fact for fact in model.facts if sample.get(fact) is None]:
                raise BadSample(id, f"has no {lacking[0]}")
            inputs = stack([Prepare(preprocess)(sample)], model.preprocess, subset)
            with evaluating(model), torch.inference_mode():
                logits.append(model.logits(inputs, inputs.pop("present")).float())
            kept.append([sample[fact] for fact in model.facts])
        except BadSample as error:
            say(f"left out {error.id or id}: {error.reason}")
            source.left_out.add(index)
    if not kept:
        return []
    scores = torch.cat(logits)
    about: dict[str, Any] = {"modalities": list(subset)}
    if isinstance(model, StudyClassifier):
        measure = _classification(model, scores, np.array([label for (label,) in kept]))
    else:
        assert isinstance(model, SurvivalHead)
        measure = _survival(model, scores, tuple(np.array(column) for column in zip(*kept, strict=True)), training)  # type: ignore[arg-type]
        about |= {"censored_by": "training part" if training is not None else "the studies themselves", "risk": "hazard"}
    everyone, rng = np.arange(len(kept)), np.random.default_rng(facts["seed"])
    whole_set = measure(everyone)
    drawn = [measure(np.sort(rng.choice(everyone, len(everyone)))) for _ in range(200)]
    found = []
    for name, value in whole_set.items():
        values = [each[name] for each in drawn if name in each and math.isfinite(each[name])]
        interval = tuple(map(float, np.quantile(values, (0.025, 0.975)))) if values else None
        found.append(_record(name, value, interval, len(kept), about, facts))  # type: ignore[arg-type]
    return found


def _classification(model: StudyClassifier, logits: Tensor, labels: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    probabilities = logits.softmax(1) if len(model.classes) > 2 else torch.cat([-logits, logits], 1).sigmoid()
    table = probabilities.numpy()
    classes = range(1, 2) if len(model.classes) == 2 else range(len(model.classes))

    def measure(rows: np.ndarray) -> dict[str, float]:
        found = {"accuracy": float((table[rows].argmax(1) == labels[rows]).mean())}
        mixed = [c for c in classes if 0 < (labels[rows] == c).sum() < len(rows)]
        if mixed:
            pairs = [(labels[rows] == c, table[rows, c]) for c in mixed]
            found["ROC-AUC"] = float(np.mean([roc_auc_score(true, said) for true, said in pairs]))
            found["average precision"] = float(np.mean([average_precision_score(true, said) for true, said in pairs]))
        return found

    return measure


def _survival(
    model: SurvivalHead,
    logits: Tensor,
    test: tuple[np.ndarray, np.ndarray],
    training: tuple[np.ndarray, np.ndarray] | None,
) -> Callable[[np.ndarray], dict[str, float]]:
    logits = logits[:, : len(model.cuts)]
    curves, risks, cuts = survival(logits).numpy(), risk(logits).numpy(), np.asarray(model.cuts)
    names = {"c_index": "C-index", "brier": "integrated Brier score"}

    def measure(rows: np.ndarray) -> dict[str, float]:
        part = test[0][rows].astype(float), test[1][rows].astype(bool)
        try:
            found = evaluate_survival(training or part, part, curves[rows], cuts, risks[rows].astype(float))
        except ValueError:  # no pair that can be compared
            return {}
        return {names[key]: value for key, value in found.items()}

    return measure


def _record(
    metric: str,
    value: float,
    interval: tuple[float, float] | None,
    n: int,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Record:
    versions, hardware = environment()
    subset = "+".join(settings["modalities"])
    return Record(
        metric=metric,
        value=value,
        interval=interval,
        n=n,
        settings=dict(settings),
        versions=versions,
        hardware=hardware,
        command=command_line(),
        created=now(),
        label=f"{facts['model']} {subset}",
        **facts,
    )


class Gaps:
    """A source that remembers what its studies lacked: sequences that are missing or torn, and the studies that were left out."""

    def __init__(self, source: Source):
        self.source, self.absent, self.left_out = source, dict[int, list[str]](), set[int]()
        self.name, self.classes, self.labels, self.digest = source.name, source.classes, source.labels, source.digest
        self.ids = getattr(source, "ids", None) or [str(index) for index in range(len(source))]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.source[index]
        self.absent[index] = list(sample.get("absent", ()))
        return sample

    def of(self, subset: Sequence[str]) -> dict[str, Any]:
        """Studies that lack something of a subset, for records: {"absent": {"t2 is torn": 1}, "studies_left_out": 2}."""
        parts = sorted(part for parts in self.absent.values() for part in parts if part.partition(" is ")[0] in subset)
        counts = {part: parts.count(part) for part in dict.fromkeys(parts)}
        return {**({"absent": counts} if counts else {}), **({"studies_left_out": len(self.left_out)} if self.left_out else {})}


# -- embed and predict --------------------------------------------------------------------------------------------------------


def embed(
    checkpoint: str | Backbone | Opened,
    data: str | Source,
    out: str | os.PathLike,
    *,
    batch: int = 1,
    workers: int = 0,
    modalities: str = "",
    say: Say = print,
) -> Path:
    """Embed studies into a Parquet file, one row each, as `okavango.verbs.embed` does with pictures.

    A vector is `Features.pooled` of the sequences that a study has. Studies that have none, or cannot be read, are named and left
    out.

    Args:
        checkpoint: what `ok.load` takes, or a backbone; of a fine-tuned one, its backbone is used.
        data: folder of studies, or a table of them.
        out: a name that ends in .parquet.
        batch: studies per forward pass, of one size. workers: processes that read them.
        modalities: sequences that may be used, such as "t1,flair"; "" for all.
    Raises:
        ValueError: a sequence that the backbone does not know, none that the data have, or no study that can be read.
    """
    out = Path(out)
    verbs.check_table(out)
    model, name, _ = verbs.open_model(checkpoint)
    wanted = chosen(model.preprocess, modalities.split(",") if modalities else (), "--modalities")
    source = Prepared(open_source(data), Prepare(Preprocess({each: model.preprocess[each] for each in wanted})))
    inputs = partial(stack, preprocess=model.preprocess, modalities=wanted)
    embedded = extract_features(model, source, batch=batch, workers=workers, inputs=inputs)
    about = {"model": name, "modalities": ",".join(wanted), "source_sha256": source.digest}
    return verbs.write_table(out, embedded, about, say)


def predict(
    checkpoint: str | Segmenter | StudyHead | Opened,
    data: str | Source,
    out: str | os.PathLike | None = None,
    *,
    batch: int = 1,
    modalities: str = "",
    codes: str = "brats",
    overlap: float = 0.5,
    pictures: bool = False,
    say: Say = print,
) -> list[tuple[str, Any]]:
    """Segment studies into NIfTI files, or say the classes or the survival of each.

    Args:
        data: folder of studies, of one or many, or a table of them.
        out: folder for segmentations; a run that was killed goes on where it was.
        batch: windows per forward pass.
        modalities: those that may be used, such as "t1,flair"; "" for all.
        codes: convention of the label numbers that are written. overlap: of windows, as a share of their side.
        pictures: also draw three planes of each study, ``ID.png``.
    Returns:
        (id, path of the segmentation), or (id, [(class, probability)]), or (id, [(time, share that survives)]).
    Raises:
        ValueError: segmentation without `out`, a folder that holds other predictions.
    """
    model, name, sha256 = open_head(checkpoint)
    source, wanted = open_source(data), chosen(model.preprocess, modalities.split(",") if modalities else (), "--modalities")
    wanted = tuple(name for name in wanted if name in model.modalities)
    if codes not in REGIONS:
        raise ValueError(f"--codes {codes}: expected one of {', '.join(REGIONS)}")
    results: list[tuple[str, Any]] = []
    if isinstance(model, Segmenter):
        if out is None:
            raise ValueError("segmentations are files: give --out FOLDER")
        made_by = {"model": name, "weights_sha256": sha256}
        options: dict[str, Any] = {"modalities": wanted, "codes": codes, "overlap": overlap, "batch": batch, "say": say}
        for id, path in infer.predict_folder(model, source, out, made_by=made_by, **options):
            results.append((id, path))
            if pictures and not (picture := path.with_name(path.name.removesuffix("_seg.nii.gz") + ".png")).exists():
                _draw(source, id, path, picture)
        say(f"{len(results)} of {len(source)} segmentations are in {out}")
        return results
    assert isinstance(model, StudyClassifier | SurvivalHead)
    prepare = Prepare(Preprocess({name: model.preprocess[name] for name in wanted}))
    for index in range(len(source)):
        try:
            sample = source[index]
            inputs = stack([prepare(sample)], model.preprocess, wanted)
        except BadSample as error:
            say(f"left out {error.id}: {error.reason}")
            continue
        row = cast(Any, model).predict(inputs, present=inputs.pop("present"))[0].tolist()
        named: Any = model.classes if isinstance(model, StudyClassifier) else model.cuts
        best = list(zip(named, row, strict=True))
        say(f"{sample['id']}\t" + "\t".join(f"{name} {share:.3f}" for name, share in best))
        results.append((str(sample["id"]), best))
    return results


def _draw(source: Source, id: str, path: Path, picture: Path) -> None:
    from okavango.data.studies import read_scan
    from okavango.downstream.segmentation.pictures import three_planes

    sample = source[list(getattr(source, "ids", map(str, range(len(source))))).index(id)]
    labels = np.asarray(read_scan(path).values)
    masks = {f"label {number}": labels == number for number in np.unique(labels) if number}
    volumes = {name: np.asarray(sample[name].values) for name in sample["present"]}
    title = f"{id}, predicted{_warning(id)}"
    three_planes(volumes, picture, masks=masks, affine=sample["affine"], title=title)


def _warning(id: str) -> str:
    """Pictures of made-up studies say so."""
    return ", semi-synthetic" if "semisynthetic" in id else ""


# -- synthesis ----------------------------------------------------------------------------------------------------------------


def synthesize(
    checkpoint: str, data: str | Source, sequence: str, out: str | os.PathLike, *, say: Say = print
) -> list[tuple[str, dict[str, float]]]:
    """Make a sequence out of the others: ``ID_SEQUENCE_synthetic.nii.gz`` and a picture of three planes for each study.

    Values are in standard deviations of the scan over its nonzero voxels, there is no way back to stored ones; what the cut of the
    spec leaves out is 0. Where the study has the sequence, PSNR and SSIM say how near the result comes, see `fidelity`.

    Args:
        checkpoint: of pretraining: `export-full`, the run folder that holds it, or a converted bmmae.pth.
        sequence: modality or alias.
        out: folder.
    Returns:
        per study, its id and {"psnr", "ssim"}, empty where the study lacks the sequence.
    Raises:
        ValueError: a checkpoint without decoder, a sequence that it does not know.
    """
    run = Path(checkpoint) / "export-full"
    model = load_objective(run if run.is_dir() else resolve_checkpoint(checkpoint))
    preprocess = model.backbone.preprocess
    (name,) = chosen(preprocess, [sequence], "--synthesize")
    source, out = open_source(data), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for index in range(len(source)):
        try:
            sample = source[index]
            prepared = Prepare(preprocess)(sample)
            given = {each: prepared[each] for each in preprocess if each in prepared and each != name}
            if not given:
                raise BadSample(str(sample["id"]), f"has no other sequence to make {name} of")
        except BadSample as error:
            say(f"left out {error.id}: {error.reason}")
            continue
        made = model.reconstruct({each: value[None] for each, value in given.items()}, synthesize=[name])[name][0]
        brain = torch.stack([value != 0 for value in given.values()]).any(0)
        made = torch.where(brain, made, 0)
        found = fidelity(made[0], prepared[name][0], brain[0]) if name in prepared else {}
        results.append((str(sample["id"]), found))
        _write_synthetic(sample, prepared, name, made, out)
        shown = ", ".join(f"{key.upper()} {value:.3f}" for key, value in found.items()) or f"no {name} to compare with"
        say(f"{sample['id']}: {name} from {', '.join(given)}: {shown}")
    if rows := [found for _, found in results if found]:
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        say(f"mean of {len(rows)} studies: PSNR {means['psnr']:.3f} dB, SSIM {means['ssim']:.4f}, inside the brain")
    say(f"volumes and pictures are in {out}")
    return results


def fidelity(made: Tensor, real: Tensor, brain: Tensor) -> dict[str, float]:
    """How near a synthetic volume comes to the real one, over the voxels of the brain.

    Args:
        made, real: (D, H, W), in units of the preprocess. brain: bool, any sequence that was given is nonzero.
    Returns:
        "psnr": decibels, of the range of real values in the brain; "ssim": mean of MONAI's map (Gaussian window of 11 voxels with
        standard deviation 1.5, smaller where the volume is) over the brain.
    """
    from monai.metrics.regression import compute_ssim_and_cs

    span = float(real[brain].max() - real[brain].min())
    error = float((made - real)[brain].square().mean())
    side = min(11, *(length - (length + 1) % 2 for length in made.shape))
    padded = [torch.nn.functional.pad(each[None, None].float(), [side // 2] * 6, mode="replicate") for each in (made, real)]
    ssim, _ = compute_ssim_and_cs(
        padded[0], padded[1], 3, kernel_size=(side,) * 3, kernel_sigma=(1.5,) * 3, data_range=span, kernel_type="gaussian"
    )
    return {"psnr": 10 * math.log10(span**2 / error) if error else math.inf, "ssim": float(ssim[0, 0][brain].mean())}


def _write_synthetic(sample: Mapping[str, Any], prepared: Mapping[str, Any], name: str, made: Tensor, out: Path) -> None:
    from okavango.downstream.segmentation.pictures import three_planes

    geometry, affine = prepared["geometry"], sample["affine"]
    stored = undo(geometry, made[0])
    file = f"{sample['id']}_{name}_synthetic"
    write_scan(out / f"{file}.nii.gz", stored, np.eye(4) if affine is None else affine, f"{name} synthesised by okavango")
    volumes = {f"{name}, synthetic": made[0]}
    if name in prepared:
        volumes |= {f"{name}, real": prepared[name][0], "difference": (made - prepared[name])[0]}
    others = ", ".join(each for each in sample["present"] if each != name)
    title = f"{sample['id']}: {name} made of {others}{_warning(sample['id'])}"
    three_planes(volumes, out / f"{file}.png", affine=geometry.placed(), title=title)


# -- checkpoints of others ------------------------------------------------------------------------------------------------------


def published_head(backbone: BMMAE, found: dict[str, Any]) -> nn.Module:
    """The head for a fine-tuned file of BM-MAE's code, from what its weights tell: see `okavango.zoo.bm_mae.read_head`.

    One output is a classifier of two classes, several are intervals of survival. The file tells neither the names of the classes
    nor the cuts in time, for which 0, 1, 2, ... stand.
    """
    if found["kind"] == "segmentation":
        return Segmenter(backbone, feature_size=found["feature_size"], loss="official")
    if found["outputs"] == 1:
        return StudyClassifier(backbone, ("class 0", "class 1"), hidden=found["hidden"])
    return SurvivalHead(backbone, bins=found["outputs"], cuts=range(found["outputs"]), hidden=found["hidden"], official=True)


def bundle(checkpoint: str, out: str | os.PathLike, *, modalities: str = "", say: Say = print) -> Path:
    """Write a segmenter as a MONAI bundle, see `okavango.downstream.segmentation.bundle.export_bundle`.

    Args:
        checkpoint: what `finetune` exported, or its run folder. modalities: input channels in order, "" for all.
    Raises:
        ValueError: no segmenter, or one that makes no bundle.
    """
    from okavango.downstream.segmentation.bundle import export_bundle

    model = open_head(checkpoint).model
    if not isinstance(model, Segmenter):
        raise ValueError(f"{checkpoint}: holds a {type(model).__name__}; bundles are made of segmenters")
    run = Path(checkpoint) / "export"
    card = (run if run.is_dir() else resolve_checkpoint(checkpoint)) / "README.md"
    licence = re.search(r'^license: "?([^"\n]+)"?$', card.read_text(encoding="utf-8"), re.MULTILINE)
    names = modalities.split(",") if modalities else ()
    folder = export_bundle(model, out, name=Path(out).name, licence=licence[1] if licence else "", modalities=names)
    say(f"the bundle is in {folder}; docs/README.md in it says how MONAI runs it")
    return folder
