"""Named fine-tuning recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from okavango.downstream.retrieval.views import Views
from okavango.pretrain.settings import Optim, Recipe, Run, ScanRecipe, require


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
    randaugment: str = ""
    """timm's policy of RandAugment, such as rand-m9-mstd0.5-inc1; none where empty"""
    erasing: float = 0.0
    """probability that a rectangle becomes noise"""
    mixup: float = 0.0
    """parameter of the Beta distribution of mixup, 0 for none"""
    cutmix: float = 0.0
    """parameter of the Beta distribution of CutMix, 0 for none; with mixup, one of the two is drawn for each batch"""
    pool: Literal["pooled", "stages"] = "pooled"
    """what is classified: the pooled features, or the concatenated means of the last three stages"""

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
    """architecture, "" for that of the checkpoint, of which `model_args` change arguments then (drop_path)"""
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


IMAGENET_STEPS = 625  # of 2048 pictures: one pass over ImageNet-1k
SCHEDULE_EPOCHS = 200  # that the published cosine is laid out over, however long the run


def _published(
    name: str, lr: float, layer_decay: float, epochs: int, drop_path: float, pool: Literal["pooled", "stages"] = "pooled"
) -> FinetuneRecipe:
    """POA's fine-tuning on ImageNet-1k (arXiv 2408.01031, D.2, and the released code); docs/evaluation.md says what is a guess."""
    return FinetuneRecipe(
        name=name,
        model_args={"drop_path": drop_path},
        objective=ClassifierSettings(
            smoothing=0.1,
            layer_decay=layer_decay,
            crop_scale=(0.08, 1.0),
            randaugment="rand-m9-mstd0.5-inc1",
            erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
            pool=pool,
        ),
        optim=Optim(
            lr=lr,
            lr_batch=2048,
            lr_scaling="linear",
            lr_end=1e-6,
            warmup=0.1,
            stretch=epochs / SCHEDULE_EPOCHS,
            weight_decay=(0.05, 0.05),
            clip=0.0,
            ema=0.7,
        ),
        run=Run(steps=epochs * IMAGENET_STEPS, batch=2048, precision="bf16", save_every=2000, workers=8),
    )


def classify_vit_s() -> FinetuneRecipe:
    """POA's fine-tuning of ViT-S/16: 200 epochs of ImageNet-1k."""
    return _published("classify_vit_s", lr=0.002, layer_decay=0.55, epochs=200, drop_path=0.1)


def classify_vit_b() -> FinetuneRecipe:
    """POA's fine-tuning of ViT-B/16: 100 epochs of ImageNet-1k, half of the cosine."""
    return _published("classify_vit_b", lr=0.0007, layer_decay=0.4, epochs=100, drop_path=0.2)


def classify_vit_l() -> FinetuneRecipe:
    """POA's fine-tuning of ViT-L/16: 50 epochs of ImageNet-1k, a quarter of the cosine."""
    return _published("classify_vit_l", lr=0.0018, layer_decay=0.6, epochs=50, drop_path=0.2)


def classify_swin_t() -> FinetuneRecipe:
    """POA's fine-tuning of Swin-T: 200 epochs of ImageNet-1k."""
    return _published("classify_swin_t", lr=0.0014, layer_decay=0.6, epochs=200, drop_path=0.1)


def classify_swin_s() -> FinetuneRecipe:
    """POA's fine-tuning of Swin-S: 100 epochs of ImageNet-1k, half of the cosine."""
    return _published("classify_swin_s", lr=0.001, layer_decay=0.4, epochs=100, drop_path=0.2)


def classify_swin_b() -> FinetuneRecipe:
    """POA's fine-tuning of Swin-B: 50 epochs of ImageNet-1k, a quarter of the cosine."""
    return _published("classify_swin_b", lr=0.0007, layer_decay=0.55, epochs=50, drop_path=0.2)


def classify_resnet_50() -> FinetuneRecipe:
    """POA's fine-tuning of ResNet-50: 100 epochs of ImageNet-1k, half of the cosine; the means of three stages are classified."""
    return _published("classify_resnet_50", lr=0.0014, layer_decay=0.6, epochs=100, drop_path=0.1, pool="stages")


def classify_resnet_101() -> FinetuneRecipe:
    """POA's fine-tuning of ResNet-101: 100 epochs of ImageNet-1k, half of the cosine; the means of three stages are classified."""
    return _published("classify_resnet_101", lr=0.001, layer_decay=0.4, epochs=100, drop_path=0.2, pool="stages")


