"""Multi-crop augmentation (DINO, arXiv 2104.14294; DINOv2, arXiv 2304.07193) in two parts: crops per sample on 8-bit pixels,
colours per batch on tensors, with parameters of its own for each crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from okavango.models.preprocess import IMAGENET_MEAN, IMAGENET_STD

BLUR_KERNEL = 9  # pixels, as in DINO
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits
CHUNK = 2**18  # values that colours work on at a time: they stay in a core's cache


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
            "global" uint8 (2, C, S, S) and "local" uint8 (n, C, L, L).
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
        crops = []
        for i, (draw, zoom, flip) in enumerate(zip(draws, zooms, flips, strict=True)):
            scale, size = (self.global_scale, self.global_size) if i < 2 else (self.local_scale, self.local_size)
            height, width, above, left = self._canvas(image.shape[1], image.shape[2], zoom)
            box = crop_box(height, width, scale, self.ratio, draw)
            box = (box[0] - above, box[1] - left, *box[2:])  # what lies outside the picture is black
            crop = TF.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
            crops.append(crop.flip(-1) if flip < self.flip else crop)
        local = torch.stack(crops[2:]) if self.locals else image.new_empty(0, image.shape[0], self.local_size, self.local_size)
        return {
            "global": torch.stack(crops[:2]).expand(-1, self.channels, -1, -1).contiguous(),
            "local": local.expand(-1, self.channels, -1, -1).contiguous(),
        }

    def _canvas(self, height: int, width: int, draw: list[float]) -> tuple[int, int, int, int]:
        """Height and width of the canvas that is cropped, and the rows above and columns left of the picture on it."""
        probability, greatest = self.zoom_out
        if draw[0] >= probability:
            return height, width, 0, 0
        side = 1 + draw[1] * (greatest - 1)
        more_rows, more_columns = round(height * side) - height, round(width * side) - width
        return height + more_rows, width + more_columns, int(draw[2] * (more_rows + 1)), int(draw[3] * (more_columns + 1))

    def photometric(self, globals: Tensor, locals: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The colour part, of a batch: recolour, jitter in an order drawn for each group of crops, grey, blur, solarise, normalise.

        Args:
            globals: uint8 (2, B, C, S, S).
            locals: uint8 (n, B, C, L, L); n may be 0.
            generator: on the processor.
        Returns:
            float32 (2B, C, S, S) and (nB, C, L, L), crop by crop: all first globals, then all second ones.
        """
        outputs = torch.empty_like(globals, dtype=torch.float32), torch.empty_like(locals, dtype=torch.float32)
        self._colours(globals[0], outputs[0][0], self.blur[0], 0.0, generator)
        self._colours(globals[1], outputs[0][1], self.blur[1], self.solarize, generator)
        self._colours(locals.flatten(0, 1), outputs[1].flatten(0, 1), self.blur[2], 0.0, generator)
        return outputs[0].flatten(0, 1), outputs[1].flatten(0, 1)

    def _colours(self, pixels: Tensor, out: Tensor, blur: float, solarize_share: float, generator: torch.Generator) -> None:
        """(N, C, H, W) uint8 -> normalised float32. All draws come first, so that working in chunks changes nothing."""
        count = len(pixels)

        def chance(probability: float) -> Tensor:
            return torch.rand(count, generator=generator) < probability

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        def around(strength: float) -> Tensor:
            factor = between(max(0.0, 1 - strength), 1 + strength)
            return torch.where(jittered, factor, 1)  # a factor of 1 changes no bit and is cheaper than picking rows

        probability, brightness, contrast, saturation, hue = self.jitter
        recoloured, colours = chance(self.recolour), torch.rand(count, 2, self.channels, generator=generator)
        jittered, everywhere = chance(probability), torch.ones(count, dtype=torch.bool)
        jitters: list[tuple[Callable, Tensor, Tensor]] = [
            (adjust_brightness, everywhere, around(brightness)),
            (adjust_contrast, everywhere, around(contrast)),
            (adjust_saturation, everywhere, around(saturation)),
            (adjust_hue, jittered, between(-hue, hue)),
        ]
        strengths = (brightness, contrast, saturation if self.channels == 3 else 0, hue if self.channels == 3 else 0)
        order = [i for i in torch.randperm(4, generator=generator).tolist() if strengths[i]]
        grey = chance(self.grayscale)
        operations = [
            (recolour, recoloured, colours),
            *(jitters[i] for i in order),
            *([(adjust_saturation, grey, torch.zeros(count))] if self.channels == 3 else []),
            (gaussian_blur, chance(blur), between(*self.blur_sigma)),
            (solarize, chance(solarize_share), torch.full((count,), 128 / 255)),
        ]

        for part in _chunks(count, pixels[:1].numel()):
            values = pixels[part].float().div_(255)
            for operation, chosen, parameters in operations:
                values = _apply_to(values, chosen[part], operation, parameters[part])
            if self.mean:
                values = normalise(values, self.mean, self.std)
            out[part] = values


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


