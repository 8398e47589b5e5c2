"""Pictures to descriptors: what a backbone makes of them, or one of two baselines that know nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from okavango.data.loading import derive
from okavango.data.sources import Source
from okavango.downstream.classification.features import evaluating, image_modality, read_batches
from okavango.downstream.retrieval.head import descriptors
from okavango.downstream.retrieval.store import DescriptorStore, content_key
from okavango.models.backbone import Backbone
from okavango.models.features import Features, Subnet, to_device


class Describer(Protocol):
    """Turns pictures into descriptors.

    Attributes:
        digest: follows from everything that the descriptors depend on besides the pictures.
        upsampled: where local descriptors lie; see `cell_centres`.
    """

    digest: str
    upsampled: bool

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """uint8 (C, H, W) each -> global (B, D), and local (B, H, W, C) or None, of unit length."""
        ...


class BackboneDescriber:
    """`Features.pooled` of unit length; local descriptors are those that the backbone was adapted to, or its patch features.

    Args:
        backbone: run in eval mode, where it is.
        subnet: of an elastic backbone.
        local: whether local descriptors are wanted.
    Raises:
        ValueError: at the first pictures, where the backbone does not pool, or has no patch features and they are wanted.
    """

    def __init__(self, backbone: Backbone, *, subnet: Subnet | None = None, local: bool = False):
        self.backbone, self.subnet, self.local = backbone, subnet, local
        self.modality = image_modality(backbone.preprocess)
        self.device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
        hasher = hashlib.sha256(json.dumps([backbone.preprocess.to_json(), str(subnet or ""), local], sort_keys=True).encode())
        for name, tensor in sorted(backbone.state_dict().items()):
            hasher.update(name.encode())
            hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.digest = hasher.hexdigest()
        self.upsampled = getattr(backbone, "local", None) is not None

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        inputs = to_device(self.backbone.preprocess(**{self.modality: list(images)}), self.device)
        with evaluating(self.backbone), torch.inference_mode():
            features = self.backbone(inputs, subnet=self.subnet)
            pooled, local = descriptors(self.backbone, features)
            if self.local and local is None:
                local = self._patches(features)
        return pooled.float(), local.float() if self.local and local is not None else None

    def _patches(self, features: Features) -> Tensor:
        """Patch features, or the coarsest feature map, of unit length: (B, H, W, C)."""
        tokens, grid = features.tokens.get(self.modality), features.grid.get(self.modality)
        if tokens is not None and grid is not None and len(grid) == 2:
            return F.normalize(tokens, dim=-1).unflatten(1, grid)
        if features.maps:
            return F.normalize(features.maps[-1].permute(0, 2, 3, 1), dim=-1)
        raise ValueError(f"{type(self.backbone).__name__} has neither patch features nor maps; re-ranking needs local descriptors")


class Thumbnail:
    """Grey pictures of `side` x `side` pixels without their mean, of unit length."""

    upsampled = False

    def __init__(self, side: int = 16):
        self.side, self.digest = side, f"thumbnail {side} version 1"

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        grey = [image if len(image) == 1 else TF.rgb_to_grayscale(image) for image in images]
        small = torch.stack([TF.resize(image.float(), [self.side, self.side], antialias=True) for image in grey])
        flat = small.flatten(1)
        return F.normalize(flat - flat.mean(1, keepdim=True), dim=1), None


class Chance:
    """Random vectors, each drawn from its picture's content: what nothing at all finds."""

    upsampled = False

    def __init__(self, width: int = 256, seed: int = 0):
        self.width, self.seed, self.digest = width, seed, f"chance {width} seed {seed} version 1"

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        rows = [
            np.random.Generator(np.random.Philox(derive(self.seed, content_key(image).hex()))).normal(size=self.width)
            for image in images
        ]
        return F.normalize(torch.from_numpy(np.stack(rows)).float(), dim=1), None


