"""Settings of runs as frozen dataclasses. Torch is not imported here, so that the command line can show them at once.

Durations are fractions of the run, so that `--steps` alone makes a run shorter or longer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from tyro.conf import arg


class SettingError(ValueError):
    """A setting has a value that no run can have; the message names its option."""


def require(settings: Any, prefix: str, low: float, high: float = math.inf, *, names: str) -> None:
    """Check that fields, or all numbers of fields that hold several, lie within low..high.

    Args:
        settings: a dataclass; prefix: of its options on the command line; names: of the fields, with spaces between.
    Raises:
        SettingError: one does not.
    """
    for name in names.split():
        value = getattr(settings, name)
        if not all(low <= number <= high for number in (value if isinstance(value, tuple) else (value,))):
            option = f"--{prefix}{name}".replace("_", "-")
            expected = f"at least {low:g}" if high == math.inf else f"{low:g}..{high:g}"
            raise SettingError(f"{option} {value}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Multi-crop augmentation (DINO, arXiv 2104.14294; DINOv2, arXiv 2304.07193)."""

    global_size: int = 224
    """side of the two global crops in pixels"""
    local_size: int = 96
    """side of the local crops in pixels"""
    locals: int = 8
    """local crops per picture"""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """area of a global crop over the area of the picture"""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """area of a local crop over the area of the picture"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """aspect ratio of a crop before it is resized"""
    zoom_out: tuple[float, float] = (0.0, 1.0)
    """probability that a crop is cut from a larger black canvas around the picture, and that canvas's greatest side (1: none)"""
    flip: float = 0.5
    """probability of a horizontal flip"""
    jitter: tuple[float, float, float, float, float] = (0.8, 0.4, 0.4, 0.2, 0.1)
    """colour jitter: probability, brightness, contrast, saturation, hue"""
    grayscale: float = 0.2
    """probability of grey pictures"""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """probability of Gaussian blur: first global, second global, locals; the released code really used 0.0 0.9 0.5"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """standard deviation of the blur in pixels"""
    solarize: float = 0.2
    """probability of solarisation of the second global crop"""
    recolour: float = 0.0
    """probability of random foreground and background colours (for grey pictures)"""

    def check(self, prefix: str = "objective.crops.") -> None:
        """Refuse values out of range; see `require`."""
        require(self, prefix, 1, names="global_size local_size")
        require(self, prefix, 0, names="locals jitter blur_sigma")
        require(self, prefix, 0, 1, names="global_scale local_scale flip grayscale blur solarize recolour")
        require(self, prefix, 1e-3, names="ratio")
        if not 0 <= self.zoom_out[0] <= 1 <= self.zoom_out[1]:
            raise SettingError(f"--{prefix}zoom-out {self.zoom_out}: expected a probability 0..1 and a side of at least 1")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedules."""

    lr: float = 0.004
    """peak learning rate at `lr_batch`"""
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    """how the peak follows the batch size (POA: sqrt in the code, linear in the paper)"""
    lr_batch: int = 1024
    """batch size that `lr` is meant for"""
    lr_end: float = 2e-5
    """learning rate at the end of the cosine"""
    warmup: float = 10 / 346
    """fraction of the run in which the learning rate rises from 0"""
    warmup_rule: Literal["before", "below"] = "before"
    """before: the cosine begins after the warm-up; below: both begin at step 0 and the lower one counts (BM-MAE)"""
    stretch: float = 1.0
    """cosines run over steps / stretch and are cut at the end of the run"""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """at the start and at the end of its cosine"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of AdamW's running means"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    clip: float = 1.5
    """greatest L2 norm of each clip group's gradient, 0 for none"""
    ema: float = 0.0
    """momentum of the loop's own average of all trained weights, 0 for none"""

    def check(self, prefix: str = "optim.") -> None:
        """Refuse values out of range; see `require`."""
        require(self, prefix, 0, names="lr lr_end weight_decay eps clip")
        require(self, prefix, 0, 1, names="warmup betas ema")
        require(self, prefix, 1, names="lr_batch")
        require(self, prefix, 1e-3, names="stretch")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How the loop runs: everything that is not the model, the objective or the optimiser."""

    steps: int = 10_000
    """optimiser steps"""
    epochs: float = 0.0
    """passes over the data, from which `steps` follows then; 0 leaves `steps` as it is"""
    batch: int = 64
    """pictures per step, over all processes and accumulation"""
    seed: int = 0
    """everything random follows from it"""
    accumulate: int = 1
    """forward passes per optimiser step"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """arithmetic of the forward pass"""
    workers: int = 2
    """processes that load and augment, per training process; 0 loads in the training process"""
    save_every: int = 500
    """steps between states; the last step always saves one"""
    keep: int = 2
    """states that are kept"""
    log_every: int = 10
    """steps between lines of log.jsonl"""
    eval_every: int = 0
    """steps between evaluations during the run, 0 for none"""
    patience: int = 0
    """evaluations in a row without a better result after which the run ends; the best weights are exported; 0 for never"""
    watch: str = ""
    """result that patience looks at, higher is better, named as in log.jsonl; the first one where empty"""
    bad_share: float = 0.01
    """share of unreadable samples above which the run stops"""
    activation_checkpointing: bool = False
    """recompute activations of blocks in the backward pass"""
    compile: bool = False
    """torch.compile per block (of little use when the subnet changes each step)"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """replicate, or shard parameters by FSDP2, when there are several processes"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """accelerate's trackers: tensorboard, wandb ... ; none to switch off"""
    threads: int = 0
    """threads of torch, 0 leaves them as they are"""

    def check(self, prefix: str = "") -> None:
        """Refuse values out of range; see `require`."""
        require(self, prefix, 1, names="steps batch accumulate save_every keep log_every")
        require(self, prefix, 0, names="epochs seed workers eval_every patience threads")
        require(self, prefix, 0, 1, names="bad_share")
        if self.batch % self.accumulate:
            raise SettingError(f"--batch {self.batch}: expected a multiple of --accumulate {self.accumulate}")
        if self.patience and not self.eval_every:
            raise SettingError(f"--patience {self.patience}: counts evaluations, and there are none; give --eval-every as well")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, whole: what `okavango pretrain NAME` starts from and what recipe.json holds."""

    name: str
    """name of the recipe"""
    data: str = ""
    """folder of pictures, tar shards, samples/fashion ..."""
    model: str = "elastic_vit_small"
    """architecture"""
    model_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the architecture"""
    start: Annotated[str, arg(aliases=["--from"])] = ""
    """checkpoint whose weights the run starts from"""
    objective: Any = None
    """settings of the objective, with a method `build(backbone, classes, run)`"""
    optim: Optim = field(default_factory=Optim)
    """optimiser"""
    run: Annotated[Run, arg(name="")] = field(default_factory=Run)
    """the loop"""

    def check(self) -> None:
        """Refuse what no run can have, before anything is loaded.

        Raises:
            SettingError: a number out of range, or neither a checkpoint to start from nor an architecture.
        """
        for settings in (self.run, self.optim, self.objective):
            if hasattr(settings, "check"):
                settings.check()
        if not self.start and not self.model:
            raise SettingError(
                f"recipe {self.name} starts from a checkpoint: give --start CHECKPOINT, or --model NAME for an untrained one"
            )


