"""Our run, by `ok.pretrain`, with a clock.

python run_okavango.py SETTINGS_AS_JSON
"""

from __future__ import annotations

from clock import started


def main() -> None:
    clock, settings = started()

    import okavango as ok
    from okavango.pretrain import state
    from okavango.zoo import checkpoint

    if settings.get("only_data"):
        clock.only_data(settings["only_data"], settings["notes"], lambda where, k: (where[0] + k, where[1]))
    clock.watch(state, "save_state")
    clock.watch(checkpoint, "save_checkpoint")  # before the loop takes its name
    crops = {"global_size": settings["global_size"], "local_size": settings["local_size"], "locals": settings["locals"]}
    for name, value in settings.get("crops", {}).items():
        crops[name] = tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
    ok.pretrain(
        "dinov2_vit_small",
        data=settings["data"],
        out=settings["out"],
        model="elastic_vit",
        model_args={
            "image_size": settings["global_size"],
            "patch_size": settings["patch"],
            "min_width": settings["width"],
            "max_width": settings["width"],
            "min_depth": settings["depth"],
            "max_depth": settings["depth"],
            "drop_path": settings["drop_path"],
        },
        steps=settings["steps"],
        batch=settings["batch"],
        seed=settings["seed"],
        precision=settings["precision"],
        workers=settings["workers"],
        threads=settings["threads"],
        save_every=settings["save_every"],
        **{
            "objective.prototypes": (settings["prototypes"],),
            "objective.head_hidden": settings["hidden"],
            "objective.head_bottleneck": settings["bottleneck"],
            "objective.last_layer_freeze": 0.0,
            **{f"objective.crops.{name}": value for name, value in crops.items()},
        },
    )
    clock.write(settings["notes"])


if __name__ == "__main__":
    main()
