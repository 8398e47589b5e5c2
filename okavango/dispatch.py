"""`evaluate`, `embed` and `predict` for whatever a checkpoint takes: the one place that tells pictures, places and studies apart.

Each family has a module of its own with functions of these names, which share the names and the order of what they have in common.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from okavango import verbs
from okavango.data.sources import Source
from okavango.models.backbone import Backbone
from okavango.models.preprocess import Volume
from okavango.verbs import SCENE, Opened, Say
from okavango.zoo.leaderboard.records import Record

# What stands before the slash of a protocol -> the module that measures by it; all others classify pictures.
FAMILIES = {"retrieval": "retrieval_verbs", "segmentation": "volume_verbs", "studies": "volume_verbs"}


class OptionError(ValueError):
    """An option that does not go with the protocol, the data or the checkpoint."""


def evaluate(
    checkpoint: str | nn.Module | Opened,
    *,
    data: str | Source | None = None,
    protocol: str | Sequence[str] = "knn",
    train: str | Source | None = None,
    subnets: Sequence[str] | str = (),
    report: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    seed: int = 0,
    batch: int | None = None,
    workers: int = 0,
    say: Say = print,
    **options: Any,
) -> list[Record]:
    """Measure a model by a protocol of any family.

    Args:
        checkpoint: anything `ok.load` takes, a model, or the name of a baseline of the family.
        data: labelled pictures, pictures of places, or studies of scans.
        protocol: "knn", "linear-sweep" ..., or several of these (`okavango.verbs.evaluate`); "retrieval/utm25" and its kin
            (`okavango.retrieval_verbs.evaluate`); "segmentation/brats", "segmentation/reference", "studies/classification",
            "studies/survival" (`okavango.volume_verbs.evaluate`). docs/evaluation.md, docs/retrieval.md and docs/mri.md have all.
        train: the training part, when it is not in `data`.
        subnets: names such as "w64_d2", or "all", of an elastic backbone.
        report: folder for a page.
        out: file of records to append to.
        seed: of held-out parts and intervals.
        batch: samples per forward pass; None takes the family's own: 256 pictures, 32 of places, one window of a scan.
        workers: processes that read pictures.
        **options: of the family alone, such as `rerank` or `modalities`.
    Returns:
        The records.
    Raises:
        OptionError: one that the family does not have, several protocols where one is measured at a time, no data.
        ValueError: see the family's function.
    """
    names = [protocol] if isinstance(protocol, str) else list(protocol)
    modules = [FAMILIES.get(name.partition("/")[0], "verbs") for name in names]
    if len(names) > 1 and set(modules) != {"verbs"}:
        alone = next(name for name, module in zip(names, modules, strict=True) if module != "verbs")
        raise OptionError(f"protocol {alone}: is measured alone, without {', '.join(name for name in names if name != alone)}")
    module = modules[0] if modules else "verbs"
    measure: Callable[..., list[Record]] = importlib.import_module(f"okavango.{module}").evaluate
    shared = {"train": train, "subnets": subnets, "report": report, "batch": batch, "workers": workers}
    given = {**{name: value for name, value in shared.items() if value}, **options}
    if data is not None:
        given["data"] = data
    elif inspect.signature(measure).parameters["data"].default is inspect.Parameter.empty:
        raise OptionError("--data is needed")
    _expect(measure, given, f"protocol {' '.join(names)}")
    return measure(checkpoint, protocol=names[0] if module != "verbs" else names, out=out, seed=seed, say=say, **given)


def embed(
    checkpoint: str | Backbone | Opened,
    data: str | Source,
    out: str | os.PathLike,
    *,
    subnet: str = "",
    batch: int | None = None,
    workers: int = 0,
    say: Say = print,
    **options: Any,
) -> Path:
    """Embed pictures or studies into a Parquet file, or the tiles of one scene into a GeoTIFF.

    See `okavango.verbs.embed` and, for backbones of volumes, `okavango.volume_verbs.embed`.

    Args:
        batch: samples per forward pass; None takes 64 pictures or tiles, or one study.
        **options: `modalities` of studies; `cut`, `components`, `half` and `allow` of scenes.
    Raises:
        OptionError: one that does not go with the checkpoint.
        ValueError: see there.
    """
    if Path(out).suffix not in SCENE:
        verbs.check_table(Path(out))
    found = verbs.open_model(checkpoint)
    volumes = any(isinstance(spec, Volume) for spec in found.model.preprocess.values())
    make: Callable[..., Path] = importlib.import_module(f"okavango.{'volume_verbs' if volumes else 'verbs'}").embed
    given = {"subnet": subnet, "batch": batch, "workers": workers, **options}
    given = {name: value for name, value in given.items() if value}
    _expect(make, given, f"{found.name}, which takes {'volumes' if volumes else 'pictures'}")
    return make(found, data, out, say=say, **given)


def predict(
    checkpoint: str | nn.Module | Opened,
    data: str | Source,
    out: str | os.PathLike | None = None,
    *,
    batch: int | None = None,
    say: Say = print,
    **options: Any,
) -> list[tuple[str, Any]]:
    """What a fine-tuned checkpoint says of pictures, of the tiles of one scene, or of studies.

    See `okavango.verbs.predict` and, for heads of studies, `okavango.volume_verbs.predict`.

    Args:
        batch: samples per forward pass; None takes 64 pictures or tiles, or one window.
        **options: `top` of pictures; `cut` and `allow` of scenes; `modalities`, `codes`, `overlap` and `pictures` of studies.
    Raises:
        OptionError: one that does not go with the checkpoint.
        ValueError: see there.
    """
    found = verbs.open_head(checkpoint)
    volume_verbs = importlib.import_module("okavango.volume_verbs")
    studies = volume_verbs.holds_head(found.model)
    tell: Callable[..., list[tuple[str, Any]]] = volume_verbs.predict if studies else verbs.predict
    given = {name: value for name, value in {"batch": batch, **options}.items() if value is not None}
    _expect(tell, given, f"{found.name}, which {'holds a head' if studies else 'holds no head'} for studies")
    return tell(found, data, out, say=say, **given)


def _expect(verb: Callable[..., Any], given: dict[str, Any], where: str) -> None:
    """Refuse options that a function does not have."""
    known = inspect.signature(verb).parameters
    if unknown := [name for name in given if name not in known]:
        own = [name for name in known if name not in ("checkpoint", "data", "out", "say")]
        raise OptionError(f"{unknown[0]} does not go with {where}; what goes with it: {', '.join(own)}")
