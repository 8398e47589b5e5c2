"""A frozen backbone with small trainable parts: bottleneck adapters or LoRA, a pooling, a map of local descriptors.

`Adapted` goes around any backbone: it hangs adapters on modules that are already there and changes none of them, so the frozen
network keeps the names of its tensors. New layers that write end in zeros: until the first step, the features are the frozen
network's own, bit for bit. Adapters, GeM and up-convolutions are those of SelaVPR (arXiv 2402.14505).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.models.backbone import ArgumentError, Backbone, Elastic, create_model, register, unknown_name
from okavango.models.elastic import folded, linear
from okavango.models.features import Features, Subnet
from okavango.models.lora import inject_lora

SERIAL = ("attn", "self_attn", "self_attention", "attention")  # last part of the names of attention modules in all our libraries
PARALLEL = ("mlp", "ffn")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, *NORMS)  # the last one in a module tells where its output has the channels


class Adapter(nn.Module):
    """A bottleneck MLP over the channels: up(relu(down(x))).

    Args:
        width: channels in and out.
        hidden: channels between.
        axis: of the channels, -1 for tokens and 1 for maps (B, C, H, W).
        scale: fixed factor on the result where it is added.
        parallel: it reads the input of the module that it hangs on, not its output.

    A narrower input (a subnet of an elastic backbone) takes the leading channels of both layers, and the same share of `hidden`.
    """

    def __init__(self, width: int, hidden: int, axis: int = -1, scale: float = 1.0, parallel: bool = False):
        super().__init__()
        self.axis, self.scale, self.parallel = axis, scale, parallel
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for part in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(part)

    def forward(self, x: Tensor) -> Tensor:
        """x with any number of axes -> the same shape; not scaled."""
        x = x.movedim(self.axis, -1)
        width = x.shape[-1]
        x = linear(F.relu(linear(x, self.down, self.hidden(width))), self.up, width)
        return x.movedim(-1, self.axis)

    def hidden(self, width: int) -> int:
        """Active channels between, for an input of `width` channels."""
        return self.down.out_features * width // self.down.in_features

    def narrow(self, other: Adapter) -> None:
        """Fill a narrower adapter with the slice that an input of its width takes."""
        width = other.down.in_features
        hidden = self.hidden(width)
        other.down.load_state_dict(folded(self.down.weight, self.down.bias, width, hidden))
        other.up.load_state_dict(folded(self.up.weight, self.up.bias, hidden, width))


def _add(adapter: Adapter, module: nn.Module, inputs: tuple, output):
    """Forward hook: the module's output and what the adapter makes of it, or of the module's input."""
    found = output[0] if isinstance(output, tuple) else output
    found = found + adapter.scale * adapter(inputs[0] if adapter.parallel else found)
    return (found, *output[1:]) if isinstance(output, tuple) else found


@dataclass(frozen=True)
class Site:
    """Where an adapter hangs: name of the module, whether beside it or behind it, channels and their axis."""

    name: str
    parallel: bool
    width: int
    axis: int


@torch.no_grad()
def sites(backbone: Backbone, subnet: Subnet | None = None) -> list[Site]:
    """The places for adapters, in the order in which a forward pass comes by.

    Behind each attention and beside each MLP; behind each block of a network that has neither. Where a library has traced such a
    module apart, so that it is never called itself, behind its last layer.

    Args:
        subnet: run this slice; blocks that it leaves out are not listed.
    """
    modules = dict(backbone.named_modules())
    kinds = {name: _kind(name) for name in modules if _kind(name)}
    if not kinds:  # convolutions: a block is what holds norms, but for the whole network, whose own are those of stem and head
        norms = [name for name, module in modules.items() if isinstance(module, NORMS)]
        kinds = {name.rpartition(".")[0]: "serial" for name in norms if name.removeprefix("trunk.").count(".")}
    kinds = {name: kind for name, kind in kinds.items() if not any(name.startswith(f"{other}.") for other in kinds)}
    calls: list[tuple[str, int, int]] = []

    def watch(name: str, module: nn.Module, inputs: tuple, output) -> None:
        found = output[0] if isinstance(output, tuple) else output
        layers = [part for part in module.modules() if isinstance(part, LAYERS)]
        if layers:
            axis = 1 if found.ndim == 4 and not isinstance(layers[-1], nn.Linear) else -1
            calls.append((name, found.shape[axis], axis))

    inside = [name for name in modules if any(name == top or name.startswith(f"{top}.") for top in kinds)]
    hooks = [modules[name].register_forward_hook(partial(watch, name)) for name in inside]
    spec, parameter = backbone.preprocess.array(), next(backbone.parameters())
    training = backbone.training
    images = torch.zeros(1, len(spec.channels), *spec.size, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()({next(iter(backbone.preprocess)): images}, subnet=subnet)
    backbone.train(training)
    for hook in hooks:
        hook.remove()
    names = [name for name, _, _ in calls]
    called = [call for call in calls if names.count(call[0]) == 1]
    found = []
    for top, kind in kinds.items():
        own = [call for call in called if call[0] == top] or [call for call in called if call[0].startswith(f"{top}.")]
        if own:
            name, width, axis = own[-1]
            found.append((names.index(name), Site(name, kind == "parallel" and name == top, width, axis)))
    return [site for _, site in sorted(found, key=lambda pair: pair[0])]


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return "serial" if last in SERIAL else "parallel" if last in PARALLEL else ""


def hang(
    backbone: Backbone, *, ratio: float = 0.5, scale: float = 0.2, serial: bool = True, parallel: bool = True, last: int = 0
) -> nn.ModuleDict:
    """Freeze a backbone and hang bottleneck adapters on it, in place.

    Args:
        ratio: channels of the bottleneck over those of the block, rounded down, at least 1.
        scale: factor on adapters beside an MLP; those behind a module have 1.
        serial, parallel: whether to have adapters behind attention (or blocks), and beside MLPs.
        last: only in this many blocks at the end, so that nothing before them is kept for the backward pass; 0 for all.
    Returns:
        the adapters, an `nn.ModuleDict` whose keys are the modules' names with ``-`` for ``.``.
    Raises:
        ArgumentError: the network has no such place.
    """
    backbone.requires_grad_(False)
    places = [site for site in sites(backbone) if (parallel if site.parallel else serial)]
    if last:
        depth = [_depth(backbone, site) for site in places]
        places = [site for site, own in zip(places, depth, strict=True) if own > max(depth) - last]
    if not places:
        raise ArgumentError(f"{backbone.architecture}: has no attention, MLP or residual block to hang adapters on; use lora")
    adapters = nn.ModuleDict()
    for site in places:
        adapter = Adapter(site.width, max(1, int(ratio * site.width)), site.axis, scale if site.parallel else 1.0, site.parallel)
        adapters[site.name.replace(".", "-")] = adapter
        backbone.get_submodule(site.name).register_forward_hook(partial(_add, adapter))
    return adapters


def _depth(backbone: Backbone, site: Site) -> int:
    """Block that a site belongs to, as `layer_ids` counts."""
    return max((depth for name, depth in backbone.layer_ids().items() if name.startswith(f"{site.name}.")), default=0)


# -- from features to descriptors -------------------------------------------------------------------------------------------


def gem(x: Tensor, p: Tensor | float, eps: float = 1e-6) -> Tensor:
    """Generalised mean (arXiv 1711.02512) over the cells of a map (B, C, H, W) -> (B, C); values below `eps` count as `eps`."""
    return x.clamp(min=eps).pow(p).mean((-2, -1)).pow(1 / p)


class GeM(nn.Module):
    """Each cell to unit length, then the generalised mean with one learned exponent."""

    def __init__(self, p: float = 3.0):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), p))

    def forward(self, cells: Tensor, prefix: Tensor | None) -> Tensor:
        return gem(F.normalize(cells, dim=1), self.p)


class Mean(nn.Module):
    """The mean over the cells."""

    def forward(self, cells: Tensor, prefix: Tensor | None) -> Tensor:
        return cells.mean((-2, -1))


class Max(nn.Module):
    """The maximum over the cells, channel by channel (MAC)."""

    def forward(self, cells: Tensor, prefix: Tensor | None) -> Tensor:
        return cells.amax((-2, -1))


class ClassToken(nn.Module):
    """The class token."""

    def forward(self, cells: Tensor, prefix: Tensor | None) -> Tensor:
        if prefix is None:
            raise ArgumentError("pool 'cls': this backbone has no class token; choose gem, mean or max")
        return prefix[:, 0]


POOLINGS: dict[str, type[nn.Module]] = {"gem": GeM, "mean": Mean, "max": Max, "cls": ClassToken}


class LocalMap(nn.Module):
    """Transposed convolutions (kernel 3, stride 2, padding 1) with ReLU between; each makes 2 g - 1 cells out of g.

    Args:
        width: channels of the map.
        widths: channels after each convolution.
    """

    def __init__(self, width: int, widths: Sequence[int]):
        super().__init__()
        channels = [width, *widths]
        self.convs: Any = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, widths, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, widths[-1], H, W); a narrower map takes the leading rows of the first convolution, scaled."""
        for index, conv in enumerate(self.convs):
            weight = conv.weight
            if x.shape[1] < len(weight):
                weight = weight[: x.shape[1]] * (len(weight) / x.shape[1])
            x = F.conv_transpose2d(F.relu(x) if index else x, weight, conv.bias, stride=2, padding=1)
        return x


