"""What an encoder has to beat: statistics of the pixels, random convolutions, and convolutions with whitened patches of the data.

Each is a backbone with a contract of its own, so it is fed, measured and cached as any other. A network that was never trained is
one too, see `untrained`. On patches of satellite images these are strong: Corley et al. (arXiv 2305.13456) find MOSAIKS above every
pretrained network on three of seven data sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from okavango.data.sources import BadSample
from okavango.downstream.classification.augment import seeded
from okavango.downstream.classification.features import image_modality
from okavango.models.backbone import Backbone, FeatureInfo, create_model, unknown_name
from okavango.models.features import Features
from okavango.models.preprocess import Preprocess

FILTERS, SIZE, BIAS = 256, 3, -1.0
RIDGE = 1e-3  # added to the eigenvalues of a whitening
RESPONSES = 2**20  # of filters at once: 4 MiB stay in a processor's cache, which is five times as fast as all at once

Second = Literal["opposite", "negated"]


class Baseline(Backbone):
    """A function of the pixels as a backbone: `Features.pooled` is all that it has.

    Args:
        preprocess: what it is fed, of one modality that comes as pictures or rasters.
        width: numbers per sample.
    """

    def __init__(self, preprocess: Preprocess, width: int):
        super().__init__()
        self.preprocess, self.modality = preprocess, image_modality(preprocess)
        self.arguments = {}
        self.feature_info = FeatureInfo(channels=width, layers=0, layer_channels=(), strides=())

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Images (B, C, H, W) -> `pooled` (B, D)."""
        if layers or any(option is not None for option in (present, token_mask, subnet)):
            raise ValueError(f"{self.architecture}: a baseline has neither layers nor subnets, and nothing can be hidden from it")
        return Features(pooled=self.describe(inputs[self.modality]))

    def describe(self, images: Tensor) -> Tensor:
        """Float32 (B, C, H, W) -> (B, D)."""
        raise NotImplementedError


class ImageStatistics(Baseline):
    """Mean, standard deviation (n - 1), maximum and minimum of every channel, all channels' means first."""

    architecture = "image-statistics"

    def __init__(self, preprocess: Preprocess):
        super().__init__(preprocess, 4 * len(preprocess.array(image_modality(preprocess)).channels))

    def describe(self, images: Tensor) -> Tensor:
        """Float32 (B, C, H, W) -> (B, 4 C)."""
        cells = images.flatten(2)
        deviation = cells.std(-1, correction=min(1, cells.shape[-1] - 1))
        return torch.cat([cells.mean(-1), deviation, cells.amax(-1), cells.amin(-1)], 1)