BASELINES = {"thumbnail": Thumbnail, "chance": Chance}  # names that stand where a checkpoint could


@dataclass(frozen=True, eq=False)
class Described:
    """The pictures of a source that could be read, by their keys in a store; rows are numbered in the order of the source.

    Attributes:
        store: holds the descriptors; keys: per row; ids: names, per row.
        index: int64, number in the source, per row.
        bad: (number in the source, reason) of the others.
        seconds: of the whole pass; computed: pictures that were not in the store before.
    """

    store: DescriptorStore
    keys: list[bytes]
    ids: list[str]
    index: np.ndarray
    bad: list[tuple[int, str]]
    seconds: float
    computed: int

    def __len__(self) -> int:
        return len(self.keys)

    def pooled(self, rows: slice = slice(None)) -> np.ndarray:
        """Global descriptors, float32 (n, D)."""
        return self.store.pooled(self.keys[rows])

    def local(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Local descriptors, float32 (n, H, W, C)."""
        return self.store.local([self.keys[row] for row in rows])


def describe_source(
    describer: Describer, source: Source, store: DescriptorStore, *, batch: int = 32, workers: int = 0
) -> Described:
    """Describe every picture of a source that the store does not hold yet.

    Args:
        batch: pictures per forward pass; workers: processes that read pictures, 0 reads here.
    Raises:
        ValueError: no picture could be read.
    """
    began = time.perf_counter()
    known = len(store)
    keys: list[bytes] = []
    ids: list[str] = []
    index: list[int] = []
    bad: list[tuple[int, str]] = []
    for first, samples in zip(count(0, batch), read_batches(source, batch, workers, _with_keys), strict=False):
        good = [(number, *sample) for number, sample in enumerate(samples, first) if len(sample) == 3]
        bad += [sample for sample in samples if len(sample) == 2]
        new = {key: image for _, _, key, image in good if key not in store}
        if new:
            store.add(list(new), *describer(list(new.values())))
        keys += [key for _, _, key, _ in good]
        ids += [id for _, id, _, _ in good]
        index += [number for number, _, _, _ in good]
    store.flush()
    if not keys:
        raise ValueError(f"source {source.name!r}: none of its {len(source)} pictures could be read; the first one: {bad[0][1]}")
    seconds = time.perf_counter() - began
    return Described(store, keys, ids, np.array(index, np.int64), bad, seconds, len(store) - known)


def described(
    describer: Describer, source: Source, *, batch: int = 32, workers: int = 0, bad: list[tuple[int, str]]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and global descriptors, float32 (B, D), batch by batch; nothing is kept.

    Args:
        bad: receives (number in the source, reason) of pictures that cannot be read.
    """
    for samples in read_batches(source, batch, workers):
        good = [sample for sample in samples if isinstance(sample, dict)]
        bad += [sample for sample in samples if not isinstance(sample, dict)]
        if good:
            yield [sample["id"] for sample in good], describer([sample["image"] for sample in good])[0].cpu().numpy()


def _with_keys(samples: Sequence[Any]) -> list[tuple]:
    """(id, key, image) of each picture; (index, reason) of those that could not be read stays."""
    return [(s["id"], content_key(s["image"]), s["image"]) if isinstance(s, dict) else s for s in samples]


def cell_centres(height: int, width: int, *, upsampled: bool) -> np.ndarray:
    """Where the cells of a local map lie in their picture, as shares of its width and height: float64 (H * W, 2), x before y.

    Args:
        height, width: of the map.
        upsampled: by SelaVPR's two up-convolutions, of kernel 3, stride 2 and padding 1: then g patches became 4 g - 3 cells, and
            cell o sits on patch coordinate o / 4. Otherwise cells tile the picture.
    """

    def along(cells: int) -> np.ndarray:
        return (np.arange(cells) / 4 + 0.5) * 4 / (cells + 3) if upsampled else (np.arange(cells) + 0.5) / cells

    y, x = np.meshgrid(along(height), along(width), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], 1)
