"""stable-pretraining's DINOv2, by its public classes and Lightning's trainer, with a clock. For an environment of its own.

python run_stable.py SETTINGS_AS_JSON
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import stable_pretraining as spt
import timm
import torch
from clock import started
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2


class Pictures(Dataset):
    """All JPEGs of a folder, as the crops that DINOv2 wants."""

    def __init__(self, settings: dict):
        self.paths, self.locals = sorted(Path(settings["data"]).glob("*.jpg")), settings["locals"]
        self.first = self._pipeline(settings["global_size"], (0.32, 1.0), 1.0, 0.0)
        self.second = self._pipeline(settings["global_size"], (0.32, 1.0), 0.1, 0.2)
        self.local = self._pipeline(settings["local_size"], (0.05, 0.32), 0.5, 0.0)

    def _pipeline(self, size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        with Image.open(self.paths[index]) as file:
            picture = file.convert("RGB")
        return {"wide": [self.first(picture), self.second(picture)], "narrow": [self.local(picture) for _ in range(self.locals)]}


class Run(spt.DINOv2):
    """The library's method, fed with our batches."""

    def forward(self, batch: dict, stage: str) -> dict:
        return {"loss": super().forward(global_views=batch["wide"], local_views=batch["narrow"]).loss}


def main() -> None:
    clock, settings = started()
    clock.watch(pl.Trainer, "save_checkpoint")
    pl.seed_everything(settings["seed"])
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=settings["global_size"],
        patch_size=settings["patch"],
        embed_dim=settings["width"],
        num_heads=settings["width"] // 64,
        depth=settings["depth"],
        init_values=1e-5,
        drop_path_rate=settings["drop_path"],
        num_classes=0,
        dynamic_img_size=True,
    )
    module = Run(
        encoder_name=vit,
        projector_hidden_dim=settings["hidden"],
        projector_bottleneck_dim=settings["bottleneck"],
        n_cls_prototypes=settings["prototypes"],
        n_patch_prototypes=settings["prototypes"],
        image_size=settings["global_size"],
    )
    module.optim = {"optimizer": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.04)}
    loader = DataLoader(
        Pictures(settings), batch_size=settings["batch"], shuffle=True, drop_last=True, num_workers=settings["workers"]
    )
    saver = pl.callbacks.ModelCheckpoint(settings["out"], every_n_train_steps=settings["save_every"], save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=settings["steps"],
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[settings["precision"]],
        callbacks=[saver, spt.TeacherStudentCallback()],
        logger=False,
        default_root_dir=settings["out"],
    )
    trainer.fit(module, loader)
    clock.write(settings["notes"], version=spt.__version__)


if __name__ == "__main__":
    main()
