"""Survival from studies in discrete time: a logistic hazard per interval (Gensheimer and Narasimhan, arXiv 1805.00917)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.data.studies import Prepared
from okavango.downstream.classification.features import evaluating
from okavango.downstream.classification.studies import StudyHead
from okavango.models.backbone import Backbone

RISKS = ("hazard", "logits")


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share that survives (Kaplan and Meier 1958).

    Args:
        time: (N,), at least 0; event: bool (N,), whether it was seen at that time.
    Returns:
        the different times, ascending, and the share after each, both (M,).
    """
    times, where = np.unique(time, return_inverse=True)
    ends = np.bincount(where, minlength=len(times))
    seen = np.bincount(where, weights=np.asarray(event, float), minlength=len(times))
    at_risk = len(time) - np.concatenate([[0], np.cumsum(ends)[:-1]])
    return times, np.cumprod(1 - seen / at_risk)


def quantile_cuts(time: np.ndarray, event: np.ndarray, bins: int = 10, *, official: bool = False) -> np.ndarray:
    """Times that cut survival, not time, into equal parts: of `bins` levels from the lowest share to 1, the latest time of each.

    Args:
        bins: levels and greatest number of cuts; equal times are merged, so there may be fewer.
        official: the first cut is *replaced* by 0, as in the published code, even where the earliest patients were censored and it
            is later than that; otherwise 0 stands in front of the cuts of one level less then.
    Returns:
        float64, ascending, the first is 0.
    Raises:
        ValueError: no event, fewer than two bins, negative or undefined times.
    """
    time, event = np.asarray(time, float), np.asarray(event, bool)
    if bins < 2 or not event.any() or not np.isfinite(time).all() or (time < 0).any():
        raise ValueError(
            f"survival: {bins} bins, {int(event.sum())} events of {len(time)} studies; expected at least 2 bins and 1 event, "
            "and times of at least 0"
        )
    times, share = kaplan_meier(time, event)
    times, share = np.concatenate([[0.0], times]), np.concatenate([[1.0], share])

    def latest(count: int) -> np.ndarray:
        # the share falls with time: the last place where it is still at least the level
        return np.unique(times[np.searchsorted(-share, -np.linspace(share.min(), 1, count), side="right") - 1])

    cuts = latest(bins)
    if cuts[0] > 0 and not official:
        return np.concatenate([[0.0], latest(bins - 1)])
    cuts[0] = 0
    return cuts


