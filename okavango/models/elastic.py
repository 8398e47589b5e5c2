"""What elastic backbones of all families share: slices of layers, the grid of subnets, the pool they are drawn from, budgets.

A subnet keeps the leading channels and evenly spaced blocks. Every linear layer whose input is narrowed is scaled by full width /
active width (POA, arXiv 2408.01031, Eq. 2 and 3), unless `rescale` is off, as in the paper's ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.models.backbone import Backbone, latency
from okavango.models.features import Subnet
from okavango.models.preprocess import Image, Normalise, Preprocess, Resize

Depth = int | tuple[int, ...]


def kept_blocks(depth: int, total: int) -> tuple[int, ...]:
    """Indices of the blocks that a subnet of `depth` keeps out of `total`: evenly spaced, truncated, first and last included."""
    return tuple(np.linspace(0, total - 1, depth).astype(np.int64).tolist())


def sampling_pool(widths: Sequence[int], depths: Sequence[Depth], scale: float = 3.0) -> tuple[Subnet, ...]:
    """The multiset that elastic students are drawn from, smallest first; the last entry is the intact network.

    The smallest width and the smallest depth each get `scale` times the weight of the largest; multiplicities are rounded half
    to even (POA, Eq. 14).
    """
    pool = []
    for width, width_weight in zip(widths, np.linspace(scale, 1, len(widths)), strict=True):
        for depth, depth_weight in zip(depths, np.linspace(scale, 1, len(depths)), strict=True):
            pool += [Subnet(width, depth)] * int(np.round(width_weight * depth_weight))
    return tuple(pool)


def leading(tensor: Tensor, *sizes: int) -> Tensor:
    """A view of the leading part of the first dimensions, and the tensor itself where nothing is cut.

    A cut of nothing would cost a copy of the gradient in the backward pass.
    """
    for dim, size in enumerate(sizes):
        if size < tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, size)
    return tensor


def linear(x: Tensor, layer: nn.Linear, out: int, groups: int = 1, rescale: bool = True) -> Tensor:
    """A slice of a linear layer: the leading `x.shape[-1]` inputs and the leading `out` rows of each of `groups` equal row groups.

    Args:
        x: (..., inputs), inputs <= layer.in_features.
    Returns:
        (..., groups * out), with `rescale` scaled by in_features / inputs; the bias is not scaled.
    """
    inputs = x.shape[-1]
    weight: Tensor = layer.weight
    bias: Tensor = layer.bias
    if groups == 1:
        weight, bias = leading(weight, out, inputs), leading(bias, out)
    elif groups * out != layer.out_features or inputs != layer.in_features:
        weight = weight.view(groups, -1, layer.in_features)[:, :out, :inputs].reshape(groups * out, inputs)
        bias = bias.view(groups, -1)[:, :out].reshape(-1)
    if inputs == layer.in_features or not rescale:
        return F.linear(x, weight, bias)
    flat = torch.addmm(bias, x.reshape(-1, inputs), weight.t(), alpha=layer.in_features / inputs)
    return flat.view(*x.shape[:-1], groups * out)


def folded(weight: Tensor, bias: Tensor, inputs: int, out: int, groups: int = 1, rescale: bool = True) -> dict[str, Tensor]:
    """Weight and bias of the slice that `linear` takes, as a layer of its own: the scale is multiplied into the weight."""
    full = weight.shape[1]
    weight = weight.view(groups, -1, full)[:, :out, :inputs].reshape(-1, inputs)
    return {"weight": weight * (full / inputs if rescale else 1), "bias": bias.view(groups, -1)[:, :out].reshape(-1)}


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer norm over the active channels with the leading weights."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,), leading(norm.weight, width), leading(norm.bias, width), norm.eps)


def add_residual(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float, part_above: float = 0.1) -> Tensor:
    """x + branch(x) with stochastic depth.

    Above a rate of `part_above` the branch runs on a random part of the batch only and its result is scaled up, as DINOv2 does;
    below, it runs on all samples and some results are dropped.
    """
    if rate == 0:
        return x + branch(x)
    samples = len(x)
    if rate > part_above:
        kept = max(1, int(samples * (1 - rate)))
        chosen = torch.randperm(samples, device=x.device)[:kept]
        return x.index_add(0, chosen, branch(x[chosen]).to(x.dtype), alpha=samples / kept)
    keep = torch.rand((samples,) + (1,) * (x.ndim - 1), device=x.device, dtype=x.dtype) >= rate
    return x + branch(x) * (keep.to(x.dtype) / (1 - rate))  # a factor per sample spares a pass over all values


class Sliced(nn.Module):
    """A module with layers that take narrowed inputs.

    Attributes:
        rescale: scale them by full width / active width.
    """

    rescale: bool = True


class Mlp(Sliced):
    """Two linear layers with GELU between; the hidden width follows the active width."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        hidden = self.fc1.out_features * width // self.fc1.in_features
        x = F.gelu(linear(x, self.fc1, hidden, rescale=self.rescale))
        return linear(x, self.fc2, width, rescale=self.rescale)


def image_grid(images: Tensor, step: int, what: str) -> tuple[int, int]:
    """Height and width of images (..., H, W) in cells of `step` pixels.

    Raises:
        ValueError: a side is no multiple of `step`; `what` names it.
    """
    height, width = images.shape[-2:]
    if height % step or width % step:
        raise ValueError(f"image of {height}x{width} pixels: both sides must be multiples of the {what} {step}")
    return height // step, width // step


