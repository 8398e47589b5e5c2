"""Segmentation networks of MONAI, ``monai/NAME``, as backbones of volumes, to compare with.

They read all sequences as channels and return a map of full size.

A sequence that a study lacks is zeros, which is the mean of a normalised volume. The last layer, which makes classes of features,
is left to the head. Not pretrained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from okavango.models.backbone import ArgumentError, Backbone, FeatureInfo, unknown_name
from okavango.models.bm_mae import ALIASES
from okavango.models.features import Features
from okavango.models.preprocess import Normalise, Preprocess, Resize, Volume


class StackedVolumes(Backbone):
    """A network from (B, modalities, D, H, W) to a map of the same size.

    Args:
        network: makes one of the number of input channels; channels: of its map.
        multiple: sides that it takes are multiples of this; others are filled up with zeros, which are cut off again.
        modalities, size, spacing, orientation: as for `okavango.models.bm_mae.BMMAE`.
        **arguments: the rest of what rebuilds it.
    """

    def __init__(
        self,
        network: nn.Module,
        channels: int,
        multiple: int,
        *,
        modalities: Sequence[str],
        size: int | Sequence[int],
        spacing: Sequence[float] | None,
        orientation: str | None,
        **arguments: Any,
    ):
        super().__init__()
        sides = (size,) * 3 if isinstance(size, int) else tuple(size)
        self.arguments = {
            "modalities": tuple(modalities),
            "size": sides,
            "spacing": None if spacing is None else tuple(map(float, spacing)),
            "orientation": orientation,
            **arguments,
        }
        self.network, self.multiple = network, multiple
        self.feature_info = FeatureInfo(channels, 1, (channels,), (1,))
        self.preprocess = Preprocess(
            {
                name: Volume(
                    channels=(name,),
                    aliases=tuple((alias, name) for alias in ALIASES.get(name, ())),
                    size=sides,  # type: ignore[arg-type]
                    spacing=self.arguments["spacing"],
                    orientation=orientation,
                    resize=Resize(rule="crop", interpolation="bilinear"),
                    normalise=Normalise(rule="zscore_nonzero"),
                )
                for name in modalities
            }
        )

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Volumes {modality: (B, 1, D, H, W)}, any subset -> `Features.maps`, one map (B, C, D, H, W)."""
        if token_mask or subnet or layers:
            raise ValueError(f"{self.architecture}: has no tokens to hide, no subnets and no layers to return")
        first = next(iter(inputs.values()))
        channels = []
        for column, name in enumerate(self.modalities):
            volume = inputs.get(name)
            if volume is None:
                volume = torch.zeros_like(first)
            elif present is not None:
                volume = torch.where(present[:, column, None, None, None, None], volume, 0)
            channels.append(volume)
        stacked, size = torch.cat(channels, 1), first.shape[-3:]
        short = [-side % self.multiple for side in size]
        if any(short):
            stacked = F.pad(stacked, (0, short[2], 0, short[1], 0, short[0]))
        return Features(maps=(self.network(stacked)[..., : size[0], : size[1], : size[2]],), strides=(1,))


# -- the networks, each without its last convolution -------------------------------------------------------------------------


def _segresnet(channels: int, init_filters: int = 16) -> tuple[nn.Module, int, int]:
    """Myronenko, arXiv 1810.11654."""
    from monai.networks.nets import SegResNet

    network = SegResNet(init_filters=init_filters, in_channels=channels, out_channels=1)
    network.conv_final[-1] = nn.Identity()
    return network, init_filters, 8


def _swin_unetr(channels: int, feature_size: int = 24) -> tuple[nn.Module, int, int]:
    """Hatamizadeh et al., arXiv 2201.01266; it needs the package einops, and sides of at least 64 voxels."""
    try:
        import einops  # noqa: F401  (MONAI asks for it in the forward pass only)
    except ImportError:
        raise ImportError("monai/SwinUNETR needs the package einops: pip install einops") from None
    from monai.networks.nets import SwinUNETR

    network = SwinUNETR(in_channels=channels, out_channels=1, feature_size=feature_size)
    network.out = nn.Identity()  # type: ignore[assignment]
    return network, feature_size, 32


def _dynunet(channels: int, levels: int = 6, filters: int = 32) -> tuple[nn.Module, int, int]:
    """A U-Net as nnU-Net builds it (Isensee et al., arXiv 1809.10486): `filters` at full size, doubled with each level."""
    from monai.networks.nets import DynUNet

    network = DynUNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=1,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=[min(320, filters * 2**level) for level in range(levels)],
    )
    network.output_block = nn.Identity()
    return network, filters, 2 ** (levels - 1)


NETWORKS: dict[str, Callable[..., tuple[nn.Module, int, int]]] = {
    "SegResNet": _segresnet,
    "SwinUNETR": _swin_unetr,
    "DynUNet": _dynunet,
}


def create(
    name: str,
    *,
    modalities: Sequence[str] = tuple(ALIASES),
    size: int | Sequence[int] = 128,
    spacing: Sequence[float] | None = (1.0, 1.0, 1.0),
    orientation: str | None = "LPS",
    **arguments: Any,
) -> StackedVolumes:
    """Build one, untrained.

    Args:
        name: SegResNet, SwinUNETR or DynUNet.
        modalities, size, spacing, orientation: as for `okavango.models.bm_mae.BMMAE`.
        **arguments: `init_filters` of SegResNet, `feature_size` of SwinUNETR, `levels` and `filters` of DynUNet.
    Raises:
        ValueError: an unknown name or argument. ImportError: MONAI, or what the network needs besides, is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(unknown_name("network of MONAI", name, NETWORKS))
    try:
        network, channels, multiple = NETWORKS[name](len(modalities), **arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ArgumentError(f"monai/{name}: {error}") from error
    except ModuleNotFoundError as error:
        if error.name != "monai":
            raise
        raise ImportError("MONAI's networks need the package monai: pip install 'okavango[mri]'") from None
    scans = {"modalities": modalities, "size": size, "spacing": spacing, "orientation": orientation}
    model = StackedVolumes(network, channels, multiple, **scans, **arguments)  # type: ignore[arg-type]
    model.architecture = f"monai/{name}"
    return model
