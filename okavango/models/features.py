"""What goes into a backbone and what comes out of it: `TextBatch`, `Layer`, `Features`, `Subnet`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True)
class TextBatch:
    """Tokenised text.

    Attributes:
        ids: token ids, int64 (B, L).
        mask: True where a token counts, bool (B, L).
    """

    ids: Tensor
    mask: Tensor

    def to(self, *args, **kwargs) -> TextBatch:
        """Move both tensors to a device (the dtypes stay)."""
        return TextBatch(self.ids.to(*args, **kwargs), self.mask.to(*args, **kwargs))


@dataclass(frozen=True)
class Layer:
    """Activations after one block, before the final norm.

    Attributes:
        prefix: class and register tokens (B, P, D), or None.
        tokens: per modality (B, N, D); a convolutional stage is flattened row by row.
        grid: per modality, the sizes that N factors into, e.g. (14, 14).
    """

    prefix: Tensor | None
    tokens: dict[str, Tensor]
    grid: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Features:
    """What a backbone returns. A part that the backbone does not have is None (or empty), never faked.

    Attributes:
        pooled: one vector a sample (B, D).
        prefix: class and register tokens (B, P, D) after the final norm.
        tokens: per modality (B, N, D) after the final norm.
        token_mask: per modality bool (B, N), True where the token was computed from real input.
        grid: per modality, the sizes that N factors into, e.g. (14, 14) or (8, 8, 8).
        layers: block index -> `Layer`, before the final norm; only the indices asked for.
        maps: feature maps (B, C, H, W), fine to coarse.
        strides: input pixels per step of each map.
    """

    pooled: Tensor | None = None
    prefix: Tensor | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    token_mask: dict[str, Tensor] | None = None
    grid: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: dict[int, Layer] = field(default_factory=dict)
    maps: tuple[Tensor, ...] | None = None
    strides: tuple[int, ...] | None = None


for _class in (TextBatch, Layer, Features):
    _pytree.register_dataclass(
        _class,
        field_names=[f.name for f in dataclasses.fields(_class)],
        serialized_type_name=f"okavango.{_class.__name__}",
    )


@dataclass(frozen=True, order=True)
class Subnet:
    """Names a slice of an elastic backbone.

    Attributes:
        width: active channels (of the first stage, for hierarchical backbones).
        depth: active blocks; a tuple names one number per stage.
    """

    width: int
    depth: int | tuple[int, ...]

    def __str__(self) -> str:
        depth = "-".join(map(str, self.depth)) if isinstance(self.depth, tuple) else str(self.depth)
        return f"w{self.width}_d{depth}"

    @classmethod
    def parse(cls, text: str) -> Subnet:
        """Read what `str` wrote.

        Raises:
            ValueError: when `text` is not of the form ``w256_d8`` or ``w64_d3-4-6-3``.

        Example:
            >>> Subnet.parse("w256_d8")
            Subnet(width=256, depth=8)
        """
        match = re.fullmatch(r"w(\d+)_d(\d+(?:-\d+)*)", text)
        if not match:
            raise ValueError(f"subnet {text!r}: expected the form w256_d8 (or w64_d3-4-6-3 for a depth per stage)")
        depths = tuple(int(part) for part in match[2].split("-"))
        return cls(int(match[1]), depths if len(depths) > 1 else depths[0])


def to_device(inputs, device, dtype: torch.dtype | None = None):
    """Move a pytree of tensors; floating tensors are also cast when `dtype` is given."""

    def move(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if dtype is not None and leaf.is_floating_point() else None, non_blocking=True)

    return _pytree.tree_map(move, inputs)
