"""One pass over a source: what a backbone, or the bare pixels, make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

from okavango.data.sources import BadSample
from okavango.models.backbone import Backbone
from okavango.models.features import Features, Subnet, to_device
from okavango.models.preprocess import Image, Preprocess, Raster


@dataclass(frozen=True, eq=False)
class Embedded:
    """A source as vectors; rows, labels and ids go together.

    Attributes:
        features: float32 (N, D).
        labels: int64 (N,), or sets of labels (N, L) of 0 and 1; None where the source has none.
        ids: N names.
        bad: (index in the source, reason) of samples that could not be read; they have no row.
    """

    features: np.ndarray
    labels: np.ndarray | None
    ids: list[str]
    bad: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: np.ndarray) -> Embedded:
        """The given rows, in the given order."""
        labels = None if self.labels is None else self.labels[rows]
        return Embedded(self.features[rows], labels, [self.ids[row] for row in rows])

    def split(self, share: float, seed: int) -> tuple[Embedded, Embedded]:
        """Set a share of every class aside.

        Args:
            share: part of each class that is held out, 0..1; rounded, at least one sample, never the whole class.
            seed: the split is a pure function of labels and seed.
        Returns:
            (kept, held out), each in the original order.
        Raises:
            ValueError: no labels, or no class with two samples.
        """
        if self.labels is None or self.labels.ndim != 1:
            kind = "no labels" if self.labels is None else "sets of labels"
            raise ValueError(f"these samples have {kind}; a part held out by class needs one label each")
        held = held_out(self.labels, share, seed)
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The rows that `Embedded.split` holds out, bool (N,); see there."""
    rng, held = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    if not held.any():
        raise ValueError("every class has a single sample, so nothing can be held out; give at least two of one class")
    return held


def image_modality(preprocess: Preprocess) -> str:
    """The modality that the pictures of a source feed: the first one that takes images or rasters.

    Raises:
        ValueError: the backbone takes neither.
    """
    for name, spec in preprocess.items():
        if isinstance(spec, Image | Raster):
            return name
    raise ValueError(
        f"this backbone takes {', '.join(preprocess) or 'nothing'}; classification of pictures needs an image modality"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def extract_features(
    model: Backbone,
    source: Any,
    *,
    subnet: Subnet | None = None,
    batch: int = 256,
    device: torch.device | str | None = None,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
    layers: Sequence[int] = (),
    read: Callable[[Features], Tensor] | None = None,
    allow: Mapping[str, str] | None = None,
    inputs: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] | None = None,
) -> Embedded:
    """`Features.pooled` of every sample, or what else `read` makes of its features, in the order of the source.

    Args:
        model: the backbone; run in eval mode without gradients, its modes are restored.
        source: an `okavango.data.sources.Source`; samples are ``{"image": uint8 (C, H, W) or Bands, "label": int, "id": str}``.
        subnet: the slice of an elastic backbone to run; None means the intact network.
        batch: samples per forward pass.
        device: the model is moved there; None runs it where it is.
        workers: processes that read and preprocess; 0 does it here.
        dtype: computing precision by autocast; the features are float32 in any case.
        progress: called with (samples done, samples in total) after each batch.
        layers: blocks that `read` finds in `Features.layers`.
        read: the features of a batch -> (B, D), which is all that is kept of them; None takes `pooled`.
        allow: of rasters, what the preprocess would refuse and why it may pass; see `okavango.models.raster.plan`.
        inputs: samples that are no pictures -> what the backbone takes, with "present" among it where some lack a modality;
            picklable.
    Raises:
        ValueError: the backbone has no pooled features, or no sample could be read.
    """
    if device is not None:
        model.to(device)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if inputs is None:
        inputs = partial(_pictures, model.preprocess, image_modality(model.preprocess), dict(allow or {}))
    loader = read_batches(source, batch, workers, partial(_apart, inputs))
    rows: list[np.ndarray] = []
    labels: list[int | None] = []
    ids: list[str] = []
    bad: list[tuple[int, str]] = []
    done = 0
    with evaluating(model), torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for given, samples, failed in loader:
            if samples:
                given = to_device(given, device)
                features = model(given, present=given.pop("present", None), subnet=subnet, layers=layers)
                kept = features.pooled if read is None else read(features)
                if kept is None:
                    raise ValueError(f"{type(model).__name__} has no pooled features; choose a backbone that pools, or wrap it")
                rows.append(kept.float().cpu().numpy())
            labels += [label for label, _ in samples]
            ids += [name for _, name in samples]
            bad += failed
            done += len(samples) + len(failed)
            if progress is not None:
                progress(done, len(source))
    return _embedded(source, rows, labels, ids, bad)


