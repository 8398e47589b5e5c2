"""Named pretraining recipes. Each is a function without arguments; derive your own by calling one and replacing fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from okavango.pretrain.settings import BMMAERecipe, BMMAESettings, Crops, Optim, POASettings, PretrainRecipe, Recipe, Run


def poa_vit_large() -> PretrainRecipe:
    """The published run: ViT-S to ViT-L from one supernet, batch 1600, 276,800 steps, cosines stretched by 0.78.

    The blur probabilities are the nominal ones; the released code used 0.0 0.9 0.5 (see `Crops.blur`).
    """
    return PretrainRecipe(
        name="poa_vit_large",
        model="elastic_vit_large",
        model_args={"drop_path": 0.2},
        objective=POASettings(stretch=0.78),
        optim=Optim(stretch=0.78),
        run=Run(steps=276_800, batch=1600, precision="bf16", save_every=2000, activation_checkpointing=True, workers=8),
    )


def poa_vit_base() -> PretrainRecipe:
    """Widths 384..768 and depths 8..12, up to ViT-B/16."""
    recipe = poa_vit_large()
    return replace(recipe, name="poa_vit_base", model="elastic_vit_base", run=replace(recipe.run, batch=1024))


def poa_vit_small() -> PretrainRecipe:
    """Widths 192..384 and depths 6..12, up to ViT-S/16: for one workstation and a folder of pictures of your own."""
    return PretrainRecipe(
        name="poa_vit_small",
        model="elastic_vit_small",
        model_args={"drop_path": 0.1},
        objective=POASettings(prototypes=(2048, 4096, 8192, 16384)),
        optim=Optim(lr_end=1e-6),
        run=Run(steps=100_000, batch=256, save_every=1000, workers=4),
    )


def _as_dinov2(recipe: PretrainRecipe, name: str, prototypes: int) -> PretrainRecipe:
    objective = replace(
        recipe.objective, elastic=False, prototypes=(prototypes,), ibot_start=0.0, momentum=(0.992, 1.0), stretch=1.0
    )
    return replace(recipe, name=name, objective=objective, optim=replace(recipe.optim, stretch=1.0, clip=3.0, lr_end=1e-6))


def dinov2_vit_large() -> PretrainRecipe:
    """DINOv2's short ViT-L/16 recipe, on the intact network: one head, patches masked from the start."""
    return _as_dinov2(poa_vit_large(), "dinov2_vit_large", 65536)


def dinov2_vit_base() -> PretrainRecipe:
    """DINOv2 on ViT-B/16."""
    return _as_dinov2(poa_vit_base(), "dinov2_vit_base", 65536)


def dinov2_vit_small() -> PretrainRecipe:
    """DINOv2 on ViT-S/16."""
    return _as_dinov2(poa_vit_small(), "dinov2_vit_small", 16384)


def poa_fashion() -> PretrainRecipe:
    """The elastic tiny ViT on the 10,000 Fashion-MNIST pictures that ship in the package.

    Pictures are 28 pixels wide and grey, on black: crops are small, half of them show the whole picture small and somewhere, and
    colour is made up. The views of a picture that an untrained network sees have little in common then, and a student can only
    learn from targets that vary more than its own outputs, which asks for (correlation of two views) x (student temperature) >
    (teacher temperature). So the teacher is sharp, follows quickly at first, and there are few prototypes.
    """
    return PretrainRecipe(
        name="poa_fashion",
        data="samples/fashion",
        model="elastic_vit_tiny",
        objective=POASettings(
            prototypes=(32, 64, 128, 256),
            head_hidden=256,
            head_bottleneck=256,
            teacher_temperature=(0.006, 0.02),
            teacher_temperature_warmup=0.6,
            momentum=(0.98, 0.9999),
            ibot_start=0.0,
            last_layer_freeze=0.0,
            layer_decay=1.0,
            patch_embed_lr=0.5,
            crops=Crops(
                global_size=28,
                local_size=14,
                locals=4,
                global_scale=(0.5, 1.0),
                local_scale=(0.3, 0.7),
                blur=(0.2, 0.1, 0.1),
                blur_sigma=(0.1, 1.0),
                solarize=0.0,
                recolour=0.5,
                zoom_out=(0.6, 1.7),
            ),
        ),
        optim=Optim(lr=0.003, lr_batch=256, lr_end=1e-5, warmup=0.05, clip=3.0),
        run=Run(steps=16_000, batch=64, save_every=500, eval_every=500, workers=1, trackers=()),
    )


def dinov2_fashion() -> PretrainRecipe:
    """The same without the elastic branch."""
    return _as_dinov2(poa_fashion(), "dinov2_fashion", 2048)


def poa_tiny() -> PretrainRecipe:
    """Seconds on one core: for tests and for trying the machinery."""
    recipe = poa_fashion()
    return replace(
        recipe,
        name="poa_tiny",
        model_args={"min_width": 32, "max_width": 64, "width_step": 32, "min_depth": 1, "max_depth": 2},
        objective=replace(
            recipe.objective,
            prototypes=(32, 48),
            head_hidden=32,
            head_bottleneck=16,
            crops=replace(recipe.objective.crops, locals=2, local_size=14),
        ),
        run=Run(steps=20, batch=16, save_every=5, workers=1, log_every=1, trackers=()),
    )


def dinov2_tiny() -> PretrainRecipe:
    """`poa_tiny` without the elastic branch."""
    return _as_dinov2(poa_tiny(), "dinov2_tiny", 48)


