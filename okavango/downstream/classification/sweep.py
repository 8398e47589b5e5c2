"""DINOv2's linear sweep (arXiv 2304.07193): four inputs from a frozen backbone x 13 learning rates = 52 linear classifiers, all
trained at once on augmented pictures. POA (arXiv 2408.01031) takes evenly spaced blocks where DINOv2 takes the last four.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from okavango.data.loading import Batches, batch_loader
from okavango.downstream.classification.features import Embedded, evaluating, extract_features, image_modality
from okavango.downstream.classification.head import TrainTransform, labelled
from okavango.downstream.classification.linear import RATES, Heads, cosine
from okavango.models.backbone import Backbone
from okavango.models.features import Features, Layer, to_device

INPUTS = ((1, False), (1, True), (4, False), (4, True))  # class tokens of so many blocks; with the mean of the last patch tokens
PASSES, LEAST_STEPS, BATCH = 10, 500, 256
CROP, FLIP = (0.08, 1.0), 0.5

Rule = Literal["even", "last"]


def chosen_blocks(depth: int, rule: Rule) -> tuple[int, ...]:
    """The blocks whose class tokens make the wide inputs, ascending, the last of the network at the end.

    Args:
        depth: number of blocks.
        rule: "even" takes round(depth / 4 * i), i = 1, 2, 3, halves to even, and depth - 1 (POA); "last" the last four (DINOv2).
    Returns:
        four indices, or those of them that are different and exist: fewer below a depth of 6 ("even") or 4 ("last").

    Example:
        >>> chosen_blocks(12, "even"), chosen_blocks(12, "last"), chosen_blocks(4, "even")
        ((3, 6, 9, 11), (8, 9, 10, 11), (1, 2, 3))
    """
    found = np.round(depth / 4 * np.arange(1, 4)).astype(int) if rule == "even" else np.arange(depth - 4, depth)
    return tuple(sorted({int(index) for index in (*found, depth - 1) if 0 <= index < depth}))


class Reader:
    """The four inputs of the classifiers, from the features of a batch; see `INPUTS`.

    Class and patch tokens are those after the final norm, of whatever block. A hierarchical backbone gives its stages as they stand
    in `Features.maps` (our Swin's have norms of their own, a ResNet's have none), the last four where there are more; the mean of a
    map stands for its class token, as the mean of all tokens does where there is no class token.

    Attributes:
        layers: what the backbone has to be asked for.
    Raises:
        ValueError: the backbone has neither blocks nor stages.
    """

    def __init__(self, backbone: Backbone, rule: Rule):
        info = backbone.feature_info
        if not info.layers:
            raise ValueError(
                f"linear-sweep: {backbone.architecture} has no blocks to read; use protocol linear, which takes its pooled features"
            )
        self.backbone, self.modality = backbone, image_modality(backbone.preprocess)
        self.layers = () if len(set(info.strides)) > 1 else chosen_blocks(info.layers, rule)

    def __call__(self, features: Features) -> list[Tensor]:
        """One float32 (B, D) per entry of `INPUTS`."""
        if self.layers:
            classes = [self._class_token(features.layers[index]) for index in self.layers]
            patches = self.backbone.final_norm(features.layers[self.layers[-1]].tokens[self.modality]).mean(1)
        else:
            if features.maps is None:
                raise ValueError(f"linear-sweep: {self.backbone.architecture} has stages of several strides but returns no maps")
            classes = [stage.mean((2, 3)) for stage in features.maps[-4:]]
            patches = classes[-1]
        return [torch.cat([*classes[-count:], *([patches] if mean else [])], 1).float() for count, mean in INPUTS]

    def _class_token(self, layer: Layer) -> Tensor:
        if layer.prefix is None:
            return self.backbone.final_norm(layer.tokens[self.modality]).mean(1)
        return self.backbone.final_norm(layer.prefix)[:, 0]


@dataclass(frozen=True, eq=False)
class Trained:
    """The classifiers of a sweep.

    Attributes:
        reader: of their inputs; heads: one `Heads` per entry of `INPUTS`.
        settings: what they were trained with, fit for JSON.
    """

    reader: Reader
    heads: Sequence[Heads]
    settings: dict[str, Any]

    def choice(self, number: int) -> dict[str, Any]:
        """Which classifier a column of `classes` belongs to."""
        (blocks, mean), rate = INPUTS[number // len(RATES)], RATES[number % len(RATES)]
        return {"blocks": blocks, "mean_patch_token": mean, "rate": rate}

    def classes(self, source: Any, *, batch: int = BATCH, workers: int = 0) -> Embedded:
        """What each of the 52 says of each sample; `features` are class numbers, (N, 52)."""

        def read(features: Features) -> Tensor:
            logits = [heads.logits(x) for heads, x in zip(self.heads, self.reader(features), strict=True)]
            return torch.cat([each.argmax(dim=2) for each in logits], 1)

        backbone, layers = self.reader.backbone, self.reader.layers
        return extract_features(backbone, source, batch=batch, workers=workers, layers=layers, read=read)

    def accuracies(self, said: Embedded) -> np.ndarray:
        """Of each of the 52, float (52,), from what `classes` returned; 0 for one that diverged."""
        finite = [torch.isfinite(heads.weight).all(dim=2).all(dim=0).cpu().numpy() for heads in self.heads]
        assert said.labels is not None  # `fit_sweep` and `FittedSweep.score` have checked
        return np.where(np.concatenate(finite), (said.features == said.labels[:, None]).mean(axis=0), 0.0)


def train_sweep(
    backbone: Backbone,
    source: Any,
    classes: Sequence[str],
    *,
    rule: Rule,
    seed: int = 0,
    workers: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train the 52 classifiers on one stream of random crops (8..100 % of the area) and flips; the backbone is frozen.

    10 passes over the pictures, but at least 500 steps, of 256 pictures, or of all where there are fewer. (The published ten epochs
    are 12,500 steps of 2048, which is twenty passes over ImageNet-1k.) SGD with momentum 0.9, no weight decay; rate * batch / 256
    falls to 0 by a cosine. Features are never kept, so memory does not grow with the data.

    Args:
        source: labelled samples; classes: their names. seed: of order, crops and initial weights.
        rule: see `chosen_blocks`. workers: processes that load. say: receives a line at each tenth of the steps.
    """
    reader, batch = Reader(backbone, rule), min(BATCH, len(source))
    steps = max(LEAST_STEPS, math.ceil(PASSES * len(source) / batch))
    transform = TrainTransform(backbone.preprocess, reader.modality, tuple(classes), CROP, FLIP)
    batches = Batches(source, transform, partial(labelled, reader.modality), batch=batch, seed=seed)
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    generator, rates = torch.Generator().manual_seed(seed), torch.tensor(RATES) * batch / 256
    heads: list[Heads] = []
    begun = time.perf_counter()
    with evaluating(backbone), torch.inference_mode(), closing(batch_loader(batches, 0, steps, workers=workers)) as loader:
        for step, _, samples in loader:
            for name, reason in samples.pop("bad"):
                say(f"bad sample {name} at step {step}: {reason}; another one stands in")
            samples = to_device(samples, device)
            inputs = reader(backbone({reader.modality: samples[reader.modality]}, layers=reader.layers))
            heads = heads or [Heads(x.shape[1], len(classes), rates, generator, device) for x in inputs]
            for head, x in zip(heads, inputs, strict=True):
                head.step(x, samples["label"], cosine(step, steps))
            if (step + 1) * 10 // steps > step * 10 // steps:
                rate = (step + 1) / (time.perf_counter() - begun)
                say(f"sweep: step {step + 1}/{steps}, {rate * batch:.0f} pictures/s, {(steps - step - 1) / rate:.0f} s left")
    settings = {
        "grid": list(RATES),
        "inputs": [{"blocks": blocks, "mean_patch_token": mean} for blocks, mean in INPUTS],
        "blocks": list(reader.layers) or "stages",
        "block_rule": "stages" if not reader.layers else "round(depth / 4 * i) and the last" if rule == "even" else "the last four",
        "steps": steps,
        "batch": batch,
        "momentum": 0.9,
        "crop_area": list(CROP),
        "flip": FLIP,
    }
    return Trained(reader, heads, settings)