def own_arguments(recipe: Recipe, before: Recipe) -> Recipe:
    """A recipe that was changed, without `model_args` that were meant for the architecture that it had before."""
    foreign = recipe.model != before.model and recipe.model_args == before.model_args
    return replace(recipe, model_args={}) if foreign else recipe


@dataclass(frozen=True, kw_only=True)
class POASettings:
    """Elastic self-distillation (POA, arXiv 2408.01031); with `elastic` off it is DINOv2: DINO + iBOT + KoLeo."""

    elastic: bool = True
    """train a random subnet beside the intact student; off is DINOv2"""
    balance: float = 0.8
    """lambda: share of the intact student in the loss"""
    same_view: bool = True
    """distil the intact student into the elastic one on the same crops"""
    sampling_scale: float = 3.0
    """how much likelier the smallest width and depth are drawn than the largest (paper: 3; code: 2 for Swin and ResNet)"""
    shared_subnet: bool = False
    """all processes train the same subnet at a step (needed by sharded blocks)"""
    prototypes: tuple[int, ...] = (8192, 16384, 32768, 65536)
    """outputs of each projection head"""
    head_hidden: int = 2048
    """hidden width of the projection heads"""
    head_bottleneck: int = 256
    """width before the prototypes"""
    student_temperature: float = 0.1
    """temperature of both students"""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """temperature of the teacher at the start and after its warm-up"""
    teacher_temperature_warmup: float = 30 / 346
    """fraction of the run until the teacher's final temperature"""
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    """how the teacher's targets are balanced"""
    momentum: tuple[float, float] = (0.992, 0.9999)
    """momentum of the teacher at the start and at the end of its cosine"""
    stretch: float = 1.0
    """cosines run over steps / stretch and are cut at the end of the run (the code: 0.78 for ViT, 0.9 for Swin)"""
    ibot: bool = True
    """the masked patch loss"""
    ibot_start: float = 30 / 346
    """fraction of the run after which patches are masked (0 in DINOv2)"""
    mask_probability: float = 0.5
    """share of global crops that are masked"""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """least and greatest share of hidden patches"""
    koleo: float = 0.1
    """weight of the KoLeo entropy term"""
    pair_weights: Literal["pairs", "crops"] = "pairs"
    """pairs: all (student crop, teacher view) pairs count the same (code); crops: mean of globals + mean of locals (paper)"""
    koleo_rule: Literal["mean", "sum"] = "mean"
    """KoLeo over the two students: mean (the code) or sum (the paper)"""
    layer_decay: float = 0.9
    """factor on the learning rate from one block to the one before it"""
    patch_embed_lr: float = 0.2
    """factor on the learning rate of the patch embedding"""
    last_layer_freeze: float = 1 / 346
    """fraction of the run in which the prototypes stay as they are"""
    crops: Crops = field(default_factory=Crops)

    def check(self, prefix: str = "objective.") -> None:
        """Refuse values out of range; see `require`."""
        require(self, prefix, 1, names="prototypes head_hidden head_bottleneck sampling_scale")
        require(self, prefix, 1e-4, names="student_temperature teacher_temperature stretch")
        require(self, prefix, 0, names="koleo patch_embed_lr")
        shares = "balance teacher_temperature_warmup momentum ibot_start mask_probability mask_ratio layer_decay last_layer_freeze"
        require(self, prefix, 0, 1, names=shares)
        if not self.prototypes:
            raise SettingError(f"--{prefix}prototypes: expected at least one number")
        self.crops.check(f"{prefix}crops.")

    def build(self, backbone, classes, run):
        """The objective for a backbone; `run` gives its length and seed."""
        from okavango.pretrain.objectives.poa import POA

        return POA(backbone, self, steps=run.steps, seed=run.seed)


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """A recipe of self-distillation."""

    objective: POASettings = field(default_factory=POASettings)
    """settings of the objective"""