class RandomConvolutions(Baseline):
    """Means over all places of relu(w * x + b) and relu(-w * x + b) for K filters w: Rolf et al. 2021, MOSAIKS, without padding.

    Args:
        preprocess: of one modality with C channels.
        filters: float32 (K, C, h, w).
        bias: b.
        second: "opposite" as above; "negated" takes relu(-(w * x + b)) for the second half, as torchgeo does and the study did.
    """

    def __init__(
        self, preprocess: Preprocess, filters: Tensor, *, architecture: str, bias: float = BIAS, second: Second = "opposite"
    ):
        super().__init__(preprocess, 2 * len(filters))
        channels = preprocess.array(self.modality).channels
        if filters.ndim != 4 or filters.shape[1] != len(channels):
            expected = f"(K, {len(channels)}, h, w) for {', '.join(channels)}"
            raise ValueError(f"filters of shape {tuple(filters.shape)}; expected {expected}")
        self.architecture, self.bias, self.second = architecture, bias, second
        self.register_buffer("filters", filters)
        self.filters: Tensor

    def describe(self, images: Tensor) -> Tensor:
        """Float32 (B, C, H, W) -> (B, 2 K)."""
        count, _, *kernel = self.filters.shape
        height, width = (side - reach + 1 for side, reach in zip(images.shape[-2:], kernel, strict=True))
        if height < 1 or width < 1:
            raise ValueError(
                f"{self.architecture}: pictures of {tuple(images.shape[-2:])} pixels are smaller than its filters, {tuple(kernel)}"
            )
        cells = height * width
        together = max(1, RESPONSES // (count * cells)), max(1, RESPONSES // cells)  # images, filters
        return torch.cat([self._means(part, together[1]) for part in images.split(together[0])])

    def _means(self, images: Tensor, together: int) -> Tensor:
        start = 0.0 if self.second == "negated" else 2 * self.bias  # -w * x + b = 2 b - (w * x + b)
        first, second = [], []
        for filters in self.filters.split(together):
            response = F.conv2d(images, filters).add_(self.bias)
            first.append(response.clamp_min(0).mean((2, 3)))
            second.append(response.neg_().add_(start).clamp_min_(0).mean((2, 3)))
        return torch.cat([*first, *second], 1)


def gaussian_filters(
    channels: int, *, count: int = FILTERS, size: int = SIZE, seed: int = 0, seed_zero_unset: bool = False
) -> Tensor:
    """Filters of random convolutional features (RCF), drawn from N(0, 1): float32 (count, channels, size, size).

    Args:
        seed_zero_unset: seed 0 leaves torch's default seed in place, as torchgeo does from 0.5 on.
    """
    generator = torch.Generator()
    if seed or not seed_zero_unset:
        generator.manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


def random_features(preprocess: Preprocess, *, seed: int = 0, count: int = FILTERS, size: int = SIZE) -> RandomConvolutions:
    """RCF: random convolutions with Gaussian filters, 2 * `count` numbers per sample."""
    channels = preprocess.array(image_modality(preprocess)).channels
    filters = gaussian_filters(len(channels), count=count, size=size, seed=seed)
    return RandomConvolutions(preprocess, filters, architecture="rcf")


def draw_places(
    samples: int, height: int, width: int, *, count: int = FILTERS, size: int = SIZE, seed: int = 0, last: bool = True
) -> np.ndarray:
    """Where patches lie: sample, top and left of each, int64 (count, 3), drawn patch by patch.

    Args:
        samples: how many there are, of height x width pixels.
        last: False never draws the last row and column of places that there are, as the study did.
    Raises:
        ValueError: samples smaller than a patch.
    """
    ends = samples, height - size + last, width - size + last
    if min(ends) < 1:
        raise ValueError(f"patches of {size} pixels cannot be drawn from {samples} samples of {height} x {width} pixels")
    rng = np.random.default_rng(seed)
    return np.array([[rng.integers(0, end) for end in ends] for _ in range(count)], dtype=np.int64)


def draw_patches(
    source: Any,
    preprocess: Preprocess,
    *,
    count: int = FILTERS,
    size: int = SIZE,
    seed: int = 0,
    last: bool = True,
    allow: Mapping[str, str] | None = None,
) -> Tensor:
    """Patches of what a contract makes of a source: float32 (count, C, size, size). No sample is read twice.

    Args:
        source: samples of one size after `preprocess`.
        count, size, seed, last: see `draw_places`. allow: see `Preprocess`.
    Raises:
        ValueError: samples of several sizes, or too small.
    """
    modality = image_modality(preprocess)
    images = (_fed(source, index, preprocess, modality, allow) for index in range(len(source)))
    first = next((image for image in images if image is not None), None)
    if first is None:
        raise ValueError(f"source {source.name!r}: none of its {len(source)} samples could be read")
    height, width = first.shape[-2:]
    places = draw_places(len(source), height, width, count=count, size=size, seed=seed, last=last)
    patches = torch.empty(count, first.shape[0], size, size)
    for index in np.unique(places[:, 0]):
        image = _fed(source, int(index), preprocess, modality, allow)
        image = first if image is None else image  # a sample that cannot be read
        if image.shape != first.shape:
            raise ValueError(
                f"source {source.name!r}: samples of {tuple(image.shape[-2:])} and {height, width} pixels; patches are drawn from "
                "one size, so give a contract that resizes"
            )
        for row in np.flatnonzero(places[:, 0] == index):
            _, top, left = places[row]
            patches[row] = image[:, top : top + size, left : left + size]
    return patches


def _fed(source: Any, index: int, preprocess: Preprocess, modality: str, allow: Mapping[str, str] | None = None) -> Tensor | None:
    """What a network is fed of one sample, float32 (C, H, W); None where it cannot be read."""
    try:
        sample = source[index]
    except BadSample:
        return None
    return preprocess(allow=allow, **{modality: sample["image"]})[modality][0]


def whitened(patches: Tensor) -> Tensor:
    """Patches as filters that answer to whitened images: float32 (K, C, h, w) -> the same.

    Each patch loses its mean and gets length 1, rows P. With P'P / K = V diag(e) V' and Z = V diag(e + 0.001)^-1/2 V' the filters
    are P Z Z: one Z whitens the patch, the other the image that it will be held against (Coates and Ng 2012).
    """
    rows = patches.flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    lengths = rows.norm(dim=1, keepdim=True)
    rows = rows / torch.where(lengths < 1e-8, 1.0, lengths)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    twice = (vectors / (values.clamp_min(0) + RIDGE)) @ vectors.T
    return (rows @ twice).float().view_as(patches)


def mosaiks(
    source: Any,
    preprocess: Preprocess,
    *,
    seed: int = 0,
    count: int = FILTERS,
    size: int = SIZE,
    drawn_with: Preprocess | None = None,
    last: bool = True,
    second: Second = "opposite",
    allow: Mapping[str, str] | None = None,
) -> RandomConvolutions:
    """MOSAIKS: convolutions with whitened patches of training data, 2 * `count` numbers per sample.

    Args:
        source: training data. preprocess: what the baseline is fed.
        drawn_with: contract that patches are drawn with, `preprocess` when left out. The study drew them from its data as they come
            out of their files, or normalised but not resized, and held them against resized images.
        last, second, allow: see `draw_places`, `RandomConvolutions` and `Preprocess`.
    """
    patches = draw_patches(source, drawn_with or preprocess, count=count, size=size, seed=seed, last=last, allow=allow)
    return RandomConvolutions(preprocess, whitened(patches), architecture="mosaiks", second=second)


def untrained(architecture: str, preprocess: Preprocess, *, seed: int = 0, **arguments: Any) -> Backbone:
    """A network with the initial weights of a seed."""
    with seeded(seed):
        model = create_model(architecture, **arguments)
    model.preprocess = preprocess
    return model.eval()


BASELINES = ("image-statistics", "rcf", "mosaiks")
SEEDED = ("rcf", "mosaiks")


def baseline(name: str, source: Any, preprocess: Preprocess, *, seed: int = 0, allow: Mapping[str, str] | None = None) -> Baseline:
    """One of `BASELINES`.

    Args:
        source: training data, of which MOSAIKS takes its patches. preprocess: what the baseline is fed.
        seed: of those in `SEEDED`.
    Raises:
        ValueError: unknown name.
    """
    if name not in BASELINES:
        raise ValueError(unknown_name("baseline", name, BASELINES))
    if name == "image-statistics":
        return ImageStatistics(preprocess)
    return random_features(preprocess, seed=seed) if name == "rcf" else mosaiks(source, preprocess, seed=seed, allow=allow)
