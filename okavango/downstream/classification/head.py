"""A classifier on a backbone: fine-tuned or, with the backbone frozen, a linear head trained on augmented pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.downstream.classification.augment import check_policy, erase, mix, rand_augment
from okavango.downstream.classification.features import evaluating, image_modality
from okavango.downstream.head import BackboneHead
from okavango.models._apply import resize_to
from okavango.models.backbone import Backbone, Inputs
from okavango.models.features import Features, Subnet
from okavango.models.preprocess import Preprocess
from okavango.models.raster import Bands


class Classifier(BackboneHead):
    """Backbone, one linear layer, cross-entropy. Satisfies the objective contract and adds `predict`.

    Args:
        backbone: must return `Features.pooled`.
        classes: their names, in the order of the labels.
        frozen: train the head alone; the backbone stays in eval mode.
        smoothing: share of the target spread evenly over the classes, 0..1.
        layer_decay: the learning rate of block i is multiplied by ``layer_decay ** (blocks + 1 - i)`` (ELECTRA, BEiT); 1 for none.
        crop_scale: smallest and largest share of a picture's area that a training crop keeps.
        flip: probability of mirroring left and right.
        randaugment: policy of timm such as "rand-m9-mstd0.5-inc1", "" for none.
        erasing: probability that a rectangle becomes noise.
        mixup, cutmix: parameters of the Beta distributions by which a batch is mixed with itself, 0 for none; see `augment.mix`.
        pool: "pooled" takes `Features.pooled`; "stages" the means of the last three stages of a hierarchical backbone, concatenated
            (3584 numbers of a ResNet-50).
    Raises:
        ValueError: fewer than two classes, a name twice, or a setting out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        frozen: bool = False,
        smoothing: float = 0.0,
        layer_decay: float = 1.0,
        crop_scale: tuple[float, float] = (0.35, 1.0),
        flip: float = 0.5,
        randaugment: str = "",
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        pool: Literal["pooled", "stages"] = "pooled",
    ):
        super().__init__(backbone, frozen=frozen, layer_decay=layer_decay)
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ValueError(
                f"classifier: {len(classes)} classes, {len(set(classes))} different names; expected at least two, each once"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"classifier: smoothing={smoothing}; expected 0 up to, not including, 1")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"classifier: crop_scale={crop_scale}; expected 0 < low <= high <= 1")
        if not 0 <= flip <= 1:
            raise ValueError(f"classifier: flip={flip}; expected a probability, 0..1")
        if not 0 <= erasing <= 1:
            raise ValueError(f"classifier: erasing={erasing}; expected a probability, 0..1")
        if mixup < 0 or cutmix < 0:
            raise ValueError(f"classifier: mixup={mixup}, cutmix={cutmix}; expected at least 0")
        if pool not in ("pooled", "stages"):
            raise ValueError(f"classifier: pool={pool!r}; expected 'pooled' or 'stages'")
        if randaugment:
            check_policy(randaugment)
        self.classes = tuple(classes)
        self.smoothing = smoothing
        self.crop_scale, self.flip = (float(crop_scale[0]), float(crop_scale[1])), flip
        self.randaugment, self.erasing, self.mixup, self.cutmix, self.pool = randaugment, erasing, mixup, cutmix, pool
        self.modality = image_modality(backbone.preprocess)
        self.head = nn.Linear(_width(backbone, pool), len(self.classes))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.train(self.training)

    def logits(self, inputs: Inputs, subnet: Subnet | None = None) -> Tensor:
        """Scores before the softmax, (B, classes)."""
        features = self.backbone(inputs, subnet=subnet)
        pooled = features.pooled if self.pool == "pooled" else _stage_means(features)
        if pooled is None:
            raise ValueError(f"{type(self.backbone).__name__} has no pooled features; a classifier needs a backbone that pools")
        return self.head(pooled)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            batch: what `collate` made.
            step: not used; the objective contract has it.
        Returns:
            "loss": scalar, with gradient; "accuracy": scalar, 0..1, on the augmented batch; of a mixed one, against the labels that
            its pictures had before.
        """
        logits = self.logits({self.modality: batch[self.modality]})
        target = batch.get("target", batch["label"])
        loss = F.cross_entropy(logits.float(), target, label_smoothing=self.smoothing)
        return {"loss": loss, "accuracy": (logits.detach().argmax(dim=1) == batch["label"]).float().mean()}

    def predict(self, inputs: Inputs, *, subnet: Subnet | None = None) -> Tensor:
        """Probabilities, float32 (B, classes), rows sum to 1; run in eval mode without gradients.

        Args:
            inputs: what ``preprocess(image=...)`` returns, on the classifier's device.
            subnet: the slice of an elastic backbone to run; None means the intact network, the one that was fine-tuned.
        """
        with evaluating(self), torch.no_grad():
            return self.logits(inputs, subnet).float().softmax(dim=1)

    def transform(self, preprocess: Preprocess) -> TrainTransform:
        """The augmentation of one sample; a picklable value for loader workers."""
        strong: dict[str, Any] = {"randaugment": self.randaugment, "erasing": self.erasing}
        return TrainTransform(preprocess, self.modality, self.classes, self.crop_scale, self.flip, **strong)

    def collate(self, samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Tensor]:
        """Transformed samples -> {modality: float32 (B, C, H, W), "label": int64 (B,)}; where batches are mixed, by the seed, also
        "target": float32 (B, classes).
        """
        batch = labelled(self.modality, samples, seed)
        if not self.mixup and not self.cutmix:
            return batch
        images, target = mix(batch[self.modality], batch["label"], len(self.classes), self.mixup, self.cutmix, seed)
        return {**batch, self.modality: images, "target": target}

    #: how `config.json` calls this head
    entry = "okavango.downstream.classification.head:Classifier"

    def head_config(self) -> dict[str, Any]:
        """What rebuilds this head around its backbone: for `save_checkpoint(head=...)`."""
        arguments = {
            "classes": list(self.classes),
            "frozen": self.frozen,
            "smoothing": self.smoothing,
            "layer_decay": self.layer_decay,
            "crop_scale": list(self.crop_scale),
            "flip": self.flip,
            "randaugment": self.randaugment,
            "erasing": self.erasing,
            "mixup": self.mixup,
            "cutmix": self.cutmix,
            "pool": self.pool,
        }
        return {"entry": self.entry, "arguments": arguments}

    def exports(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """The trained classifier and what its card says."""
        return {"classifier": (self, {"task": "classification", **self.head_config()["arguments"]})}


def labelled(modality: str, samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Tensor]:
    """Transformed samples -> {modality: (B, C, H, W), "label": int64 (B,)}; nothing is drawn by the seed."""
    images = torch.stack([sample[modality] for sample in samples])
    return {modality: images, "label": torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)}


def _width(backbone: Backbone, pool: str) -> int:
    """Inputs of the linear layer."""
    info = backbone.feature_info
    if pool == "pooled":
        return info.channels
    stages = dict(zip(info.strides, info.layer_channels, strict=True))  # of the last layer of each stride
    if len(stages) < 3:
        raise ValueError(f"classifier: pool='stages' needs stages of three strides; {backbone.architecture} has none")
    return sum(list(stages.values())[-3:])


def _stage_means(features: Features) -> Tensor | None:
    return None if features.maps is None else torch.cat([stage.mean((2, 3)) for stage in features.maps[-3:]], 1)


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip, then the checkpoint's own resize and normalisation of what is left.

    With RandAugment the crop is resized first, so that shifts are shares of what the network sees; noise is put on what is
    normalised.

    Attributes:
        preprocess: of the backbone; modality: which of its inputs gets the picture; classes: names of the labels.
        scale: range of the crop's share of the area; flip: probability.
        aspect: range of the crop's width / height, drawn evenly in its logarithm.
        randaugment: policy, see `augment.rand_augment`, "" for none; erasing: probability of noise in a rectangle.
    """

    preprocess: Preprocess
    modality: str
    classes: tuple[str, ...]
    scale: tuple[float, float]
    flip: float
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    randaugment: str = ""
    erasing: float = 0.0

    def __call__(self, sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """One sample, augmented by the seed alone.

        Args:
            sample: {"image": (C, H, W) or Bands, "label": int, ...}.
            seed: 0 or more.
        Returns:
            {modality: float32 (C, h, w) at the spec's size, "label", "id"}.
        Raises:
            ValueError: a label that is not one of the classes, or RandAugment on bands.
        """
        label, name = sample.get("label"), sample.get("id", "?")
        if label is None or not 0 <= label < len(self.classes):
            raise ValueError(
                f"sample {name!r}: label {label}; expected 0..{len(self.classes) - 1}, one of {len(self.classes)} classes"
            )
        rng = np.random.default_rng(seed)
        pixels = sample["image"]
        whole: Any = pixels.values if isinstance(pixels, Bands) else pixels
        top, left, height, width = crop_box(rng, whole.shape[-2], whole.shape[-1], self.scale, self.aspect)
        pixels = _part(pixels, slice(top, top + height), slice(left, left + width), flip=bool(rng.random() < self.flip))
        if self.randaugment and isinstance(pixels, Bands):
            raise ValueError("RandAugment is made for pictures, and these are rasters of bands; set randaugment to nothing")
        spec = self.preprocess.array(self.modality)
        resize = dataclasses.replace(spec.resize, rule="exact", crop_ratio=1.0)
        if self.randaugment:
            pixels = resize_to(pixels, spec.size, resize)
            fill = spec.normalise.mean if len(spec.normalise.mean) == 3 else (0.5,) * 3
            pixels = rand_augment(pixels, self.randaugment, fill, int(rng.integers(2**32)))
        ready = self.preprocess.replace(self.modality, resize=resize)(**{self.modality: pixels})[self.modality][0]
        if self.erasing:
            ready = erase(ready, self.erasing, int(rng.integers(2**32)))
        return {self.modality: ready, "label": int(label), "id": name}


def _part(pixels: Any, rows: slice, columns: slice, *, flip: bool) -> Any:
    """A box of a picture, an array or `Bands`, mirrored if asked for."""
    if isinstance(pixels, Bands):
        mask = None if pixels.mask is None else _part(pixels.mask, rows, columns, flip=flip)
        return dataclasses.replace(pixels, values=_part(pixels.values, rows, columns, flip=flip), mask=mask)
    pixels = pixels[..., rows, columns]
    if flip:
        return pixels.flip(-1) if isinstance(pixels, Tensor) else pixels[..., ::-1]
    return pixels


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random box inside a picture (Inception crop, arXiv 1409.4842): area, aspect, place.

    After ten draws that do not fit, the largest centred box of the nearest allowed aspect.

    Returns:
        top, left, height, width in pixels.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w
