"""Applies an input spec to arrays: the part of `preprocess` that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Picture
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from okavango.models.preprocess import Image, Normalise, PreprocessError, Resize

_MODES = {mode: getattr(TF.InterpolationMode, mode.upper()) for mode in ("nearest", "bilinear", "bicubic")}
_RGB = ("red", "green", "blue")


@singledispatch
def apply(spec, value: Any, name: str) -> Any:
    """Raw input -> batch of tensors; one implementation per kind of spec."""
    raise PreprocessError(f"modality {name!r}: no reader for {type(spec).__name__} inputs is installed")


@apply.register
def _(spec: Image, value: Any, name: str) -> Tensor:
    samples = list(value) if _is_batch(value) else [value]
    if not samples:
        raise PreprocessError(f"modality {name!r}: the list of samples is empty")
    done = images_to_tensors(spec, [to_chw(sample, spec, name) for sample in samples])
    if len({tuple(tensor.shape) for tensor in done}) > 1:
        raise PreprocessError(
            f"modality {name!r}: samples have sizes {sorted({tuple(t.shape[-2:]) for t in done})} and the resize rule is "
            f"{spec.resize.rule!r}; pass them one by one or set a resize rule"
        )
    return torch.stack(done)


def _is_batch(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 4)


def to_chw(sample: Any, spec: Image, name: str = "image") -> Tensor:
    """One picture (PIL, numpy HWC or HW, tensor CHW) -> tensor (C, H, W) with the spec's channels in its order."""
    if isinstance(sample, Tensor):
        pixels = sample if sample.ndim == 3 else sample[None]
    else:
        if isinstance(sample, Picture.Image):
            if sample.mode.startswith(("I", "F")):  # `convert` would cut 16-bit values off at 255
                raise PreprocessError(f"modality {name!r}: a picture of mode {sample.mode!r}; convert it to L or RGB first")
            sample = sample if sample.mode in ("L", "RGB", "RGBA") else sample.convert("RGB")
        sample = np.asarray(sample)
        if sample.ndim not in (2, 3) or sample.dtype.kind not in "biuf":
            raise PreprocessError(f"modality {name!r}: expected (H, W) or (H, W, C) arrays, got {sample.dtype} {sample.shape}")
        pixels = torch.from_numpy(np.array(sample[None] if sample.ndim == 2 else sample.transpose(2, 0, 1), order="C"))
    if pixels.ndim != 3:
        raise PreprocessError(f"modality {name!r}: expected (C, H, W) tensors, got {tuple(sample.shape)}")
    if not pixels.numel():
        raise PreprocessError(f"modality {name!r}: the picture is empty, its shape is {tuple(sample.shape)}")
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise PreprocessError(f"modality {name!r}: values are {pixels.dtype}; expected uint8 0..255 or floats in the same units")
    if pixels.is_floating_point() and spec.scale < 0.1:
        low, high = float(pixels.min()), float(pixels.max())
        if low < -0.5 or 0 < high <= 1:
            raise PreprocessError(
                f"modality {name!r}: values {low:.2f}..{high:.2f} look scaled or normalised already; expected 0..255"
            )
    want, have = len(spec.channels), len(pixels)
    if have != want and want in (1, 3) and have in (2, 4):
        pixels, have = pixels[:-1], have - 1  # alpha
    if have == 1 and want == 3:
        return pixels.expand(3, -1, -1)
    if have == 3 and want == 1:
        return TF.rgb_to_grayscale(pixels)
    if have != want:
        raise PreprocessError(f"modality {name!r}: {have} channels, but this checkpoint expects {want}: {', '.join(spec.channels)}")
    if spec.channels != _RGB and set(spec.channels) == set(_RGB):
        pixels = pixels[[_RGB.index(channel) for channel in spec.channels]]
    return pixels


def images_to_tensors(spec: Image, pictures: Sequence[Tensor]) -> list[Tensor]:
    """Each (C, H, W) in stored units -> float32 (C, h, w), resized, scaled and normalised as the spec says."""
    if spec.resize.on == "native":
        pictures = [resize_to(pixels, spec.size, spec.resize) for pixels in pictures]
    values = [pixels.float() * spec.scale + spec.offset for pixels in pictures]
    if spec.normalise.batch_dependent:  # all cells of a channel in one row
        joined = normalise(torch.cat([value.flatten(1) for value in values], 1), spec.normalise)
        parts = joined.split([value[0].numel() for value in values], 1)
        values = [part.view_as(value) for part, value in zip(parts, values, strict=True)]
    else:
        values = [normalise(value, spec.normalise) for value in values]
    return [resize_to(value, spec.size, spec.resize) for value in values] if spec.resize.on == "normalised" else values