def poa_swin_base() -> PretrainRecipe:
    """The published run on Swin: Swin-T to Swin-B from one supernet, batch 2048, 216,250 steps, cosines stretched by 0.9.

    Small subnets are drawn as the released code draws them, 2 instead of the paper's 3 (see `POASettings.sampling_scale`).
    """
    return PretrainRecipe(
        name="poa_swin_base",
        model="elastic_swin_base",
        model_args={"drop_path": 0.2},
        objective=POASettings(stretch=0.9, sampling_scale=2.0, mask_ratio=(0.1, 0.3)),
        optim=Optim(stretch=0.9, warmup=30 / 346),
        run=Run(steps=216_250, batch=2048, precision="bf16", save_every=2000, workers=8),
    )


def poa_swin_small() -> PretrainRecipe:
    """Widths 64..96 and third-stage depths 6..18, up to Swin-S: for one workstation and a folder of pictures of your own."""
    recipe = poa_vit_small()
    objective = replace(recipe.objective, sampling_scale=2.0, mask_ratio=(0.1, 0.3))
    return replace(recipe, name="poa_swin_small", model="elastic_swin_small", objective=objective)


def poa_swin_tiny() -> PretrainRecipe:
    """`poa_tiny` on a Swin: seconds on one core, for tests and for trying the machinery."""
    recipe = poa_tiny()
    crops = replace(recipe.objective.crops, global_size=32, local_size=16)
    return replace(
        recipe,
        name="poa_swin_tiny",
        model="elastic_swin_tiny",
        model_args={"max_width": 24, "depths": (1, 1, 3, 1)},
        objective=replace(recipe.objective, sampling_scale=2.0, crops=crops),
    )


def poa_resnet_152() -> PretrainRecipe:
    """The published run on ResNet: ResNet-50 to a wide ResNet-152 from one supernet, batch 1280, 692,000 steps.

    Small subnets are drawn as the released code draws them, 2 instead of the paper's 3 (see `POASettings.sampling_scale`). The
    paper reports that the intact network alone, `--objective.no-elastic`, diverges.
    """
    epoch = 1 / 692
    return PretrainRecipe(
        name="poa_resnet_152",
        model="elastic_resnet_152",
        objective=POASettings(
            sampling_scale=2.0,
            mask_ratio=(0.1, 0.3),
            layer_decay=0.95,
            teacher_temperature_warmup=30 * epoch,
            ibot_start=30 * epoch,
            last_layer_freeze=epoch,
        ),
        optim=Optim(warmup=30 * epoch),
        run=Run(steps=692_000, batch=1280, precision="bf16", save_every=2000, workers=8),
    )


def poa_resnet_50() -> PretrainRecipe:
    """Inner widths 32..64 and depths up to those of ResNet-50: for one workstation and a folder of pictures of your own."""
    recipe = poa_vit_small()
    objective = replace(recipe.objective, sampling_scale=2.0, mask_ratio=(0.1, 0.3), layer_decay=0.95)
    return replace(recipe, name="poa_resnet_50", model="elastic_resnet_50", model_args={}, objective=objective)


def poa_resnet_tiny() -> PretrainRecipe:
    """`poa_tiny` on a ResNet: seconds on one core, for tests and for trying the machinery."""
    recipe = poa_tiny()
    crops = replace(recipe.objective.crops, global_size=64, local_size=32)
    return replace(
        recipe,
        name="poa_resnet_tiny",
        model="elastic_resnet_tiny",
        model_args={"max_width": 24, "max_depths": (1, 1, 2, 1)},
        objective=replace(recipe.objective, sampling_scale=2.0, crops=crops),
    )


def bm_mae() -> BMMAERecipe:
    """The published run of BM-MAE: 1000 epochs of studies of four scans, 6 at a time, the cosine laid out over 1500 epochs.

    The published code moves the learning rate once an epoch; here it moves every step.
    """
    return BMMAERecipe(
        name="bm_mae",
        optim=Optim(
            lr=1e-4,
            lr_scaling="none",
            lr_batch=6,
            lr_end=0.0,
            warmup=50 / 1000,
            warmup_rule="below",
            stretch=1000 / 1500,
            weight_decay=(0.05, 0.05),
            clip=0.0,
        ),
        run=Run(epochs=1000, batch=6, seed=1999, save_every=1000, workers=8),
    )


def bm_mae_tiny() -> BMMAERecipe:
    """A small BM-MAE on the semi-synthetic studies that ship in the package: minutes on one core."""
    recipe = bm_mae()
    settings = BMMAESettings(decoder_width=48, decoder_depth=2, decoder_heads=4, decoder_mlp=96, decoder_dropout=0.0)
    return replace(
        recipe,
        name="bm_mae_tiny",
        data="samples/brain",
        model="bm_mae_tiny",
        objective=settings,
        optim=replace(recipe.optim, lr=1e-3, clip=3.0),
        run=Run(steps=400, batch=8, save_every=100, workers=1, trackers=()),
    )


PRETRAIN: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        poa_tiny,
        poa_fashion,
        poa_vit_small,
        poa_vit_base,
        poa_vit_large,
        dinov2_tiny,
        dinov2_fashion,
        dinov2_vit_small,
        dinov2_vit_base,
        dinov2_vit_large,
        poa_swin_tiny,
        poa_swin_small,
        poa_swin_base,
        poa_resnet_tiny,
        poa_resnet_50,
        poa_resnet_152,
        bm_mae_tiny,
        bm_mae,
    )
}
