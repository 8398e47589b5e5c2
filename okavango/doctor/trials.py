"""What a suggestion is worth: k-NN accuracy on a labelled sample, the contract as it stands against each alternative, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from okavango.data.sources import Source
from okavango.doctor.seen import said_otherwise
from okavango.downstream.classification import knn
from okavango.downstream.classification.features import evaluating
from okavango.models.backbone import Backbone
from okavango.models.features import to_device
from okavango.models.preprocess import Preprocess, PreprocessError
from okavango.zoo.leaderboard.records import bootstrap, paired_bootstrap

NEIGHBOURS = 20
MARGIN = 0.01  # a difference counts when its whole interval lies beyond this


@dataclass(frozen=True)
class Candidate:
    """A contract to try.

    Attributes:
        name: a few words. preprocess: the contract. data: what the data say of themselves otherwise (rasters).
        check: the check that suggests it, "" for the contract as it stands and for comparisons that are always made.
    """

    name: str
    preprocess: Preprocess
    data: Mapping[str, Any]
    check: str = ""


@dataclass(frozen=True)
class Trial:
    """How well a candidate does.

    Attributes:
        name, check: of the candidate.
        accuracy: 0..1, and its 95 % interval; None where the contract refuses the data.
        difference: mean, low and high of its accuracy minus that of the contract as it stands on the same samples (95 %); None for
            that one itself, and where either is refused.
        samples: how many were asked.
        refused: what the contract says.
    """

    name: str
    check: str = ""
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    difference: tuple[float, float, float] | None = None
    samples: int = 0
    refused: str = ""

    @property
    def better(self) -> bool:
        """Better than the contract as it stands, beyond chance; also where that one refuses the data and this one does not."""
        return self.difference is not None and self.difference[1] > MARGIN

    @property
    def worse(self) -> bool:
        """Worse than the contract as it stands, beyond chance."""
        return self.difference is not None and self.difference[2] < -MARGIN


def compare(
    model: Backbone,
    modality: str,
    source: Source,
    indices: Sequence[int],
    candidates: Sequence[Candidate],
    *,
    seed: int = 0,
    batch: int = 64,
) -> list[Trial]:
    """Leave one out: the class of each sample by the votes of its 20 nearest others (weights as in the protocol ``knn/v1``).

    Args:
        model: runs where it is, in eval mode.
        source: labelled; samples are read once for each candidate.
        indices: samples that can be read.
        candidates: the first is the contract as it stands.
        seed: of the bootstrap.
        batch: samples per forward pass.
    Returns:
        one trial per candidate.
    """
    assert source.labels is not None
    labels = np.asarray(source.labels)[list(indices)]
    trials: list[Trial] = []
    standing: np.ndarray | None = None
    for number, candidate in enumerate(candidates):
        try:
            features = _embed(model, modality, source, indices, candidate, batch)
        except (PreprocessError, RuntimeError, ValueError) as error:  # also a network that does not take the size
            trials.append(Trial(candidate.name, candidate.check, refused=str(error).splitlines()[0]))
            continue
        correct = _leave_one_out(features, labels) == labels
        if number == 0:
            standing = correct
        difference = None if number == 0 or standing is None else paired_bootstrap(correct, standing, seed)
        trials.append(
            Trial(
                candidate.name,
                candidate.check,
                float(correct.mean()),
                bootstrap(correct, seed),
                difference,
                len(correct),
            )
        )
    return trials


def _embed(model: Backbone, modality: str, source: Source, indices: Sequence[int], candidate: Candidate, batch: int) -> np.ndarray:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    rows = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(indices), batch):
            images = [said_otherwise(source[int(i)]["image"], candidate.data) for i in indices[start : start + batch]]
            inputs = candidate.preprocess(**{modality: images})
            pooled = model(to_device(inputs, device)).pooled
            if pooled is None:
                raise ValueError(f"{type(model).__name__} has no pooled features")
            rows.append(pooled.float().cpu().numpy())
    return np.concatenate(rows)


def _leave_one_out(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Class of each row by its nearest others, int (N,)."""
    k = min(NEIGHBOURS, len(features) - 1)
    similarities, neighbours = knn.nearest(features, features, k + 1)
    own = neighbours == np.arange(len(features))[:, None]
    own[~own.any(1), -1] = True  # among more copies than neighbours, a row need not find itself
    shape = (len(features), k)
    similarities, neighbours = similarities[~own].reshape(shape), neighbours[~own].reshape(shape)
    return knn.vote(similarities, labels[neighbours], (k,))[k]
