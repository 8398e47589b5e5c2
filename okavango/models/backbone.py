"""What every backbone is: named modalities in, `Features` out; and the table of architectures that the zoo can build."""

from __future__ import annotations

import difflib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from okavango.models.features import Features, Subnet, TextBatch
from okavango.models.preprocess import Preprocess, Text

Inputs = Mapping[str, Tensor | TextBatch]


@dataclass(frozen=True)
class FeatureInfo:
    """What `Features` of a backbone hold.

    Attributes:
        channels: D of `pooled`.
        layers: number of blocks or stages that can be asked for in `layers=`.
        layer_channels: channels of each of them.
        strides: input pixels per token or map step, of each of them.
        prefix: number of class and register tokens.
    """

    channels: int
    layers: int
    layer_channels: tuple[int, ...]
    strides: tuple[int, ...]
    prefix: int = 0


class Backbone(nn.Module):
    """Base of all backbones. A subclass sets the first four attributes and writes `forward`.

    Attributes:
        architecture: name that `create_model` knows; arguments: keyword arguments that rebuild it.
        preprocess: modality -> spec of the input; its keys are the modalities.
        feature_info: channels and strides (of the intact network, where it is elastic).
        mask_stride: input pixels per cell of `token_mask`, 0 where nothing can be hidden from the backbone.
        activation_checkpointing: recompute blocks in the backward pass; a backbone that cannot does not look at it.
    """

    architecture: str
    arguments: dict[str, Any]
    preprocess: Preprocess
    feature_info: FeatureInfo
    mask_stride: int = 0
    activation_checkpointing: bool = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the inputs that `forward` takes."""
        return tuple(self.preprocess)

    def __call__(
        self,
        inputs: Inputs | None = None,
        *,
        present: Tensor | None = None,
        token_mask: Mapping[str, Tensor] | None = None,
        subnet: Subnet | None = None,
        layers: Sequence[int] = (),
        **modalities: Any,
    ) -> Features:
        """`backbone({"image": x})`, or `backbone(image=x)` for short.

        Args:
            inputs: modality -> batch.
            present: bool (B, modalities), which modality each sample has; None means all.
            token_mask: modality -> bool (B, N), True where the cell is hidden from the network, row by row; a cell is a token, but
                for a hierarchical backbone, whose cells of `mask_stride` pixels may be smaller than its last tokens.
            subnet: the slice of an elastic backbone to run; None means the intact network.
            layers: indices of blocks to return in `Features.layers`; negative ones count from the end.
        Raises:
            ValueError: a modality that the backbone does not have, or none at all.
        """
        inputs = modalities if inputs is None else inputs
        unknown = [name for name in inputs if name not in self.preprocess]
        if unknown or not inputs:
            given = f"unknown modality {unknown[0]!r}" if unknown else "no input"
            raise ValueError(f"{type(self).__name__}: {given}; expected {', '.join(self.modalities)}")
        return super().__call__(inputs, present=present, token_mask=token_mask, subnet=subnet, layers=tuple(layers))

    def forward(self, inputs: Inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        raise NotImplementedError

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm after the last block, applied to tokens (..., D) of any layer, for those who read `Features.layers`.

        Raises:
            ValueError: the backbone has none, or its library does not tell it.
        """
        raise ValueError(f"{self.architecture}: has no final norm that could be applied to its layers")

    def layer_ids(self) -> dict[str, int]:
        """Parameter name -> depth for layer-wise learning-rate decay: 0 for the embedding, i + 1 for block i.

        Parameters that are not named (the final norm, heads) stand after the last block.
        """
        return {}


