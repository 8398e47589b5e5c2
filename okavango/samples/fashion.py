"""Fashion-MNIST, the sample that ships: 10000 training and 2000 test pictures, and a harder view of any source, `moved`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from okavango.data.sources import Shards, Source

FOLDER = Path(__file__).parent / "fashion"


def fashion(split: str = "train") -> Source:
    """Grey 28x28 pictures of ten kinds of clothes (Xiao et al., arXiv:1708.07747), a tenth (fifth) of the original per class.

    Args:
        split: "train" (10000), "test" (2000), or "moved": the test pictures, moved, scaled and recoloured (see `moved`).
    Raises:
        ValueError: another split.
    """
    if split == "moved":
        return moved(fashion("test"))
    if split not in ("train", "test"):
        raise ValueError(f"samples/fashion has the splits train, test and moved, not {split!r}")
    source = Shards(FOLDER / f"{split}-*.tar")
    source.name = f"fashion-{split}"
    return source


def moved(source: Source, seed: int = 0, size: int = 28) -> Moved:
    """The same pictures moved, scaled and recoloured: raw pixels no longer tell the classes, an invariant model still can.

    For each sample, drawn from (seed, index) alone:

    * scale: uniform 0.6..1.0; the picture becomes round(scale * size) pixels high and wide (bilinear, low-passed);
    * position: uniform over all places where it fits into the size x size canvas;
    * colour: the grey value v in 0..1 becomes background + v * (foreground - background), both uniform in RGB 0..255, drawn again
      until their luma (0.299 R + 0.587 G + 0.114 B) differs by at least 64. So in half of the pictures the object is darker.

    Args:
        source: pictures of an object on black; RGB is turned to grey first.
        seed: names the protocol's draw.
        size: side of the canvas in pixels.
    """
    return Moved(source, seed, size)


@dataclass(eq=False)
class Moved:
    """What `moved` returns: a source of uint8 (3, size, size) pictures with the labels of the one behind it."""

    source: Source
    seed: int
    size: int
    name: str = field(init=False)
    classes: tuple[str, ...] = field(init=False)
    labels: np.ndarray | None = field(init=False, repr=False)

    def __post_init__(self):
        self.name = f"{self.source.name}-moved{self.seed}"
        self.classes, self.labels = self.source.classes, self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.source.digest} moved seed {self.seed} size {self.size} version 1".encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.source[index]
        # Philox is counter-based and keyed: cheap to start anew for each sample
        random = np.random.Generator(np.random.Philox(key=[self.seed, index % len(self)]))
        side = max(1, round(random.uniform(0.6, 1.0) * self.size))
        top, left = random.integers(0, self.size - side + 1, 2)
        front, back = _two_colours(random)
        grey = TF.rgb_to_grayscale(sample["image"])
        small = TF.resize(grey, [side, side], InterpolationMode.BILINEAR, antialias=True)
        canvas = torch.zeros(1, self.size, self.size)
        canvas[:, top : top + side, left : left + side] = small / 255
        image = (back + canvas * (front - back)).round().to(torch.uint8)
        return {**sample, "image": image}


def _two_colours(random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    while True:
        front, back = random.uniform(0, 255, (2, 3))
        if abs((front - back) @ (0.299, 0.587, 0.114)) >= 64:
            return torch.tensor(front).float().view(3, 1, 1), torch.tensor(back).float().view(3, 1, 1)