# -- the adapted backbone ---------------------------------------------------------------------------------------------------


class Adapted(Backbone):
    """A frozen backbone, what is trained on it, and what it is asked for.

    Args:
        backbone: any; its parameters are frozen and it stays in eval mode.
        adapt: "bottleneck", "lora" or "none"; or {"kind": one of these, ...} with the settings of `hang`, or those of
            `okavango.models.lora.inject_lora`.
        pool: "" keeps the backbone's own `pooled`; "gem", "mean", "max" or "cls" pool its last tokens or map to unit length.
        local: channels of up-convolutions; with them, `Features.tokens` are local descriptors of unit length, row by row, in the
            finer `Features.grid` of theirs (64 times as many cells for two, but for the border); () keeps the backbone's tokens.
    Raises:
        ArgumentError: unknown settings, or a backbone that has no place for them.

    Everything else in `Features` is the backbone's.
    """

    def __init__(
        self, backbone: Backbone, *, adapt: str | Mapping[str, Any] = "bottleneck", pool: str = "", local: Sequence[int] = ()
    ):
        super().__init__()
        settings = {"kind": adapt} if isinstance(adapt, str) else dict(adapt)
        kind = settings.pop("kind", "bottleneck")
        if kind not in KINDS:
            raise ArgumentError(unknown_name("kind of adapt", str(kind), KINDS))
        if pool and pool not in POOLINGS:
            raise ArgumentError(unknown_name("pool", pool, POOLINGS))
        self.backbone, self.kind, self.local_widths = backbone, kind, tuple(local)
        self.adapters = KINDS[kind](backbone, settings)
        self.preprocess, self.mask_stride = backbone.preprocess, backbone.mask_stride
        self.modality = next(iter(backbone.preprocess))
        info = backbone.feature_info
        width = info.layer_channels[-1] if info.layer_channels else info.channels
        self.pool = POOLINGS[pool]() if pool else None
        self.local = LocalMap(width, self.local_widths) if local else None
        self.feature_info = replace(info, channels=width) if pool else info
        self.architecture = "adapted"
        self.arguments = {
            "backbone": backbone.architecture,
            "backbone_args": dict(backbone.arguments),
            "adapt": {"kind": kind, **settings},
            "pool": pool,
            "local": self.local_widths,
        }
        self.train(self.training)

    @property
    def optional_parameters(self) -> tuple[str, ...]:
        """Those of the backbone."""
        return tuple(f"backbone.{name}" for name in getattr(self.backbone, "optional_parameters", ()))

    def train(self, mode: bool = True) -> Adapted:
        """Training mode for what is trained; the frozen network stays in eval mode, only LoRA's dropout follows."""
        super().train(mode)
        self.backbone.eval()
        for name, module in self.backbone.named_modules():
            if name.endswith("lora_dropout"):
                module.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Adapted:
        """For what is trained; the frozen network stays frozen."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and self._is_own(name))
        return self

    @staticmethod
    def _is_own(name: str) -> bool:
        return not name.startswith("backbone.") or "lora_" in name

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """As the backbone's, with the descriptors in `pooled` and `tokens`."""
        features = self.backbone(inputs, present=present, token_mask=token_mask, subnet=subnet, layers=layers)
        if self.pool is None and self.local is None:
            return features
        cells = self.cells(features)
        if self.pool is not None:
            features = replace(features, pooled=F.normalize(self.pool(cells, features.prefix), dim=-1))
        if self.local is not None:
            local = F.normalize(self.local(cells).flatten(2).transpose(1, 2), dim=-1)
            grid = tuple((side - 1) * 2 ** len(self.local_widths) + 1 for side in cells.shape[-2:])
            features = replace(features, tokens={self.modality: local}, grid={self.modality: grid}, token_mask=None)
        return features

    def cells(self, features: Features) -> Tensor:
        """The last tokens as a map (B, C, h, w), or the coarsest map of a backbone without tokens."""
        if self.modality in features.tokens and self.modality in features.grid:
            return features.tokens[self.modality].transpose(1, 2).unflatten(2, features.grid[self.modality])
        if features.maps:
            return features.maps[-1]
        raise ArgumentError(f"{self.backbone.architecture}: has neither tokens in a grid nor maps; pool and local need one of them")

    def layer_ids(self) -> dict[str, int]:
        """The backbone's; an adapter counts to its block."""
        inner = self.backbone.layer_ids()
        ids = {f"backbone.{name}": depth for name, depth in inner.items()}
        for key, adapter in self.adapters.items():
            site = key.replace("-", ".") + "."
            depth = max((depth for name, depth in inner.items() if name.startswith(site)), default=None)
            if depth is not None:
                ids |= {f"adapters.{key}.{name}": depth for name, _ in adapter.named_parameters()}
        return ids

    def trained(self) -> dict[str, Tensor]:
        """What is not the frozen network's, by name: all that distinguishes this model from its backbone."""
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if self._is_own(name)}