def default_preprocess(image_size: int, channels: int) -> Preprocess:
    """The input of our own backbones: pictures with ImageNet statistics; small ones are shown whole, others cut to 224 of 256."""
    resize = Resize(rule="shortest", crop_ratio=1.0 if image_size <= 64 else 224 / 256)
    if channels == 3:
        return Preprocess(image=Image(size=(image_size, image_size), resize=resize))
    half = Normalise(rule="standard", mean=(0.5,) * channels, std=(0.5,) * channels, origin="range 0..1")
    names = ("grey",) if channels == 1 else tuple(f"channel{i}" for i in range(channels))
    return Preprocess(image=Image(channels=names, size=(image_size, image_size), resize=resize, normalise=half))


@dataclass(frozen=True)
class Fit:
    """What `Supernet.fit_budget` found.

    Attributes:
        subnet: the largest one within the budget.
        parameters: of its stand-alone model.
        latency_ms: median milliseconds per batch on this machine, None when only parameters were asked for.
        measured: subnet -> (parameters, latency_ms) of all that were tried.
    """

    subnet: Subnet
    parameters: int
    latency_ms: float | None
    measured: Mapping[Subnet, tuple[int, float | None]]


class Supernet(Backbone):
    """Base of elastic backbones whose subnets are all pairs of a width and a depth. A subclass sets the two tables and writes the
    two methods that raise here.

    Attributes:
        widths: of the subnets, ascending.
        depths: of the subnets, ascending; the largest pair is the intact network.
        rescale: narrowed inputs of layers are scaled by full width / active width.
    """

    widths: tuple[int, ...]
    depths: tuple[Depth, ...]
    rescale: bool = True

    def _set_rescale(self, rescale: bool) -> None:
        """Switch the scaling of all modules inside, once they are made."""
        self.rescale = rescale
        if not rescale:  # checkpoints name it only where it is off, so that those written before it existed mean the same
            self.arguments["rescale"] = rescale
        for module in self.modules():
            if isinstance(module, Sliced):
                module.rescale = rescale

    @property
    def intact(self) -> Subnet:
        """The full network."""
        return Subnet(self.widths[-1], self.depths[-1])

    def list_subnets(self) -> list[Subnet]:
        """All subnets, by width, then depth."""
        return [Subnet(width, depth) for width in self.widths for depth in self.depths]

    def sampling_pool(self, scale: float = 3.0) -> tuple[Subnet, ...]:
        """The multiset that training draws from; see the function of the same name."""
        return sampling_pool(self.widths, self.depths, scale)

    def check_subnet(self, subnet: Subnet | None) -> Subnet:
        """The subnet itself, or the intact one for None.

        Raises:
            ValueError: not on the grid of widths and depths.
        """
        if subnet is None:
            return self.intact
        if subnet.width not in self.widths or subnet.depth not in self.depths:
            first, last = (str(Subnet(0, depth)).partition("_d")[2] for depth in (self.depths[0], self.depths[-1]))
            raise ValueError(f"subnet {subnet}: widths are {', '.join(map(str, self.widths))} and depths {first}..{last}")
        return subnet

    def count_parameters(self, subnet: Subnet | None = None) -> int:
        """Parameters of the stand-alone model of a subnet."""
        raise NotImplementedError

    def extract(self, subnet: Subnet) -> Backbone:
        """A stand-alone model with a copy of the weights, in eval mode."""
        raise NotImplementedError

    def fit_budget(self, *, latency_ms: float | None = None, params: int | None = None, batch: int = 1, repeats: int = 15) -> Fit:
        """The largest subnet within a budget that is measured on this machine.

        Args:
            latency_ms: milliseconds per forward pass of `batch` images at the training size, by the stand-alone model, with the
                threads that torch has now; the median of `repeats` passes or more counts, as
                `okavango.models.backbone.latency` has it.
            params: parameters of the stand-alone model.
        Raises:
            ValueError: no budget given, or no subnet meets it; the message says what the smallest one needs.
        """
        if latency_ms is None and params is None:
            raise ValueError("fit_budget: give latency_ms=, params= or both")
        subnets = sorted(self.list_subnets(), key=lambda subnet: (self.count_parameters(subnet), subnet))
        fitting = [s for s in subnets if params is None or self.count_parameters(s) <= params]
        if not fitting:
            least = self.count_parameters(subnets[0])
            raise ValueError(f"fit_budget: no subnet has at most {params} parameters; the smallest has {least}")
        if latency_ms is None:
            best, count = fitting[-1], self.count_parameters(fitting[-1])
            return Fit(best, count, None, {best: (count, None)})
        measured: dict[Subnet, tuple[int, float]] = {}

        def meets(subnet: Subnet) -> bool:
            if subnet not in measured:
                measured[subnet] = (self.count_parameters(subnet), latency(self.extract(subnet), batch, repeats))
            return measured[subnet][1] <= latency_ms

        # Latency grows with parameters but not strictly (depth costs more time than width), so the neighbours above are tried too.
        low, high = 0, len(fitting)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if meets(fitting[middle]) else (low, middle)
        for subnet in fitting[low : low + 4]:
            meets(subnet)
        good = [s for s in fitting if s in measured and measured[s][1] <= latency_ms]
        if not good:
            smallest = min(measured, key=lambda s: measured[s][1])
            raise ValueError(
                f"fit_budget: no subnet takes at most {latency_ms:g} ms for a batch of {batch} here; "
                f"the fastest measured, {smallest}, takes {measured[smallest][1]:.2f} ms"
            )
        best = good[-1]
        return Fit(best, *measured[best], measured)
