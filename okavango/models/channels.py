"""Fits the first layer of a network for red, green and blue to other bands, and writes down how."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from okavango.models.adapters import Adapted
from okavango.models.backbone import Backbone, architectures, create_model
from okavango.models.preprocess import Image, Preprocess, Raster
from okavango.models.sensors import find_band, wavelengths

How = Literal["repeat", "average", "wavelength"]
_NANOMETRES = {"red": 665.0, "green": 560.0, "blue": 490.0}


class ChannelError(ValueError):
    """A first layer cannot be fitted to the bands asked for; the message says why."""


def adapt_channels(backbone: Backbone, bands: Raster, how: How = "repeat") -> Backbone:
    """A copy of a backbone that takes other bands than those it was made for.

    Its first convolution gets a filter for each band, scaled by 3 / C so that the size of what it answers stays. The number of
    channels goes into the copy's arguments and `bands` into its preprocess, with `how` in `Raster.adapted`, so that a checkpoint of
    it loads as any other.

    Args:
        backbone: of timm, torchvision or open_clip, or our own.
        bands: what the copy expects.
        how: where a band's filter comes from. "repeat": from the old channels in turn, the first band from the first of them
            (timm's rule; one band gets the sum of all); "average": the mean of all; "wavelength": between the two old channels that
            are nearest in wavelength, beyond their ends the outermost; the mean where a band has no wavelength.
    Raises:
        ChannelError: a network without a plain first convolution, whose architecture takes no number of channels, or for
            "wavelength" one whose channels are not red, green and blue.

    Example:
        >>> from okavango.models.backbone import create_model
        >>> from okavango.models.expectations import imagenet
        >>> spec = imagenet("so2sat_random", ("B02", "B03", "B04", "B08"), size=28).array()
        >>> model = adapt_channels(create_model("elastic_vit_tiny"), spec, "wavelength")
        >>> model.arguments["channels"], model.preprocess.array().adapted
        (4, 'wavelength from red, green, blue')
    """
    if how not in ("repeat", "average", "wavelength"):
        raise ChannelError(f"how {how!r}: expected 'repeat', 'average' or 'wavelength'")
    if not _takes_channels(backbone):
        raise ChannelError(f"{backbone.architecture}: takes no number of channels; adapt the backbone inside before it is wrapped")
    (modality, spec), *more = backbone.preprocess.items()
    if more or not isinstance(spec, (Image, Raster)):
        raise ChannelError(f"{backbone.architecture}: expected a network of one modality that takes pictures or rasters")
    conv = first_convolution(backbone, len(spec.channels))
    tensors = backbone.state_dict()
    name = next(name for name, module in backbone.named_modules() if module is conv)
    tensors[f"{name}.weight"] = adapt_filters(conv.weight.detach(), spec.channels, bands, how)
    with torch.random.fork_rng(devices=[]):  # the new weights are replaced at once
        model = create_model(backbone.architecture, **{**backbone.arguments, "channels": len(bands.channels)})
    model.load_state_dict(tensors)
    said = f"{how} from {', '.join(spec.channels)}"
    model.preprocess = Preprocess({modality: bands}).replace(modality, adapted=said)
    return model.to(conv.weight.device, conv.weight.dtype).train(backbone.training)


def first_convolution(model: nn.Module, channels: int) -> nn.Conv2d:
    """The convolution that reads the image.

    Raises:
        ChannelError: the first one of the network does not have that many inputs, or is grouped.
    """
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None or conv.in_channels != channels or conv.groups != 1:
        raise ChannelError(f"{type(model).__name__}: its first layer is no plain convolution of {channels} channels")
    return conv


def set_filters(conv: nn.Conv2d, weight: Tensor) -> None:
    """Give a convolution filters (out, C, h, w) for another number of inputs, in place."""
    conv.in_channels = weight.shape[1]
    conv.weight = nn.Parameter(weight.contiguous(), requires_grad=conv.weight.requires_grad)


def adapt_filters(weight: Tensor, channels: Sequence[str], bands: Raster, how: How = "repeat") -> Tensor:
    """Filters (out, 3, h, w) of a convolution -> (out, C, h, w) for C bands; see `adapt_channels`.

    Args:
        weight: the filters.
        channels: names of the old channels; `bands`: the new ones.
    """
    old, new = len(channels), len(bands.channels)
    if how == "repeat":
        if new == 1:
            return weight.sum(1, keepdim=True)
        return weight if new == old else weight[:, [index % old for index in range(new)]] * (old / new)
    shares = torch.full((new, old), 1 / old, dtype=weight.dtype, device=weight.device)
    if how == "wavelength":
        for row, centre in enumerate(bands.wavelengths or wavelengths(bands.sensor, bands.channels)):
            if centre is not None:
                shares[row] = _between(centre, _own_wavelengths(channels)).to(weight)
    return torch.einsum("nc,ochw->onhw", shares, weight) * (old / new)


def _own_wavelengths(channels: Sequence[str]) -> list[float]:
    bands = [find_band("", name) for name in channels]
    centres = [_NANOMETRES.get(band.name) if band else None for band in bands]
    if None in centres:
        raise ChannelError(f"channels {', '.join(channels)}: filters by wavelength need red, green and blue")
    return [float(centre or 0) for centre in centres]


def _between(centre: float, own: Sequence[float]) -> Tensor:
    """Weights of the old channels for a band at `centre`: linear between neighbours, the outermost beyond."""
    order = sorted(range(len(own)), key=lambda index: own[index])
    shares = torch.zeros(len(own))
    at = min(max(centre, own[order[0]]), own[order[-1]])
    for low, high in zip(order, order[1:], strict=False):
        if own[low] <= at <= own[high]:
            share = (at - own[low]) / (own[high] - own[low])
            shares[low], shares[high] = 1 - share, share
            break
    return shares


def _takes_channels(backbone: Backbone) -> bool:
    if "/" in backbone.architecture:
        return True
    parameters = inspect.signature(architectures()[backbone.architecture]).parameters.values()
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters) and not isinstance(backbone, Adapted)
    return open_ended or any(each.name == "channels" for each in parameters)