@runtime_checkable
class Elastic(Protocol):
    """What a backbone has besides when it holds subnets."""

    def list_subnets(self) -> list[Subnet]:
        """All subnets."""

    def check_subnet(self, subnet: Subnet | None) -> Subnet:
        """The subnet itself, or the intact one for None; ValueError where there is no such subnet."""

    def sampling_pool(self, scale: float) -> tuple[Subnet, ...]:
        """The multiset that training draws from, the intact network last; small subnets stand there up to `scale` ** 2 times."""

    def extract(self, subnet: Subnet) -> Backbone:
        """A stand-alone model with a copy of the weights."""


@torch.inference_mode()
def latency(model: Backbone, batch: int = 1, repeats: int = 15, seconds: float = 0.25) -> float:
    """Median milliseconds of a forward pass on zeros of the trained input size, where the model lies, with torch's threads.

    All modalities that come as arrays are given. Passes are as many as `seconds` hold, at least `repeats`: a few passes of a small
    network say more of what else the machine did in these milliseconds than of the network.
    """
    parameter = next(model.parameters())
    arrays = {name: spec for name, spec in model.preprocess.items() if not isinstance(spec, Text)}
    inputs = {
        name: torch.zeros(batch, len(spec.channels), *spec.size, device=parameter.device, dtype=parameter.dtype)
        for name, spec in arrays.items()
    }
    times: list[float] = []
    while len(times) < 3 + repeats or sum(times) < seconds:
        start = time.perf_counter()
        model(inputs)
        if parameter.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])  # the first ones are for caches


def resolve_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Block indices 0..count-1 from indices that may be negative.

    Raises:
        ValueError: an index out of range.
    """
    for index in layers:
        if not -count <= index < count:
            raise ValueError(f"layer {index}: this network has blocks 0..{count - 1}")
    return tuple(index % count for index in layers)


class ArgumentError(TypeError, ValueError):
    """An architecture does not take an argument."""


ARCHITECTURES: dict[str, Callable[..., Backbone]] = {}
Build = TypeVar("Build", bound=Callable[..., Backbone])


def register(build: Build) -> Build:
    """Decorator: the function's name becomes an architecture of the zoo."""
    ARCHITECTURES[build.__name__] = build
    return build


def architectures() -> dict[str, Callable[..., Backbone]]:
    """All architectures by name: our own and those that other packages offer by the entry point ``okavango.models``."""
    from okavango.models import adapters, bm_mae, elastic_resnet, elastic_swin, elastic_vit, selavpr  # noqa: F401  (register themselves)

    plugins = {point.name: point for point in entry_points(group="okavango.models") if point.name not in ARCHITECTURES}
    for name, point in plugins.items():
        ARCHITECTURES[name] = point.load()
    return dict(sorted(ARCHITECTURES.items()))


def create_model(name: str, **arguments: Any) -> Backbone:
    """Build an untrained backbone.

    Args:
        name: an architecture of `list_models()`, or ``timm/NAME``, ``torchvision/NAME``, ``open_clip/NAME`` for one of those
            libraries' image towers, ``monai/NAME`` for a segmentation network of volumes.
        **arguments: passed to the architecture; unknown ones raise.
    Raises:
        ValueError: unknown name, the message offers the nearest; or an argument that the architecture does not take.

    Example:
        >>> create_model("elastic_vit_tiny").modalities
        ('image',)
    """
    library, slash, rest = name.partition("/")
    if library == "monai" and slash:
        from okavango.models import monai_nets

        return monai_nets.create(rest, **arguments)
    if slash:
        from okavango.models import wrapped

        return wrapped.create(library, rest, **arguments)
    known = architectures()
    if name not in known:
        raise ValueError(unknown_name("architecture", name, known))
    try:
        model = known[name](**arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ArgumentError(f"architecture {name!r}: {error}") from error
    model.architecture = name
    if "arguments" not in vars(model):  # a class that records all its arguments is rebuilt even after defaults change
        model.arguments = arguments
    return model


def unknown_name(what: str, name: str, known) -> str:
    """One line for a name that nobody knows."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known: {', '.join(list(known)[:12])}{', ...' if len(known) > 12 else ''}"
