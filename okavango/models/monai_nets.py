"""Segmentation networks of MONAI, ``monai/NAME``, as backbones of volumes, to compare with.

They read all sequences as channels and return a map of full size.

A sequence that a study lacks is zeros, which is the mean of a normalised volume. The last layer, which makes classes of features,
is left to the head. Not pretrained, but for ``monai/bundle``, which `okavango.zoo.monai_bundle` makes of a bundle's folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
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
    """Hatamizadeh et al., arXiv 2201.01266; it needs sides of more than 32 voxels, and the package einops."""
    try:
        import einops  # noqa: F401  (MONAI asks for it in the forward pass only)
    except ImportError:
        raise ImportError("monai/SwinUNETR needs the package einops: pip install 'okavango[mri]'") from None
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


# What a definition may build: networks, never other code. The last one is what our own bundles hold.
TARGETS = ("monai.networks.", "torch.nn.", "okavango.downstream.segmentation.bundle.StackedSegmenter")


def _bundle(channels: int, definition: Mapping[str, Any]) -> tuple[nn.Module, int, int]:
    """The `network_def` of a MONAI bundle, plain data: names of classes of MONAI and their arguments."""
    from monai.bundle import ConfigParser

    for target in _targets(definition):
        if not target.startswith(TARGETS):
            raise ArgumentError(f"monai/bundle: builds {target!r}, which is no network of MONAI; code of a bundle is not run")
    try:
        network = ConfigParser({"network": copy.deepcopy(dict(definition))}).get_parsed_content("network")
        assert isinstance(network, nn.Module), f"it is a {type(network).__name__}"
    except Exception as error:  # MONAI wraps whatever the class raises
        cause = error.__cause__ or error
        raise ArgumentError(f"monai/bundle: the network cannot be built ({str(cause).splitlines()[0]})") from error
    return _without_last_layer(network, channels)


def _targets(definition: Any) -> list[str]:
    """All classes that a definition names, by their full names."""
    from monai.bundle.config_item import ComponentLocator

    if isinstance(definition, Mapping):
        own = definition.get("_target_", None)
        if own is not None and "." not in str(own):
            modules = ComponentLocator().get_component_module_name(str(own)) or "unknown"
            own = f"{modules if isinstance(modules, str) else modules[0]}.{own}"
        return [*([] if own is None else [str(own)]), *(name for value in definition.values() for name in _targets(value))]
    if isinstance(definition, list | tuple):
        return [name for value in definition for name in _targets(value)]
    if isinstance(definition, str) and definition.startswith("$"):
        raise ArgumentError(f"monai/bundle: {definition!r} is an expression, which is code; write its value into network_def")
    return []


def _without_last_layer(network: nn.Module, channels: int) -> tuple[nn.Module, int, int]:
    """Take off the convolution that a network ends in; where it ends in something else, its map is that of its own classes.

    It is found without computing anything, by a copy on the meta device, and so is what the sides of a volume must divide by.

    Raises:
        ArgumentError: it does not make one map of full size of `channels` volumes.
    """
    last: list[tuple[str, Any, Any]] = []
    probe = copy.deepcopy(network).to("meta").eval()
    for name, module in probe.named_modules():
        if isinstance(module, nn.Conv3d) and set(module.kernel_size) == {1}:
            module.register_forward_hook(lambda module, given, out, name=name: last.append((name, given[0], out)))
    reason = ""
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        volume = torch.empty(1, channels, 64 + multiple, 64 + 2 * multiple, 64 + 3 * multiple, device="meta")
        last.clear()
        try:
            with torch.no_grad():
                out = probe(volume)
        except Exception as error:  # sizes that do not fit raise almost anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        if not isinstance(out, torch.Tensor) or out.shape[2:] != volume.shape[2:]:
            reason = f"it returns {list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__}"
            continue
        if not last or last[-1][2].untyped_storage()._cdata != out.untyped_storage()._cdata:  # also where the ends are cut off
            return network, out.shape[1], multiple
        name, given, _ = last[-1]
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
        return network, given.shape[1], multiple
    raise ArgumentError(f"monai/bundle: the network makes no map of full size of {channels} volumes ({reason})")


NETWORKS: dict[str, Callable[..., tuple[nn.Module, int, int]]] = {
    "SegResNet": _segresnet,
    "SwinUNETR": _swin_unetr,
    "DynUNet": _dynunet,
    "bundle": _bundle,
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
        name: SegResNet, SwinUNETR or DynUNet; or bundle, see `okavango.zoo.monai_bundle`.
        modalities, size, spacing, orientation: as for `okavango.models.bm_mae.BMMAE`.
        **arguments: `init_filters` of SegResNet, `feature_size` of SwinUNETR, `levels` and `filters` of DynUNet,
            `definition` of a bundle.
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
