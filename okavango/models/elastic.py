"""What the elastic backbones share: which blocks a subnet keeps, the largest subnet within a budget, the default input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from okavango.models.backbone import Backbone, latency
from okavango.models.features import Subnet
from okavango.models.preprocess import Image, Normalise, Preprocess, Resize


def kept_blocks(depth: int, total: int) -> tuple[int, ...]:
    """Indices of the blocks that a subnet of `depth` keeps out of `total`: evenly spaced, truncated, first and last included."""
    return tuple(np.linspace(0, total - 1, depth).astype(np.int64).tolist())


def image_preprocess(image_size: int, channels: int) -> Preprocess:
    """The default input: pictures with ImageNet statistics; small ones are shown whole, others cut to 224 of 256 pixels."""
    resize = Resize(rule="shortest", crop_ratio=1.0 if image_size <= 64 else 224 / 256)
    if channels == 3:
        return Preprocess(image=Image(size=(image_size, image_size), resize=resize))
    half = Normalise(rule="standard", mean=(0.5,) * channels, std=(0.5,) * channels, origin="range 0..1")
    names = ("grey",) if channels == 1 else tuple(f"channel{i}" for i in range(channels))
    return Preprocess(image=Image(channels=names, size=(image_size, image_size), resize=resize, normalise=half))


@dataclass(frozen=True)
class Fit:
    """What `fit_budget` found.

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


class FitBudget:
    """Mixin of elastic backbones; the backbone itself has the first three methods."""

    def list_subnets(self) -> list[Subnet]:
        raise NotImplementedError

    def count_parameters(self, subnet: Subnet | None = None) -> int:
        raise NotImplementedError

    def extract(self, subnet: Subnet) -> Backbone:
        raise NotImplementedError

    def fit_budget(self, *, latency_ms: float | None = None, params: int | None = None, batch: int = 1, repeats: int = 15) -> Fit:
        """The largest subnet within a budget that is measured on this machine.

        Args:
            latency_ms: milliseconds per forward pass of `batch` images at the training size, by the stand-alone model, with the
                threads that torch has now; the median of `repeats` passes counts.
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
