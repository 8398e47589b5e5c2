"""Named fine-tuning recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from okavango.pretrain.settings import Optim, Recipe, Run


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """A linear classifier on a backbone; see `okavango.downstream.classification.head.Classifier`."""

    frozen: bool = False
    """train the head alone"""
    smoothing: float = 0.1
    """label smoothing"""
    layer_decay: float = 0.65
    """factor on the learning rate from one block to the one before it"""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """area of a training crop over the area of the picture"""
    flip: float = 0.5
    """probability of a horizontal flip"""

    def build(self, backbone, classes, run):
        """The objective for a backbone and the classes of the data."""
        from dataclasses import asdict

        from okavango.downstream.classification.head import Classifier

        if not classes:
            raise ValueError("fine-tuning needs labels: pictures in one sub-folder per class, or shards with .cls members")
        return Classifier(backbone, classes, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """A recipe of classification; `start` names the checkpoint, whose architecture is used when `model` is empty."""

    model: str = ""
    """architecture, "" for that of the checkpoint"""
    objective: ClassifierSettings = field(default_factory=ClassifierSettings)
    """settings of the classifier"""


def classify() -> FinetuneRecipe:
    """Fine-tune all of a backbone for classification, as is usual for pretrained ViTs: layer decay, smoothing, weight average."""
    return FinetuneRecipe(
        name="classify",
        optim=Optim(
            lr=1e-3, lr_batch=256, lr_scaling="linear", lr_end=1e-6, warmup=0.1, weight_decay=(0.05, 0.05), clip=1.0, ema=0.999
        ),
        run=Run(steps=2000, batch=64, save_every=500, eval_every=0),
    )


def classify_frozen() -> FinetuneRecipe:
    """Train the classifier alone on a frozen backbone."""
    recipe = classify()
    return replace(
        recipe,
        name="classify_frozen",
        objective=replace(recipe.objective, frozen=True, smoothing=0.0, layer_decay=1.0),
        optim=replace(recipe.optim, weight_decay=(0.0, 0.0), ema=0.0),
    )


FINETUNE: dict[str, Callable[[], FinetuneRecipe]] = {"classify": classify, "classify_frozen": classify_frozen}