class AdaptedElastic(Adapted):
    """An adapted backbone that holds subnets: adapters and up-convolutions are sliced as the layers are."""

    backbone: Any  # an elastic backbone

    def list_subnets(self) -> list[Subnet]:
        """The backbone's."""
        return self.backbone.list_subnets()

    def check_subnet(self, subnet: Subnet | None) -> Subnet:
        """The backbone's."""
        return self.backbone.check_subnet(subnet)

    def sampling_pool(self, scale: float = 3.0) -> tuple[Subnet, ...]:
        """The backbone's."""
        return self.backbone.sampling_pool(scale)

    def extract(self, subnet: Subnet) -> Adapted:
        """A stand-alone adapted model with a copy of the weights, in eval mode."""
        plain = adapted_from(self.backbone.extract(subnet), self.arguments)
        plain.preprocess = self.preprocess
        ours = [site for site in sites(self.backbone, subnet) if site.name.replace(".", "-") in self.adapters]
        theirs = [site for site in sites(plain.backbone) if site.name.replace(".", "-") in plain.adapters]
        for one, other in zip(ours, theirs, strict=True):
            wide, narrow = self.adapters[one.name.replace(".", "-")], plain.adapters[other.name.replace(".", "-")]
            cast(Adapter, wide).narrow(cast(Adapter, narrow))
        if self.pool is not None and plain.pool is not None:
            plain.pool.load_state_dict(self.pool.state_dict())
        if self.local is not None and plain.local is not None:
            tensors, width = self.local.state_dict(), plain.local.convs[0].in_channels
            first = tensors["convs.0.weight"]
            plain.local.load_state_dict({**tensors, "convs.0.weight": first[:width] * (len(first) / width)})
        parameter = next(self.backbone.parameters())
        return plain.to(parameter.device, parameter.dtype).eval()


