"""What the heads for volumes share: samples for training, batches of studies with any subset of sequences, whole volumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from okavango.data.sources import BadSample, Source
from okavango.data.studies import Augment, Prepare, Prepared
from okavango.downstream.head import BackboneHead
from okavango.models.backbone import Backbone
from okavango.models.preprocess import Preprocess, Volume
from okavango.models.volume import Window


def volume_specs(preprocess: Preprocess) -> dict[str, Volume]:
    """The modalities that take volumes, in the network's order.

    Raises:
        ValueError: there is none.
    """
    specs = {name: spec for name, spec in preprocess.items() if isinstance(spec, Volume)}
    if not specs:
        raise ValueError(f"this backbone takes {', '.join(preprocess) or 'nothing'}; studies need modalities that are volumes")
    return specs


def whole(preprocess: Preprocess) -> Preprocess:
    """The same specs without cutting or scaling to size: the whole volume, but for the border that is zero in all sequences."""
    for name, spec in volume_specs(preprocess).items():
        resize = dataclasses.replace(spec.resize, rule="none", multiple_of=1)
        preprocess = preprocess.replace(name, foreground=True, resize=resize)
    return preprocess


def chosen(preprocess: Preprocess, wanted: Iterable[str], what: str = "modalities") -> tuple[str, ...]:
    """Names or aliases -> modalities in the network's order; all where none is wanted.

    Raises:
        ValueError: an unknown name.
    """
    names = {preprocess.resolve(name) for name in wanted}
    specs = volume_specs(preprocess)
    if odd := sorted(names - set(specs)):
        raise ValueError(f"{what}: {odd[0]} is no volume; expected some of {', '.join(specs)}")
    return tuple(name for name in specs if name in names or not names)


@dataclass(frozen=True)
class StudyTransform:
    """A study -> what is learnt from: prepared, cut out, augmented. A picklable value for loader workers.

    Attributes:
        prepare: see there; augment: None leaves values and directions as they are.
        modalities: the sequences that are learnt from; a study that has none of them is a bad sample.
        crop: "centre" is what the spec cuts; "random" cuts a window of the spec's size out of the whole volume, every second one
            around a voxel of the segmentation.
        facts: keys that every study must have, such as "seg", "label", "time".
        labels: greatest label number, 0 where it is not checked.
    """

    prepare: Prepare
    augment: Augment | None
    modalities: tuple[str, ...]
    crop: Literal["centre", "random"] = "centre"
    facts: tuple[str, ...] = ()
    labels: int = 0

    def __call__(self, sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """One study, cut and augmented by the seed alone.

        Raises:
            BadSample: see `Prepare`; or a fact, or all sequences, are missing.
        """
        id = str(sample.get("id", ""))
        if lacking := [fact for fact in self.facts if sample.get(fact) is None]:
            raise BadSample(id, f"has no {lacking[0]}, which this task is trained on")
        out = self.prepare(sample)
        if not any(name in out for name in self.modalities):
            raise BadSample(id, f"has none of the sequences {', '.join(self.modalities)}")
        if self.labels and int(out["seg"].max()) > self.labels:
            raise BadSample(id, f"label {int(out['seg'].max())} in its segmentation; expected 0..{self.labels}")
        if self.crop == "random":
            out = cut_out(out, volume_specs(self.prepare.preprocess)[self.modalities[0]].size, seed)
        return out if self.augment is None else self.augment(out, seed)


def cut_out(sample: Mapping[str, Any], size: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """A window of a prepared study, for half of the seeds around a voxel of its "seg"; padded with 0 where it is smaller."""
    geometry, rng = sample["geometry"], np.random.default_rng([seed, 1])
    grid = geometry.size
    # Smaller volumes lie anywhere in the window, larger ones have it anywhere inside.
    low = [min(0, g - s) for g, s in zip(grid, size, strict=True)]
    high = [max(0, g - s) for g, s in zip(grid, size, strict=True)]
    start = [int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True)]
    seg = sample.get("seg")
    if seg is not None and rng.random() < 0.5 and bool((seg != 0).any()):
        inside = torch.nonzero((seg != 0).flatten(0, -4).any(0) if seg.ndim > 3 else seg != 0)
        middle = inside[int(rng.integers(len(inside)))].tolist()
        start = [min(max(m - s // 2, a), b) for m, s, a, b in zip(middle, size, low, high, strict=True)]
    window = Window(grid, tuple(start), tuple(size))  # type: ignore[arg-type]
    out = {**sample, "geometry": geometry.then(window)}
    for name, value in sample.items():
        if isinstance(value, Tensor) and tuple(value.shape[-3:]) == grid:
            out[name] = window.apply(value, name == "seg", 0.0)
    return out


def stack(
    samples: Sequence[Mapping[str, Any]],
    preprocess: Preprocess,
    modalities: Sequence[str],
    *,
    drop: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Prepared studies -> a batch in which each has the sequences that it has.

    Args:
        preprocess: of the backbone; modalities: those that may be used.
        drop: probability that a study is seen with a random subset of its sequences, each of the non-empty ones as likely.
        seed: of these draws.
    Returns:
        {modality: float32 (B, C, D, H, W), 0 where a study lacks it; "present": bool (B, modalities of the preprocess)}; modalities
        that no study of the batch has are left out.
    """
    rng = np.random.default_rng([seed, 2])
    kept = []
    for sample in samples:
        have = [name for name in modalities if name in sample]
        if rng.random() < drop:
            code = int(rng.integers(1, 2 ** len(have)))
            have = [name for bit, name in enumerate(have) if code >> bit & 1]
        kept.append(have)
    batch: dict[str, Tensor] = {}
    for name in modalities:
        if having := [sample[name] for sample, have in zip(samples, kept, strict=True) if name in have]:
            blank = torch.zeros_like(having[0])
            batch[name] = torch.stack([s[name] if name in have else blank for s, have in zip(samples, kept, strict=True)])
    batch["present"] = torch.tensor([[name in have for name in preprocess] for have in kept])
    return batch


