"""How pictures of places are changed while they are learned: settings as data, a change as a pure function of a seed.

Nothing is mirrored: a place and its mirror image are two places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Views:
    """Other light, another zoom, another angle; by default none of them, as published."""

    jitter: tuple[float, float, float, float, float] = (0.0, 0.4, 0.4, 0.2, 0.05)
    """probability of other colours; strengths of brightness, contrast, saturation (factors 1 - s .. 1 + s) and hue (turns)"""
    crop: float = 1.0
    """least share of the picture that a random crop of its shape keeps, 1 for none"""
    perspective: float = 0.0
    """how far each corner may move inwards, as a share of half the picture, 0 for not at all"""

    def __post_init__(self):
        probability, *strengths, hue = self.jitter
        if not 0 <= probability <= 1 or min(strengths) < 0 or not 0 <= hue <= 0.5:
            raise ValueError(f"views: jitter {self.jitter}; expected a probability 0..1, three strengths from 0, a hue 0..0.5")
        if not 0 < self.crop <= 1 or not 0 <= self.perspective < 1:
            raise ValueError(
                f"views: crop {self.crop}, perspective {self.perspective}; expected 0 < crop <= 1 and 0 <= perspective < 1"
            )

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.jitter[0] or self.crop < 1 or self.perspective)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """A picture as it might have been taken, too.

        Args:
            image: uint8 (1 or 3, H, W).
            seed: of all draws; the same number of them whatever the settings.
        Returns:
            of the same shape and dtype.
        """
        import cv2
        import numpy as np
        import torch

        from okavango.data import multicrop

        draws = torch.rand(18, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        height, width = pixels.shape[:2]
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
        seen = corners.copy()
        if self.perspective:
            inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * np.array([width, height]) / 2
            seen += self.perspective * inwards * np.reshape(draws[:8], (4, 2))
        if self.crop < 1:
            side = (self.crop + draws[8] * (1 - self.crop)) ** 0.5
            seen = seen * side + np.array([width, height]) * (1 - side) * draws[9:11]
        if self.perspective or self.crop < 1:
            turn = cv2.getPerspectiveTransform(seen.astype(np.float32), corners.astype(np.float32))
            pixels = cv2.warpPerspective(pixels, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        probability, *strengths, hue = self.jitter
        if draws[11] < probability:
            changes = (multicrop.adjust_brightness, multicrop.adjust_contrast, multicrop.adjust_saturation)
            for change, strength, draw in zip(changes, strengths, draws[12:15], strict=True):
                pixels = change(pixels, 1 + strength * (2 * draw - 1))
            if hue and len(image) == 3:
                pixels = multicrop.adjust_hue(pixels, hue * (2 * draws[15] - 1))
        return torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1)