def _bottleneck(backbone: Backbone, settings: dict[str, Any]) -> nn.ModuleDict:
    known = ("ratio", "scale", "serial", "parallel", "last")
    for key in settings:
        if key not in known:
            raise ArgumentError(unknown_name("setting of adapt", key, known))
    return hang(backbone, **settings)


def _lora(backbone: Backbone, settings: dict[str, Any]) -> nn.ModuleDict:
    inject_lora(backbone, settings)
    return nn.ModuleDict()


def _none(backbone: Backbone, settings: dict[str, Any]) -> nn.ModuleDict:
    if settings:
        raise ArgumentError(f"adapt 'none': takes no settings, got {', '.join(settings)}")
    backbone.requires_grad_(False)
    return nn.ModuleDict()


KINDS = {"bottleneck": _bottleneck, "lora": _lora, "none": _none}


def adapt(backbone: Backbone, **arguments: Any) -> Adapted:
    """Put a backbone, as it is, into an `Adapted`, which keeps its subnets where it has any; for the arguments see there.

    Example:
        >>> net = adapt(create_model("elastic_vit_tiny"), adapt="bottleneck", pool="gem")
        >>> sorted({name.partition(".")[0] for name, p in net.named_parameters() if p.requires_grad})
        ['adapters', 'pool']
    """
    return (AdaptedElastic if isinstance(backbone, Elastic) else Adapted)(backbone, **arguments)


def adapted_from(backbone: Backbone, arguments: Mapping[str, Any]) -> Adapted:
    """An adapted backbone by the arguments of another one."""
    return adapt(backbone, **{name: arguments[name] for name in ("adapt", "pool", "local") if name in arguments})


@register
def adapted(
    *,
    backbone: str = "timm/vit_small_patch14_dinov2",
    backbone_args: Mapping[str, Any] | None = None,
    adapt: str | Mapping[str, Any] = "bottleneck",
    pool: str = "",
    local: Sequence[int] = (),
) -> Adapted:
    """Any backbone, frozen, with adapters or LoRA, a pooling and local descriptors: takes all arguments of `Adapted`."""
    inner = create_model(backbone, **dict(backbone_args or {}))
    return adapted_from(inner, {"adapt": adapt, "pool": pool, "local": local})