def discretise(time: np.ndarray, event: np.ndarray, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each time: an event belongs to the first cut not before it, a censored time to the last cut not after it.

    An event after the last cut counts as censored there.

    Returns:
        int64 (N,), and events, bool (N,).
    """
    time, event = np.asarray(time, float), np.asarray(event, bool) & (np.asarray(time) <= cuts[-1])
    index = np.where(event, np.searchsorted(cuts, time, side="left"), np.searchsorted(cuts, time, side="right") - 1)
    return np.clip(index, 0, len(cuts) - 1), event


def hazard_nll(logits: Tensor, index: Tensor, event: Tensor) -> Tensor:
    """Negative log-likelihood of logistic hazards, a mean over samples.

    Each interval up to a sample's own is a binary question, answered by no, and in the last one by whether the event was seen.

    Args:
        logits: (N, bins); index: int64 (N,); event: (N,), bool or 0/1.
    """
    target = torch.zeros_like(logits).scatter_(1, index[:, None], event.to(logits.dtype)[:, None])
    terms = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    asked = torch.arange(logits.shape[1], device=logits.device) <= index[:, None]
    return (terms * asked).sum(1).mean()


def survival(logits: Tensor) -> Tensor:
    """Share that survives each cut, (N, bins)."""
    return F.logsigmoid(-logits).cumsum(1).exp()


def risk(logits: Tensor, rule: Literal["hazard", "logits"] = "hazard") -> Tensor:
    """One number a sample, higher for an earlier event, (N,).

    Args:
        rule: "hazard" is the cumulative hazard summed over the cuts; "logits" the sum of raw logits that the published code takes.
    """
    return logits.sum(1) if rule == "logits" else -F.logsigmoid(-logits).cumsum(1).sum(1)


class SurvivalHead(StudyHead):
    """Satisfies the objective contract and adds `predict`.

    Args:
        bins: intervals.
        cuts: times that divide them; () fits them to the training part (never to what is tested on) when the run starts.
        official: see `quantile_cuts`, for the fit.
        **settings: see `StudyHead` and `okavango.downstream.volumes.StudyObjective`.
    Raises:
        ValueError: more cuts than bins.
    """

    facts = ("time", "event")
    entry = "okavango.downstream.classification.survival:SurvivalHead"

    def __init__(self, backbone: Backbone, *, bins: int = 10, cuts: Sequence[float] = (), official: bool = False, **settings: Any):
        super().__init__(backbone, outputs=bins, **settings)
        if len(cuts) > bins:
            raise ValueError(f"survival: {len(cuts)} cuts for {bins} bins")
        self.bins, self.cuts, self.official = bins, tuple(map(float, cuts)), official

    def samples(self, source: Any) -> Prepared:
        """See `StudyObjective`; fits the cuts where there are none."""
        if not self.cuts:
            time, event = times(source)
            self.cuts = tuple(quantile_cuts(time, event, self.bins, official=self.official).tolist())
        return super().samples(source)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """ "loss": the negative log-likelihood, scalar, with gradient."""
        logits = self.logits(batch, batch["present"]).float()
        index, event = discretise(batch["time"].cpu().numpy(), batch["event"].cpu().numpy(), np.asarray(self.cuts))
        index_there, event_there = torch.from_numpy(index).to(logits.device), torch.from_numpy(event).to(logits.device)
        return {"loss": hazard_nll(logits, index_there, event_there)}

    def predict(self, inputs: Mapping[str, Tensor], *, present: Tensor | None = None) -> Tensor:
        """Share that survives each of `cuts`, float32 (B, cuts); run in eval mode without gradients."""
        with evaluating(self), torch.no_grad():
            return survival(self.logits(inputs, present).float()[:, : len(self.cuts)])

    def head_config(self) -> dict[str, Any]:
        """What rebuilds this head around its backbone: for `save_checkpoint(head=...)`."""
        own = {"bins": self.bins, "cuts": list(self.cuts), "official": self.official, "hidden": self.hidden}
        return {"entry": self.entry, "arguments": {**own, **self.arguments()}}

    def exports(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """The trained head and what its card says."""
        return {"survival": (self, {"task": "survival", **self.head_config()["arguments"]})}


def times(source: Any) -> tuple[np.ndarray, np.ndarray]:
    """Time and event of all studies that have them, float64 and bool; without opening files where the source has `facts`.

    Raises:
        ValueError: no study has a time.
    """
    if hasattr(source, "facts"):
        facts = [facts for facts in source.facts if facts.get("time")]
        pairs = [(float(each["time"]), bool(float(each.get("event") or 0))) for each in facts]
    else:
        samples = (source[index] for index in range(len(source)))
        pairs = [(float(sample["time"]), bool(sample["event"])) for sample in samples if sample.get("time") is not None]
    if not pairs:
        raise ValueError(f"data {source.name!r}: no study has a time; survival needs columns time and event")
    time, event = zip(*pairs, strict=True)
    return np.array(time), np.array(event)


def evaluate_survival(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    curves: np.ndarray,
    cuts: np.ndarray,
    risks: np.ndarray,
) -> dict[str, float]:
    """C-index (Harrell) and, where it is defined, the integrated Brier score, by scikit-survival.

    Args:
        train, test: times and events; the training part tells how patients are censored.
        curves: share that survives each cut, (N, cuts). cuts: float64. risks: (N,).
    Returns:
        "c_index", 0..1; "brier": over the cuts that lie inside the follow-up of both parts, left out where fewer than two do, or
        where a test time lies beyond the training part's.
    Raises:
        ValueError: no two studies can be compared.
    """
    from sksurv.metrics import concordance_index_censored, integrated_brier_score
    from sksurv.util import Surv

    time, event = test
    if not (event & (time < time.max())).any():
        raise ValueError("survival: no event comes before another time, so nothing can be ordered; give more studies")
    found = {"c_index": float(concordance_index_censored(event, time, risks)[0])}
    inside = (cuts >= time.min()) & (cuts < min(time.max(), train[0].max()))
    if inside.sum() >= 2 and time[event].max(initial=0) <= train[0].max():
        structured = Surv.from_arrays(train[1], train[0]), Surv.from_arrays(event, time)
        found["brier"] = float(integrated_brier_score(*structured, curves[:, inside], cuts[inside]))
    return found
