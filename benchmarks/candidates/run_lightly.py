"""LightlyTrain's run, by its public function, with a clock. For an environment of its own: LightlyTrain is AGPL.

python run_lightly.py SETTINGS_AS_JSON
"""

from __future__ import annotations

from clock import started


def main() -> None:
    clock, settings = started()

    import lightly_train
    import torch
    from pytorch_lightning import Trainer

    if settings.get("only_data"):
        clock.only_data(settings["only_data"], settings["notes"])
    local = {"num_views": settings["locals"], "view_size": (settings["local_size"],) * 2}
    transforms = {"image_size": (settings["global_size"],) * 2, "local_view": local}
    if settings.get("geometry"):  # crops and flips alone
        transforms |= {"color_jitter": None, "random_gray_scale": None, "gaussian_blur": None}
        transforms |= {"global_view_1": {"gaussian_blur": None, "solarize": None}, "local_view": {**local, "gaussian_blur": None}}
    clock.watch(Trainer, "save_checkpoint")
    clock.watch(torch, "save")
    lightly_train.pretrain(
        out=settings["out"],
        data=settings["data"],
        model="dinov2/vits14-notpretrained",
        model_args={"drop_path_rate": settings["drop_path"], "drop_path_uniform": True, "img_size": settings["global_size"]},
        method="dinov2",
        method_args={
            "ibot_separate_head": False,
            "hidden_dim": settings["hidden"],
            "dino_bottleneck_dim": settings["bottleneck"],
            "output_dim": settings["prototypes"],
            "center_method": "sinkhorn_knopp",
            "student_freeze_last_layer_steps": 0,
            "koleo_loss_weight": 0.1,
            "mask_ratio_min": 0.1,
            "mask_ratio_max": 0.5,
            "mask_probability": 0.5,
            "layerwise_decay": 0.9,
            "gradient_clip_val": 3.0,
            "warmup_steps": 1,
            "teacher_temp_warmup_steps": 1,
        },
        transform_args=transforms,
        batch_size=settings["batch"],
        num_workers=settings["workers"],
        epochs=settings["epochs"],
        trainer_args={"max_steps": settings["steps"]},
        callbacks={"model_checkpoint": {"every_n_train_steps": settings["save_every"]}},
        accelerator="cpu",
        devices=1,
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[settings["precision"]],
        seed=settings["seed"],
    )
    clock.write(settings["notes"], version=lightly_train.__version__)


if __name__ == "__main__":
    main()