def classify_resnet_152() -> FinetuneRecipe:
    """POA's fine-tuning of ResNet-152: 100 epochs of ImageNet-1k, half of the cosine; the means of three stages are classified."""
    return _published("classify_resnet_152", lr=0.0007, layer_decay=0.45, epochs=100, drop_path=0.2, pool="stages")


@dataclass(frozen=True, kw_only=True)
class PlaceSettings:
    """Place recognition with a frozen backbone; see `okavango.downstream.retrieval.head.PlaceRecognition`.

    The first six say how a backbone is adapted; one that is adapted already stays as it is.
    """

    adapt: Literal["bottleneck", "lora", "none"] = "bottleneck"
    """what is trained inside the frozen backbone"""
    ratio: float = 0.5
    """channels of a bottleneck over those of its block"""
    last: int = 0
    """bottlenecks in this many blocks at the end only, 0 for all: blocks before them keep nothing for the backward pass"""
    rank: int = 8
    """rank of LoRA"""
    pool: Literal["gem", "mean", "max", "cls"] = "gem"
    """how the global descriptor is pooled"""
    local: bool = True
    """train local descriptors for re-ranking as well"""
    mine_every: int = 250
    """steps between choices of positives and negatives"""
    mining: Literal["partial", "full", "random"] = "partial"
    """negatives: the nearest of some database pictures, the nearest of all, or any"""
    pool_size: int = 1000
    """database pictures that partial mining draws"""
    negatives: int = 2
    """negatives per query"""
    positive_radius: float = 10.0
    """metres within which a picture shows the same place"""
    negative_radius: float = 25.0
    """metres within which nothing is a negative"""
    margin: float = 0.1
    """of the triplet loss on global descriptors"""
    local_weight: float = 1.0
    """weight of the loss on local matches"""
    views: Views = field(default_factory=Views)
    """how training pictures are changed"""
    adapters_only: bool = False
    """export what was trained alone; the frozen network is read from the checkpoint that the run started from, or from base/"""

    def check(self, prefix: str = "objective.") -> None:
        """Refuse values out of range; see `require`."""
        require(self, prefix, 1, names="rank mine_every pool_size negatives")
        require(self, prefix, 0, names="last margin local_weight positive_radius")
        require(self, prefix, self.positive_radius, names="negative_radius")
        require(self, prefix, 0.001, names="ratio")

    def build(self, backbone, classes, run):
        """The objective for a backbone; the data must be places."""
        from okavango.downstream.retrieval.head import PlaceRecognition
        from okavango.models.adapters import Adapted, adapt

        if not isinstance(backbone, Adapted):
            how: dict[str, Any] = {"kind": self.adapt}
            how |= {"bottleneck": {"ratio": self.ratio, "last": self.last}, "lora": {"rank": self.rank}, "none": {}}[self.adapt]
            width = backbone.feature_info.layer_channels[-1]
            backbone = adapt(backbone, adapt=how, pool=self.pool, local=(width // 4, width // 8) if self.local else ())
        return PlaceRecognition(
            backbone,
            batch=run.batch,
            mine_every=self.mine_every,
            mining=self.mining,
            pool=self.pool_size,
            negatives=self.negatives,
            positive_radius=self.positive_radius,
            negative_radius=self.negative_radius,
            margin=self.margin,
            local_weight=self.local_weight,
            views=self.views,
            seed=run.seed,
            workers=run.workers,
        )


@dataclass(frozen=True, kw_only=True)
class PlaceRecipe(Recipe):
    """A recipe of place recognition; `start` names the checkpoint, whose architecture is used when `model` is empty."""

    model: str = ""
    """architecture, "" for that of the checkpoint"""
    objective: PlaceSettings = field(default_factory=PlaceSettings)
    """settings of place recognition"""
    val: str = ""
    """places that --eval-every measures recall on; images/val or val of --data where empty"""
    val_top: int = 100
    """candidates that are ordered anew by local descriptors there, 0 for none"""


def places() -> PlaceRecipe:
    """Adapt any checkpoint to place recognition: database/ and queries/ with positions in the names of their pictures."""
    return PlaceRecipe(
        name="places",
        optim=Optim(lr=1e-4, lr_scaling="none", lr_end=1e-6, warmup=0.05, weight_decay=(0.0, 0.0), clip=1.0),
        run=Run(steps=5000, batch=4),
    )


def selavpr_msls() -> PlaceRecipe:
    """The published first stage of SelaVPR on MSLS: DINOv2 ViT-L/14, Adam at 1e-5; 10 epochs of 30,000 queries, not run by us."""
    return PlaceRecipe(
        name="selavpr_msls",
        model="selavpr_vit_large",
        model_args={"pretrained": True},
        optim=Optim(lr=1e-5, lr_scaling="none", lr_end=1e-5, warmup=0.0, weight_decay=(0.0, 0.0), clip=0.0),
        run=Run(steps=75_000, batch=4, save_every=1000, workers=8),
    )


def selavpr_pitts30k() -> PlaceRecipe:
    """The published second stage of SelaVPR on Pitts30k, from what the first exported; 10 epochs of 5,000 queries; not run."""
    recipe = selavpr_msls()
    return replace(recipe, name="selavpr_pitts30k", model="", model_args={}, run=replace(recipe.run, steps=12_500))


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What all heads on studies of scans share; see `okavango.downstream.volumes.StudyObjective`."""

    modalities: tuple[str, ...] = ()
    """sequences that are used, all of the backbone's where empty"""
    frozen: bool = False
    """train the head alone"""
    layer_decay: float = 1.0
    """factor on the learning rate from one block to the one before it"""
    decay_vectors: bool = True
    """weight decay on norms and biases too, as published"""
    drop: float = 0.0
    """probability that a study is seen with a random subset of its sequences; one model for all subsets then"""
    crop: Literal["centre", "random"] = "centre"
    """the middle of the volume, or windows from anywhere in it, every second one around a segmented voxel"""
    flip: float = 0.5
    """probability of a flip along each axis"""
    scale: float = 0.1
    """values are multiplied by 1 + up to this, up or down"""
    shift: float = 0.1
    """values are moved by up to this, up or down, in standard deviations"""
    cache: str = ""
    """folder for prepared studies, which spares reading and resampling them again; none where empty"""

    def check(self, prefix: str = "objective.") -> None:
        """Refuse values out of range; see `require`."""
        require(self, prefix, 0, 1, names="drop flip scale")
        require(self, prefix, 0.001, 1, names="layer_decay")
        require(self, prefix, 0, names="shift")


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(StudySettings):
    """A segmentation head on a backbone of volumes; see `okavango.downstream.segmentation.head.Segmenter`."""

    labels: tuple[str, ...] = ()
    """names of the label numbers 1, 2, ... that exclude each other; tumour core, whole and enhancing tumour where empty"""
    decoder: Literal["unetr", "linear"] = "unetr"
    """what is put on the tokens: a UNETR, or one linear layer"""
    feature_size: int = 16
    """channels of the UNETR at full size"""
    layers: tuple[int, ...] = ()
    """blocks that it reads, evenly spaced ones where empty"""
    loss: Literal["dice_bce", "official"] = "dice_bce"
    """Dice with binary cross-entropy, or, as published, with softmax cross-entropy"""
    class_token: bool = True
    """keep the class token in the encoder; the published network has none"""

    def check(self, prefix: str = "objective.") -> None:
        """Refuse values out of range; see `require`."""
        StudySettings.check(self, prefix)
        require(self, prefix, 1, names="feature_size")

    def build(self, backbone, classes, run):
        """The objective for a backbone; regions or `labels` are the classes."""
        from dataclasses import asdict

        from okavango.downstream.segmentation.head import Segmenter

        settings = asdict(self)
        if not settings.pop("class_token") and backbone.arguments.get("class_token"):
            from okavango.models.backbone import create_model
            from okavango.zoo.loading import load_weights

            found, backbone = backbone, create_model(backbone.architecture, **{**backbone.arguments, "class_token": False})
            load_weights(backbone, found.state_dict(), skip={"cls_token": "class_token is off"})
            backbone.preprocess = found.preprocess
        return Segmenter(backbone, **settings)


@dataclass(frozen=True, kw_only=True)
class StudyClassSettings(StudySettings):
    """A classifier of studies; see `okavango.downstream.classification.studies.StudyClassifier`."""

    hidden: int = 256
    """width between two linear layers, 0 for one layer alone"""

    def build(self, backbone, classes, run):
        """The objective for a backbone and the classes of the data."""
        from dataclasses import asdict

        from okavango.downstream.classification.studies import StudyClassifier

        if not classes:
            raise ValueError("classification of studies needs a table with a column label: studies.csv")
        return StudyClassifier(backbone, classes, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class SurvivalSettings(StudySettings):
    """Survival from studies; see `okavango.downstream.classification.survival.SurvivalHead`."""

    hidden: int = 256
    """width between two linear layers, 0 for one layer alone"""
    bins: int = 10
    """intervals of time"""
    official: bool = False
    """replace the first cut by 0 as published, rather than put 0 in front"""

    def check(self, prefix: str = "objective.") -> None:
        """Refuse values out of range; see `require`."""
        StudySettings.check(self, prefix)
        require(self, prefix, 2, names="bins")

    def build(self, backbone, classes, run):
        """The objective for a backbone; the cuts are fitted to the data when the run starts."""
        from dataclasses import asdict

        from okavango.downstream.classification.survival import SurvivalHead

        return SurvivalHead(backbone, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class StudyRecipe(ScanRecipe):
    """A recipe of a head on studies; `start` names the checkpoint, whose architecture is used when `model` is empty."""

    model: str = ""
    """architecture, "" for that of the checkpoint, of which `model_args` change arguments then; monai/SegResNet and others"""


@dataclass(frozen=True, kw_only=True)
class SegmentRecipe(StudyRecipe):
    """A recipe of segmentation."""

    objective: SegmentSettings = field(default_factory=SegmentSettings)
    """settings of the segmenter"""


@dataclass(frozen=True, kw_only=True)
class StudyClassRecipe(StudyRecipe):
    """A recipe of classification of studies."""

    objective: StudyClassSettings = field(default_factory=StudyClassSettings)
    """settings of the classifier"""


@dataclass(frozen=True, kw_only=True)
class SurvivalRecipe(StudyRecipe):
    """A recipe of survival."""

    objective: SurvivalSettings = field(default_factory=SurvivalSettings)
    """settings of the survival head"""


def _adamw(lr: float, warmup: float, weight_decay: float, stretch: float = 1.0) -> Optim:
    """As BM-MAE's scripts have it: no scaling with the batch, no clipping; the cosine ends at 0."""
    return Optim(
        lr=lr,
        lr_scaling="none",
        lr_end=0.0,
        warmup=warmup,
        warmup_rule="below",
        stretch=stretch,
        weight_decay=(weight_decay,) * 2,
        clip=0.0,
    )


def segment_bm_mae() -> SegmentRecipe:
    """BM-MAE's fine-tuning for BraTS (arXiv 2505.00568): 70 epochs, all layers trained, the published loss and network."""
    return SegmentRecipe(
        name="segment_bm_mae",
        objective=SegmentSettings(loss="official", class_token=False),
        optim=_adamw(5e-4, warmup=10 / 70, weight_decay=0.05),
        run=Run(epochs=70, batch=2, workers=8),
    )


def segment_bm_mae_tiny() -> SegmentRecipe:
    """Segmentation for trying things out: one model for all subsets, windows from anywhere, Dice and binary cross-entropy."""
    return SegmentRecipe(
        name="segment_bm_mae_tiny",
        objective=SegmentSettings(feature_size=8, drop=0.5, crop="random", decay_vectors=False),
        optim=_adamw(1e-3, warmup=0.1, weight_decay=0.05),
        run=Run(steps=300, batch=4, save_every=100),
    )


def classify_bm_mae() -> StudyClassRecipe:
    """BM-MAE's classification of studies: class token and two layers, 20 epochs, dropout 0.1; the table says the classes."""
    return StudyClassRecipe(
        name="classify_bm_mae",
        model_args={"dropout": 0.1},
        optim=_adamw(1e-4, warmup=5 / 20, weight_decay=0.05),
        run=Run(epochs=20, batch=2, workers=8),
    )


def survive_bm_mae() -> SurvivalRecipe:
    """BM-MAE's survival in ten intervals: 10 epochs, half of the cosine, dropout 0.1; the table has times and events."""
    return SurvivalRecipe(
        name="survive_bm_mae",
        model_args={"dropout": 0.1},
        objective=SurvivalSettings(official=True),
        optim=_adamw(1e-4, warmup=5 / 10, weight_decay=0.1, stretch=0.5),
        run=Run(epochs=10, batch=2, workers=8),
    )


FINETUNE: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        classify,
        classify_frozen,
        classify_vit_s,
        classify_vit_b,
        classify_vit_l,
        classify_swin_t,
        classify_swin_s,
        classify_swin_b,
        classify_resnet_50,
        classify_resnet_101,
        classify_resnet_152,
        places,
        selavpr_msls,
        selavpr_pitts30k,
        segment_bm_mae,
        segment_bm_mae_tiny,
        classify_bm_mae,
        survive_bm_mae,
    )
}