class StudyObjective(BackboneHead):
    """Base of the objectives on studies: everything of the contract but the loss, see "Objective" in the documentation.

    A subclass sets `seg` and `facts`, has `backbone` among its parts, and writes `forward`, `head_config` and `exports`.

    Args:
        modalities: sequences that are used, () for all of the backbone's.
        frozen, layer_decay, decay_vectors: see `BackboneHead`; the published recipes have `decay_vectors`.
        drop: see `stack`, in training. crop: see `StudyTransform`.
        flip, scale, shift: see `okavango.data.studies.Augment`.
        cache: folder of prepared studies, see `okavango.data.studies.Prepared`; "" for none.
    Raises:
        ValueError: a setting out of range, an unknown modality.
    """

    seg: Literal["regions", "labels", "none"] = "none"
    facts: tuple[str, ...] = ()
    top_label = 0

    def __init__(
        self,
        backbone: Backbone,
        *,
        modalities: Sequence[str] = (),
        frozen: bool = False,
        layer_decay: float = 1.0,
        decay_vectors: bool = False,
        drop: float = 0.0,
        crop: Literal["centre", "random"] = "centre",
        flip: float = 0.5,
        scale: float = 0.1,
        shift: float = 0.1,
        cache: str = "",
    ):
        super().__init__(backbone, frozen=frozen, layer_decay=layer_decay, decay_vectors=decay_vectors)
        if crop not in ("centre", "random"):
            raise ValueError(f"crop={crop!r}; expected 'centre' or 'random'")
        for name, share in {"drop": drop, "flip": flip}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}; expected a probability, 0..1")
        self.modalities = chosen(backbone.preprocess, modalities)
        self.drop, self.crop, self.flip, self.scale, self.shift, self.cache = drop, crop, flip, scale, shift, cache

    def arguments(self) -> dict[str, Any]:
        """Those of this class, for `head_config`; the cache belongs to the machine."""
        names = ("frozen", "layer_decay", "decay_vectors", "drop", "crop", "flip", "scale", "shift")
        return {"modalities": list(self.modalities), **{name: getattr(self, name) for name in names}}

    def _prepare(self, preprocess: Preprocess) -> Prepare:
        wanted = Preprocess({name: preprocess[name] for name in self.modalities})
        return Prepare(whole(wanted) if self.crop == "random" else wanted, self.seg)

    def samples(self, source: Source) -> Prepared:
        """The source, prepared once and kept where there is a cache; files that are not needed are not read."""
        return Prepared(source, self._prepare(self.preprocess), self.cache or None)

    def transform(self, preprocess: Preprocess) -> StudyTransform:
        """The random part of one sample; a picklable value for loader workers."""
        augment = Augment(flip=self.flip, scale=self.scale, shift=self.shift)
        prepare = self._prepare(preprocess)
        return StudyTransform(prepare, augment, self.modalities, self.crop, self.facts, self.top_label)

    def collate(self, samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Tensor]:
        """Transformed samples -> what `stack` makes of them, and the facts."""
        batch = stack(samples, self.preprocess, self.modalities, drop=self.drop, seed=seed)
        for fact in self.facts:
            values = [sample[fact] for sample in samples]
            batch[fact] = torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)
        return batch