@dataclass(frozen=True, kw_only=True)
class BMMAESettings:
    """Masked autoencoding of several scans of a brain (BM-MAE, arXiv 2505.00568)."""

    mask_ratio: float = 0.75
    """share of the tokens of all modalities together that is hidden"""
    concentration: float = 1.0
    """of the Dirichlet distribution by which the visible tokens are shared out among the modalities"""
    normalise_targets: bool = False
    """predict patches with mean 0 and variance 1; nothing can be synthesised then"""
    decoder_width: int = 384
    """channels of the decoder"""
    decoder_depth: int = 3
    """blocks of the decoder"""
    decoder_heads: int = 12
    """attention heads of the decoder"""
    decoder_mlp: int = 1536
    """hidden width of the decoder's MLPs"""
    decoder_dropout: float = 0.1
    """rate of dropout in the decoder"""
    decay_all: bool = True
    """weight decay on norms, biases and tokens too, as published"""
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
        require(self, prefix, 0, 0.999, names="mask_ratio decoder_dropout")
        require(self, prefix, 1e-3, names="concentration")
        require(self, prefix, 1, names="decoder_width decoder_depth decoder_heads decoder_mlp")
        require(self, prefix, 0, 1, names="flip scale")
        require(self, prefix, 0, names="shift")
        if self.decoder_width % 6 or self.decoder_width % self.decoder_heads:
            raise SettingError(
                f"--{prefix}decoder-width {self.decoder_width}: expected a multiple of 6 and of "
                f"--{prefix}decoder-heads {self.decoder_heads}"
            )

    def build(self, backbone, classes, run):
        """The objective for a backbone."""
        from okavango.pretrain.objectives.bm_mae import MaskedModalities

        return MaskedModalities(backbone, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class ScanRecipe(Recipe):
    """A recipe on studies of scans."""

    data: str = ""
    """folder of NIfTI studies, a table of them, samples/brain ..."""


@dataclass(frozen=True, kw_only=True)
class BMMAERecipe(ScanRecipe):
    """A recipe of masked autoencoding of scans."""

    model: str = "bm_mae"
    """architecture"""
    objective: BMMAESettings = field(default_factory=BMMAESettings)
    """settings of the objective"""