def raw_pixels(source: Any, size: int | tuple[int, int], channels: int = 3) -> Embedded:
    """The baseline that knows nothing: pixels, 0..1, flattened.

    Args:
        source: as for `extract_features`.
        size: height and width in pixels, or one number for both; pictures are resized (bilinear, antialiased), aspect ignored.
        channels: pictures of one channel are repeated to this many, colour becomes grey for 1.
    Raises:
        ValueError: a picture with another number of channels, or no sample could be read.
    """
    height, width = (size, size) if isinstance(size, int) else size
    rows: list[np.ndarray] = []
    labels: list[int | None] = []
    ids: list[str] = []
    bad: list[tuple[int, str]] = []
    for sample in map(_Readable(source).__getitem__, range(len(source))):
        if isinstance(sample, tuple):
            bad.append(sample)
            continue
        pixels = sample["image"]
        if len(pixels) == 1:
            pixels = pixels.expand(channels, -1, -1)
        elif len(pixels) == 3 and channels == 1:
            pixels = TF.rgb_to_grayscale(pixels)
        if len(pixels) != channels:
            raise ValueError(f"sample {sample['id']!r} has {len(pixels)} channels, expected {channels}; set channels={len(pixels)}")
        values = TF.resize(pixels, [height, width], antialias=True).float().div(255)
        rows.append(values.reshape(1, -1).numpy())
        labels.append(sample.get("label"))
        ids.append(sample["id"])
    return _embedded(source, rows, labels, ids, bad)


def read_batches(source: Any, batch: int, workers: int, collate: Callable[[Sequence[Any]], Any] = list) -> DataLoader:
    """All samples in the order of the source, or (index, reason) of those that cannot be read, batch by batch through `collate`.

    Args:
        workers: processes that read and collate; 0 does it here.
    """
    return DataLoader(
        _Readable(source),
        batch_size=batch,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # so that measuring leaves the global generator of a training run alone
    )


class _Readable(Dataset):
    """A source whose bad samples come out as (index, reason) instead of ending the pass."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | tuple[int, str]:
        try:
            return self.source[index]
        except BadSample as error:
            return index, str(error)


def _apart(
    inputs: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]], samples: Sequence[Any]
) -> tuple[dict[str, Tensor], list[tuple[int | None, str]], list[tuple[int, str]]]:
    """Samples -> inputs, (label, id) of those that could be read, and the others."""
    good = [sample for sample in samples if isinstance(sample, dict)]
    bad = [sample for sample in samples if not isinstance(sample, dict)]
    return inputs(good) if good else {}, [(sample.get("label"), sample["id"]) for sample in good], bad


def _pictures(
    preprocess: Preprocess, modality: str, allow: Mapping[str, str], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    return preprocess(allow=allow, **{modality: [sample["image"] for sample in samples]})


def _embedded(source: Any, rows: list[np.ndarray], labels: list, ids: list[str], bad: list[tuple[int, str]]) -> Embedded:
    if not rows:
        reason = f"; the first one: {bad[0][1]}" if bad else ""
        raise ValueError(f"source {source.name!r}: none of its {len(source)} samples could be read{reason}")
    known = None if source.labels is None else np.asarray(labels, dtype=np.int64)
    return Embedded(np.concatenate(rows), known, ids, bad)