# -- colours: float (N, C, H, W) in 0..1, one parameter per picture; the formulas of torchvision's functions of the same name -----


def adjust_brightness(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply by factor (N,)."""
    return (values * _per_picture(factor)).clamp_(0, 1)


def adjust_contrast(values: Tensor, factor: Tensor) -> Tensor:
    """Blend with the picture's mean luma: factor 0 is flat grey, 1 the picture."""
    return _blend(values, luma(values).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(values: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey picture: factor 0 is grey, 1 the picture. RGB only."""
    return _blend(values, luma(values), factor)


def adjust_hue(values: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by -0.5..0.5 of the colour circle, at equal value and chroma. RGB only."""
    red, green, blue = values.unbind(1)
    value = values.amax(1)
    chroma = value - values.amin(1)
    scale = chroma.clamp_min(1e-12).reciprocal_()
    # in sixths of the circle; red wins over green wins over blue where two are greatest
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue += 6 * turn.view(-1, 1, 1)
    hue -= (hue * (1 / 6)).floor_().mul_(6)
    out = torch.empty_like(values)
    for channel, centre in enumerate((3, -1, 1)):
        # a channel is the value less a share of the chroma; the share is a trapezium around the colour opposite to the channel
        share = (hue - centre).abs_() if channel == 0 else (hue - centre - 3).abs_().neg_().add_(3).abs_()
        share.neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, share, chroma, value=-1, out=out[:, channel])
    return out


def gaussian_blur(values: Tensor, sigma: Tensor) -> Tensor:
    """Blur by sigma (N,) pixels, separably, edges mirrored; 9 taps, fewer where the picture is smaller than 5 pixels."""
    for axis in (-2, -1):
        size = values.shape[axis]
        reach = min(BLUR_KERNEL // 2, size - 1)
        taps = torch.arange(reach + 1, dtype=torch.float32, device=values.device)
        weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
        weights = weights / (2 * weights.sum(1, keepdim=True) - 1)
        padded = F.pad(values, (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0), mode="reflect")
        # the kernel is symmetric: sums of shifted pictures need half the products of a convolution
        values = padded.narrow(axis, reach, size) * _per_picture(weights[:, 0])
        for tap in range(1, reach + 1):
            pair = padded.narrow(axis, reach - tap, size) + padded.narrow(axis, reach + tap, size)
            values.addcmul_(pair, _per_picture(weights[:, tap]))
    return values


def solarize(values: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values that reach the threshold (N,)."""
    return torch.where(values >= _per_picture(threshold), 1 - values, values)


def recolour(values: Tensor, colours: Tensor) -> Tensor:
    """Map black to the first and white to the second of two colours (N, 2, C), in 0..1."""
    back, front = colours[:, 0, :, None, None], colours[:, 1, :, None, None]
    return torch.addcmul(back, luma(values), front - back)


def normalise(values: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(values - mean) / std per channel, in place."""
    shape = (-1, 1, 1)
    return values.sub_(values.new_tensor(mean).view(shape)).div_(values.new_tensor(std).view(shape))


def luma(values: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W); a grey picture is its own."""
    if values.shape[1] == 1:
        return values
    red, green, blue = values.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _blend(values: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_picture(factor)
    return torch.addcmul(other * (1 - factor), values, factor).clamp_(0, 1)


def _per_picture(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1, 1, 1, 1)


def _apply_to(values: Tensor, chosen: Tensor, operation: Callable, parameters: Tensor) -> Tensor:
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return values
    parameters, rows = parameters[rows].to(values.device), rows.to(values.device)
    if len(rows) == len(values):
        return operation(values, parameters)
    values[rows] = operation(values[rows], parameters)
    return values


def _chunks(count: int, values_each: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, values_each))
    return (slice(start, start + step) for start in range(0, count, step))