def resize_to(pixels: Tensor, size: Sequence[int], rule: Resize) -> Tensor:
    """Bring (C, H, W) to `size` by the rule; uint8 stays uint8."""
    height, width = pixels.shape[-2:]
    if rule.rule == "none":
        if height % rule.multiple_of or width % rule.multiple_of:
            raise PreprocessError(f"input of {height}x{width} pixels: both sides must be multiples of {rule.multiple_of}")
        return pixels
    # Rounded down, as torchvision, timm and open_clip do; the small number undoes what the division lost.
    target = [int(side / rule.crop_ratio + 1e-6) for side in size]
    if rule.rule == "shortest":
        factor = max(target[0] / height, target[1] / width)
        target = [max(target[0], int(height * factor + 1e-6)), max(target[1], int(width * factor + 1e-6))]
    elif rule.rule == "pad":
        factor = min(size[0] / height, size[1] / width)
        target = [max(1, round(height * factor)), max(1, round(width * factor))]
    if rule.rule != "crop" and [height, width] != target:
        pixels = _interpolate(pixels, target, rule)
    short = [max(0, want - have) for have, want in zip(pixels.shape[-2:], size, strict=True)]
    if any(short):
        top, left = short[0] // 2, short[1] // 2
        pixels = F.pad(pixels, (left, short[1] - left, top, short[0] - top), value=rule.fill)
    return TF.center_crop(pixels, list(size))


def _interpolate(pixels: Tensor, size: list[int], rule: Resize) -> Tensor:
    if rule.interpolation == "lanczos":  # torch has none; PIL takes single channels of 8 bits or float32
        planes = pixels.cpu() if pixels.dtype == torch.uint8 else pixels.cpu().float()
        resized = [Picture.fromarray(plane.numpy()).resize((size[1], size[0]), Picture.Resampling.LANCZOS) for plane in planes]
        return torch.stack([torch.from_numpy(np.array(plane)) for plane in resized]).to(pixels.device)
    if rule.interpolation == "area" or (rule.corners == "aligned" and rule.interpolation != "nearest"):
        options = {} if rule.interpolation == "area" else {"align_corners": True, "antialias": rule.antialias}
        out = F.interpolate(pixels[None].float(), size=size, mode=rule.interpolation, **options)[0]
        return out if pixels.is_floating_point() else out.round().clamp(0, 255).to(pixels.dtype)
    return TF.resize(pixels, size, _MODES[rule.interpolation], antialias=rule.antialias)


def normalise(values: Tensor, rule: Normalise) -> Tensor:
    """Standardise (C, ...) values; see `Normalise` for the rules."""
    shape = (-1,) + (1,) * (values.ndim - 1)

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=values.dtype, device=values.device).view(shape)

    if rule.rule in ("minmax", "stretch"):
        values = (values - column(rule.low)) / (column(rule.high) - column(rule.low))
    elif rule.rule == "percentile":
        shares = torch.tensor(rule.percentiles or (2.0, 98.0), dtype=values.dtype, device=values.device) / 100
        low, high = (bound.view(shape) for bound in torch.quantile(values.flatten(1), shares, dim=1))
        values = (values - low) / (high - low).clamp_min(1e-12)
    elif rule.rule in ("zscore", "zscore_nonzero"):
        present = values != 0 if rule.rule == "zscore_nonzero" else torch.ones_like(values, dtype=torch.bool)
        count = present.flatten(1).sum(1).clamp_min(1)
        # Summed in float64, so that the mean of a constant channel is that constant.
        mean = (values.flatten(1).sum(1, dtype=torch.float64) / count).to(values.dtype).view(shape)
        deviation = (values - mean).mul_(present)
        std = torch.linalg.vector_norm(deviation.flatten(1), dim=1).div_(count.sqrt()).view(shape)
        values = deviation.div_(std.clamp_min(1e-12))
    if rule.rule in ("stretch", "percentile"):
        values = values.clamp(0, 1)
        if rule.quantise:
            values = (values * (rule.quantise - 1)).floor() / (rule.quantise - 1)
    if rule.mean:
        values = (values - column(rule.mean)) / column(rule.std)
    return values if rule.clip is None else values.clamp(*rule.clip)
