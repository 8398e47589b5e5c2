"""Applies an input spec to arrays: the part of `preprocess` that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from okavango.models.preprocess import Image, Normalise, PreprocessError, Resize

_MODES = {mode: getattr(TF.InterpolationMode, mode.upper()) for mode in ("nearest", "bilinear", "bicubic", "lanczos")}


@singledispatch
def apply(spec, value: Any, name: str) -> Any:
    """Raw input -> batch of tensors; one implementation per kind of spec."""
    raise PreprocessError(f"modality {name!r}: no reader for {type(spec).__name__} inputs is installed")


@apply.register
def _(spec: Image, value: Any, name: str) -> Tensor:
    samples = list(value) if _is_batch(value) else [value]
    if not samples:
        raise PreprocessError(f"modality {name!r}: the list of samples is empty")
    done = [image_to_tensor(spec, to_chw(sample, spec, name)) for sample in samples]
    if len({tuple(tensor.shape) for tensor in done}) > 1:
        raise PreprocessError(
            f"modality {name!r}: samples have sizes {sorted({tuple(t.shape[-2:]) for t in done})} and the resize rule is "
            f"{spec.resize.rule!r}; pass them one by one or set a resize rule"
        )
    return torch.stack(done)


def _is_batch(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 4)


def to_chw(sample: Any, spec: Image, name: str = "image") -> Tensor:
    """One picture (PIL, numpy HWC or HW, tensor CHW) -> tensor (C, H, W) with the spec's number of channels, values untouched."""
    if isinstance(sample, Tensor):
        pixels = sample if sample.ndim == 3 else sample[None]
    else:
        if hasattr(sample, "convert"):  # PIL
            if sample.mode not in ("L", "RGB", "RGBA"):
                sample = sample.convert("RGB")
        array = np.asarray(sample)
        pixels = torch.from_numpy(np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))
    if pixels.ndim != 3:
        raise PreprocessError(f"modality {name!r}: expected (H, W), (H, W, C) arrays or (C, H, W) tensors, got {tuple(sample.shape)}")
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise PreprocessError(f"modality {name!r}: values are {pixels.dtype}; expected uint8 0..255 or floats in the same units")
    if pixels.is_floating_point() and spec.scale < 0.1 and pixels.numel() and float(pixels.min()) < -0.5:
        raise PreprocessError(
            f"modality {name!r}: values go down to {float(pixels.min()):.2f}, so they look normalised already; expected 0..255"
        )
    want, have = len(spec.channels), len(pixels)
    if have == want + 1 and have in (2, 4):
        pixels, have = pixels[:want], want  # alpha
    if have == 1 and want == 3:
        pixels, have = pixels.expand(3, -1, -1), 3
    if have == 3 and want == 1:
        pixels, have = TF.rgb_to_grayscale(pixels), 1
    if have != want:
        raise PreprocessError(f"modality {name!r}: {have} channels, but this checkpoint expects {want}: {', '.join(spec.channels)}")
    return pixels


def image_to_tensor(spec: Image, pixels: Tensor) -> Tensor:
    """(C, H, W) in stored units -> float32 (C, h, w), resized, scaled and normalised as the spec says."""
    if spec.resize.on == "native":
        pixels = resize_to(pixels, spec.size, spec.resize)
    values = pixels.float() * spec.scale + spec.offset
    values = normalise(values, spec.normalise)
    return resize_to(values, spec.size, spec.resize) if spec.resize.on == "normalised" else values


def resize_to(pixels: Tensor, size: Sequence[int], rule: Resize) -> Tensor:
    """Bring (C, H, W) to `size` by the rule; uint8 stays uint8."""
    height, width = pixels.shape[-2:]
    if rule.rule == "none":
        if height % rule.multiple_of or width % rule.multiple_of:
            raise PreprocessError(f"input of {height}x{width} pixels: both sides must be multiples of {rule.multiple_of}")
        return pixels
    target = [round(side / rule.crop_ratio) for side in size]
    if rule.rule == "shortest":
        factor = max(target[0] / height, target[1] / width)
        # Rounded down, as torchvision, timm and open_clip do; the small number undoes what the division lost.
        target = [max(target[0], int(height * factor + 1e-6)), max(target[1], int(width * factor + 1e-6))]
    elif rule.rule == "pad":
        factor = min(size[0] / height, size[1] / width)
        target = [max(1, round(height * factor)), max(1, round(width * factor))]
    if rule.rule != "crop" and [height, width] != target:
        pixels = _interpolate(pixels, target, rule)
    if list(pixels.shape[-2:]) == list(size):
        return pixels
    if rule.rule == "pad" or any(have < want for have, want in zip(pixels.shape[-2:], size, strict=True)):
        short = [max(0, want - have) for have, want in zip(pixels.shape[-2:], size, strict=True)]
        top, left = short[0] // 2, short[1] // 2
        pixels = F.pad(pixels, (left, short[1] - left, top, short[0] - top), value=rule.fill)
    return TF.center_crop(pixels, list(size))


def _interpolate(pixels: Tensor, size: list[int], rule: Resize) -> Tensor:
    if rule.interpolation == "lanczos":
        image = TF.resize(TF.to_pil_image(pixels), size, _MODES["lanczos"])
        return TF.pil_to_tensor(image)
    if rule.corners == "aligned" or rule.interpolation == "area":
        aligned = {"align_corners": True} if rule.corners == "aligned" and rule.interpolation in ("bilinear", "bicubic") else {}
        out = F.interpolate(pixels[None].float(), size=size, mode=rule.interpolation, **aligned)[0]
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
        low, high = rule.percentiles or (2.0, 98.0)
        bounds = torch.quantile(values.flatten(1), torch.tensor([low / 100, high / 100], dtype=values.dtype), dim=1)
        values = (values - bounds[0].view(shape)) / (bounds[1] - bounds[0]).view(shape).clamp_min(1e-12)
    elif rule.rule == "zscore":
        flat = values.flatten(1)
        values = (values - flat.mean(1).view(shape)) / flat.std(1).view(shape).clamp_min(1e-12)
    elif rule.rule == "zscore_nonzero":
        present = values != 0
        count = present.flatten(1).sum(1).clamp_min(1)
        mean = (values.flatten(1).sum(1) / count).view(shape)
        deviation = torch.where(present, values - mean, 0)
        std = (deviation.square().flatten(1).sum(1) / count).sqrt().view(shape)
        values = deviation / std.clamp_min(1e-12)
    if rule.rule == "stretch" or rule.rule == "percentile":
        values = values.clamp(0, 1)
    if rule.quantise:
        values = (values * (rule.quantise - 1)).floor() / (rule.quantise - 1)
    if rule.mean:
        values = (values - column(rule.mean)) / column(rule.std)
    return values if rule.clip is None else values.clamp(*rule.clip)
