"""Classification of studies: the class token of a backbone of volumes, two linear layers, cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.downstream.classification.features import evaluating
from okavango.downstream.volumes import StudyObjective
from okavango.models.backbone import Backbone


class StudyHead(StudyObjective):
    """Base of the heads on one vector a study: `Features.pooled` -> outputs.

    Args:
        outputs: numbers per study.
        hidden: width between the two linear layers, 0 for one layer alone.
    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, backbone: Backbone, *, outputs: int, hidden: int = 256, **settings: Any):
        super().__init__(backbone, **settings)
        if hidden < 0:
            raise ValueError(f"hidden={hidden}; expected at least 0")
        self.hidden, width = hidden, backbone.feature_info.channels
        self.head = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs)) if hidden else nn.Linear(width, outputs)
        )
        self.train(self.training)

    def logits(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """(B, outputs).

        Args:
            inputs: modality -> (B, C, D, H, W), any subset. present: bool (B, modalities of the backbone), what each sample has.
        """
        inputs = {name: inputs[name] for name in self.modalities if name in inputs}
        if present is not None:
            present = present & torch.tensor([name in inputs for name in self.backbone.modalities], device=present.device)
        pooled = self.backbone(inputs, present=present).pooled
        if pooled is None:
            raise ValueError(f"{self.backbone.architecture} has no pooled features; studies are classified by them")
        return self.head(pooled)


class StudyClassifier(StudyHead):
    """Satisfies the objective contract and adds `predict`. Two classes have one output and a sigmoid, more a softmax.

    Args:
        classes: their names, in the order of the labels; of two, the second is the positive one.
        **settings: see `StudyHead` and `okavango.downstream.volumes.StudyObjective`.
    Raises:
        ValueError: fewer than two classes, or a name twice.
    """

    facts = ("label",)
    entry = "okavango.downstream.classification.studies:StudyClassifier"

    def __init__(self, backbone: Backbone, classes: Sequence[str], **settings: Any):
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ValueError(
                f"classifier: {len(classes)} classes, {len(set(classes))} different names; expected at least two, each once"
            )
        super().__init__(backbone, outputs=1 if len(classes) == 2 else len(classes), **settings)
        self.classes = tuple(classes)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """ "loss": scalar, with gradient; "accuracy": of the batch, 0..1."""
        logits, label = self.logits(batch, batch["present"]).float(), batch["label"]
        if len(self.classes) == 2:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], label.float())
            said = (logits.detach()[:, 0] > 0).long()
        else:
            loss, said = F.cross_entropy(logits, label), logits.detach().argmax(1)
        return {"loss": loss, "accuracy": (said == label).float().mean()}

    def predict(self, inputs: Mapping[str, Tensor], *, present: Tensor | None = None) -> Tensor:
        """Probabilities, float32 (B, classes), rows sum to 1; run in eval mode without gradients."""
        with evaluating(self), torch.no_grad():
            logits = self.logits(inputs, present).float()
        if len(self.classes) > 2:
            return logits.softmax(1)
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], 1)

    def head_config(self) -> dict[str, Any]:
        """What rebuilds this head around its backbone: for `save_checkpoint(head=...)`."""
        return {"entry": self.entry, "arguments": {"classes": list(self.classes), "hidden": self.hidden, **self.arguments()}}

    def exports(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """The trained classifier and what its card says."""
        return {"classifier": (self, {"task": "classification of studies", **self.head_config()["arguments"]})}
