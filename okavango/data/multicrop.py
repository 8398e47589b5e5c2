"""Multi-crop augmentation (DINO, arXiv 2104.14294; DINOv2, arXiv 2304.07193) on 8-bit pixels, in two parts: crops per sample, then
colours, with parameters and an order of their own for each crop. As in the published pipelines, which work on PIL pictures, the
result of every operation is rounded to 8 bits; the last one makes floating-point numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from okavango.models.preprocess import IMAGENET_MEAN, IMAGENET_STD

BLUR_KERNEL = 9  # pixels, as in DINO
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601

cv2.setNumThreads(0)  # a crop is too small to share, and workers are forked: a pool of threads would not live on in them


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Two global and several local crops of each picture, colours jittered. All randomness comes from the generators given.

    Attributes:
        global_size, local_size: sides of the crops in pixels; locals: local crops per picture.
        global_scale, local_scale: least and greatest area of a crop over the area of the picture.
        ratio: least and greatest aspect ratio of a crop before it is resized.
        zoom_out: probability that a crop is cut from a larger black canvas that holds the picture at a random place (for objects on
            black), and the greatest side of that canvas over the side of the picture; uniform from 1.
        flip: probability of a horizontal flip, drawn for each crop.
        jitter: probability, then strengths of brightness, contrast, saturation (factors 1 - s .. 1 + s) and hue (turns -h .. h).
        grayscale: probability of a grey crop.
        blur: probability of Gaussian blur for the first global, the second global and the local crops; blur_sigma: its standard
            deviation in pixels.
        solarize: probability that bright values (128 and more of 255) of the second global crop are inverted.
        recolour: probability that black..white becomes background..foreground, two uniformly drawn colours (for grey pictures).
        mean, std: per channel, of values in 0..1; empty leaves 0..1.
        channels: 1 or 3, what the crops have; grey pictures are repeated, RGB pictures turned to grey.
    """

    global_size: int = 224
    local_size: int = 96
    locals: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    zoom_out: tuple[float, float] = (0.0, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float, float] = (0.8, 0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.2
    recolour: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: int = 3

    def __post_init__(self):
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} {low, high}: expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio}: expected 0 < low <= high")
        for name in ("flip", "grayscale", "solarize", "recolour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected a probability 0..1")
        if not 0 <= self.zoom_out[0] <= 1 <= self.zoom_out[1]:
            raise ValueError(f"zoom_out {self.zoom_out}: expected a probability 0..1 and a side of at least 1")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma {self.blur_sigma}: expected 0 < low <= high pixels")
        if not 0 <= self.jitter[4] <= 0.5:
            raise ValueError(f"hue jitter {self.jitter[4]}: expected 0..0.5 turns")
        if self.channels not in (1, 3):
            raise ValueError(f"{self.channels} channels: multi-crop knows grey (1) and RGB (3)")
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.channels):
            raise ValueError(f"mean {self.mean} and std {self.std}: expected {self.channels} numbers each, or none")
        if self.global_size < 1 or self.local_size < 1 or self.locals < 0:
            raise ValueError("crop sizes must be at least 1 and their number at least 0")

    def crop(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The geometric part, of one picture.

        Args:
            image: uint8 (1 or 3, H, W), of any size.
            generator: moved on by the same amount whatever the picture.
        Returns:
            "global" uint8 (2, S, S, C) and "local" uint8 (n, L, L, C); channels last, as they are decoded, resized and coloured.
        Raises:
            ValueError: another number of channels or dtype.
        """
        if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype != torch.uint8:
            raise ValueError(f"multi-crop takes uint8 (1 or 3, H, W) pictures, got {image.dtype} {tuple(image.shape)}")
        if image.shape[0] > self.channels:
            image = TF.rgb_to_grayscale(image)
        draws = torch.rand(2 + self.locals, 10, 4, generator=generator, dtype=torch.float64).tolist()
        zooms = torch.rand(2 + self.locals, 4, generator=generator, dtype=torch.float64).tolist()
        flips = torch.rand(2 + self.locals, generator=generator).tolist()
        channels = image.shape[0]
        done = {
            "global": np.empty((2, self.global_size, self.global_size, channels), np.uint8),
            "local": np.empty((self.locals, self.local_size, self.local_size, channels), np.uint8),
        }
        results = [*done["global"], *done["local"]]
        for i, (draw, zoom, flip, result) in enumerate(zip(draws, zooms, flips, results, strict=True)):
            height, width, above, left = self._canvas(image.shape[1], image.shape[2], zoom)
            rows, columns, tall, wide = crop_box(height, width, self.global_scale if i < 2 else self.local_scale, self.ratio, draw)
            crop = _cut(image, rows - above, columns - left, tall, wide)
            # torch resizes 8-bit pixels fast where they lie whole in memory, channels last
            crop = crop.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
            pixels = F.interpolate(crop, result.shape[0], mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
            result[...] = cv2.flip(pixels, 1).reshape(result.shape) if flip < self.flip else pixels
        return {name: torch.from_numpy(crops).expand(-1, -1, -1, self.channels).contiguous() for name, crops in done.items()}

    def _canvas(self, height: int, width: int, draw: list[float]) -> tuple[int, int, int, int]:
        """Height and width of the canvas that is cropped, and the rows above and columns left of the picture on it."""
        probability, greatest = self.zoom_out
        if draw[0] >= probability:
            return height, width, 0, 0
        side = 1 + draw[1] * (greatest - 1)
        more_rows, more_columns = round(height * side) - height, round(width * side) - width
        return height + more_rows, width + more_columns, int(draw[2] * (more_rows + 1)), int(draw[3] * (more_columns + 1))

    def photometric(self, globals: Tensor, locals: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The colour part, of a batch: recolour, jitter in an order drawn for each crop, grey, blur, solarise, normalise.

        Args:
            globals: uint8 (2, B, S, S, C).
            locals: uint8 (n, B, L, L, C); n may be 0.
            generator: on the processor.
        Returns:
            float32 (2B, C, S, S) and (nB, C, L, L), crop by crop: all first globals, then all second ones.
        """
        outputs = [torch.empty(*x.shape[:2], x.shape[4], *x.shape[2:4]) for x in (globals, locals)]
        self._colours(globals[0], outputs[0][0], self.blur[0], 0.0, generator)
        self._colours(globals[1], outputs[0][1], self.blur[1], self.solarize, generator)
        self._colours(locals.flatten(0, 1), outputs[1].flatten(0, 1), self.blur[2], 0.0, generator)
        return outputs[0].flatten(0, 1), outputs[1].flatten(0, 1)

    def _colours(self, pixels: Tensor, out: Tensor, blur: float, solarize_share: float, generator: torch.Generator) -> None:
        """(N, S, S, C) uint8 -> normalised float32 (N, C, S, S)."""
        count = len(pixels)

        def chance(probability: float) -> list[bool]:
            return (torch.rand(count, generator=generator) < probability).tolist()

        def between(low: float, high: float) -> list[float]:
            return (low + (high - low) * torch.rand(count, generator=generator)).tolist()

        probability, *strengths, hue = self.jitter
        recoloured, colours = chance(self.recolour), torch.rand(count, 2, self.channels, generator=generator).numpy()
        jittered, orders = chance(probability), torch.rand(count, 4, generator=generator).argsort(dim=1, stable=True).tolist()
        factors = [*(between(max(0.0, 1 - strength), 1 + strength) for strength in strengths), between(-hue, hue)]
        grey, blurred, sigmas = chance(self.grayscale), chance(blur), between(*self.blur_sigma)
        solarized = chance(solarize_share)
        jitters = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        wanted = [i for i in range(4 if self.channels == 3 else 2) if self.jitter[1 + i]]  # grey has neither saturation nor hue
        tables = normalised(self.mean, self.std, self.channels)

        for i, (crop, result) in enumerate(zip(pixels.numpy(), out.numpy(), strict=True)):
            if recoloured[i]:
                crop = recolour(crop, *colours[i])
            for jitter in orders[i] if jittered[i] else ():
                if jitter in wanted:
                    crop = jitters[jitter](crop, factors[jitter][i])
            if grey[i]:
                crop = grey_of(crop)
            if blurred[i]:
                crop = gaussian_blur(crop, sigmas[i])
            if solarized[i]:
                crop = solarize(crop)
            for plane, table, channel in zip(cv2.split(crop), tables, result, strict=True):
                cv2.LUT(plane, table, dst=channel)


def _cut(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A part of (C, H, W); what lies outside the picture is black."""
    if top >= 0 and left >= 0 and top + height <= image.shape[1] and left + width <= image.shape[2]:
        return image[:, top : top + height, left : left + width]
    return TF.crop(image, top, left, height, width)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: list[list[float]]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, in the distribution of torchvision's `RandomResizedCrop`.

    Args:
        height, width: of the picture.
        scale: bounds of the area share, uniform; ratio: bounds of width / height, log-uniform.
        draws: per attempt four numbers in [0, 1): area, aspect, top, left. When no attempt fits, the centre is taken, with the
            aspect ratio held within its bounds.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area, aspect, top, left in draws:
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        root = math.exp((log_low + aspect * (log_high - log_low)) / 2)
        w, h = round(math.sqrt(target) * root), round(math.sqrt(target) / root)
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w, h = max(1, min(width, round(height * ratio[1]))), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


# -- colours: uint8 (H, W, 3), or (H, W, 1) and (H, W) of grey; torchvision's functions of the same name, rounded to 8 bits -------


def adjust_brightness(pixels: ndarray, factor: float) -> ndarray:
    """Multiply by a factor."""
    return cv2.convertScaleAbs(pixels, alpha=factor)


def adjust_contrast(pixels: ndarray, factor: float) -> ndarray:
    """Blend with the picture's mean luma: factor 0 is flat grey, 1 the picture."""
    means = cv2.mean(pixels)
    mean = sum(weight * mean for weight, mean in zip(LUMA, means, strict=False)) if pixels.shape[2:] == (3,) else means[0]
    return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * mean)


def adjust_saturation(pixels: ndarray, factor: float) -> ndarray:
    """Blend with the grey picture: factor 0 is grey, 1 the picture."""
    if pixels.shape[2:] != (3,):
        return pixels
    mixing = np.full((3, 3), LUMA, np.float32) * (1 - factor) + np.eye(3, dtype=np.float32) * factor
    return cv2.transform(pixels, mixing.astype(np.float32))


def grey_of(pixels: ndarray) -> ndarray:
    """The grey picture, with as many channels."""
    return cv2.cvtColor(luma(pixels), cv2.COLOR_GRAY2RGB) if pixels.shape[2:] == (3,) else pixels


def adjust_hue(pixels: ndarray, turn: float) -> ndarray:
    """Turn the hue by -0.5..0.5 of the colour circle, in steps of 1/256, at equal value and chroma. RGB only."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # runs over, as the circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(pixels: ndarray, sigma: float) -> ndarray:
    """Blur by sigma pixels, with up to 9 x 9 taps, those beyond 4 sigma left out; edges are mirrored."""
    kernel = cv2.getGaussianKernel(min(BLUR_KERNEL, 2 * math.ceil(4 * sigma) + 1), sigma, cv2.CV_32F)
    return cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)  # faster and finer than cv2.GaussianBlur


def solarize(pixels: ndarray) -> ndarray:
    """Invert the values that reach 128."""
    return np.minimum(pixels, 255 - pixels)


def recolour(pixels: ndarray, back: ndarray, front: ndarray) -> ndarray:
    """Map black to the first and white to the second of two colours (C,), in 0..1."""
    shades = back + (front - back) * np.linspace(0, 1, 256)[:, None]
    return np.rint(shades * 255).astype(np.uint8)[luma(pixels)]


def normalised(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> ndarray:
    """(v / 255 - mean) / std of the 256 values v, float32 (C, 256); without mean, v / 255."""
    centre, spread = np.reshape(mean or (0,) * channels, (-1, 1)), np.reshape(std or (1,) * channels, (-1, 1))
    return ((np.arange(256) / 255 - centre) / spread).astype(np.float32)


def luma(pixels: ndarray) -> ndarray:
    """(H, W), ITU-R 601; a grey picture is its own."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.shape[2:] == (3,) else pixels.reshape(pixels.shape[:2])
