"""DINOv2 composed directly of timm and PyTorch, as one would write it for a project of one's own. Imports nothing of this project.

    python run_timm.py SETTINGS_AS_JSON

The crops are random tensors of the right sizes, made by a worker, so that only the step is compared.
"""

from __future__ import annotations

import copy
import random

import timm
import torch
import torch.nn.functional as F
from clock import started
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset


class Backbone(nn.Module):
    """timm's vision transformer, with a mask token in place of hidden patches."""

    def __init__(self, settings: dict):
        super().__init__()
        width = settings["width"]
        self.vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=settings["global_size"],
            patch_size=settings["patch"],
            embed_dim=width,
            num_heads=width // 64,
            depth=settings["depth"],
            init_values=1e-5,
            num_classes=0,
            dynamic_img_size=True,
        )
        for block in self.vit.blocks:
            block.drop_path1, block.drop_path2 = DropPath(settings["drop_path"]), DropPath(settings["drop_path"])
        self.mask_token = nn.Parameter(torch.zeros(width))

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.vit.patch_embed(images)  # (B, rows, columns, D)
        if masks is not None:
            x = torch.where(masks.view(*x.shape[:3], 1), self.mask_token, x)
        return self.vit.norm(self.vit.blocks(self.vit._pos_embed(x)))


class Head(nn.Module):
    """Three layers to a unit sphere, then weight-normed prototypes."""

    def __init__(self, settings: dict):
        super().__init__()
        hidden, bottleneck = settings["hidden"], settings["bottleneck"]
        self.mlp = nn.Sequential(
            nn.Linear(settings["width"], hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = weight_norm(nn.Linear(bottleneck, settings["prototypes"], bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """SwAV's balanced assignment, three rounds."""
    q = (logits.float() / temperature).exp().t()
    rows, columns = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * rows
        q /= q.sum(0, keepdim=True) * columns
    return (q * columns).t()


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Per row, at the student's temperature of 0.1."""
    return -(targets * F.log_softmax(logits.float() / 0.1, dim=-1)).sum(-1)


def koleo(x: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour."""
    with torch.autocast("cpu", enabled=False):
        x = F.normalize(x.float(), dim=-1)
        similarity = x @ x.t()
        similarity.fill_diagonal_(-1)
        nearest = similarity.argmax(1)
        return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()


def loss_of(student: nn.ModuleDict, teacher: nn.ModuleDict, batch: dict[str, Tensor], locals: int) -> Tensor:
    """DINO, iBOT and KoLeo of a batch: crops stand crop by crop, all first global ones, then all second ones."""
    masks = batch["masks"]
    count = len(masks) // 2
    with torch.no_grad():
        x = teacher["backbone"](batch["global"])
        cls, patches = teacher["head"](x[:, 0]), teacher["head"](x[:, 1:][masks])
        targets, patch_targets = sinkhorn(cls, 0.04).chunk(2), sinkhorn(patches, 0.04)
    wide = student["backbone"](batch["global"], masks)
    narrow = student["backbone"](batch["local"])
    rows = torch.cat([wide[:, 0], narrow[:, 0], wide[:, 1:][masks]])
    cls, local, patches = student["head"](rows).split([2 * count, locals * count, int(masks.sum())])
    first, second = cls.chunk(2)
    dino = cross_entropy(targets[0], second).mean() + cross_entropy(targets[1], first).mean()
    for crop in local.chunk(locals):
        dino = dino + sum(cross_entropy(target, crop).mean() for target in targets)
    weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    ibot = (cross_entropy(patch_targets, patches) * weights).sum() / len(masks)
    spread = koleo(wide[:count, 0]) + koleo(wide[count:, 0])
    return dino / (2 + 2 * locals) + ibot + 0.1 * spread


class Crops(Dataset):
    """Batches of random pixels; half of the global crops have patches hidden."""

    def __init__(self, settings: dict):
        self.settings = settings

    def __len__(self) -> int:
        return self.settings["steps"]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        of, draw = self.settings, random.Random(step)
        generator = torch.Generator().manual_seed(step)
        grid = (of["global_size"] // of["patch"]) ** 2
        masks = torch.zeros(2 * of["batch"], grid, dtype=torch.bool)
        for row in draw.sample(range(len(masks)), len(masks) // 2):
            masks[row, draw.sample(range(grid), int(grid * draw.uniform(0.1, 0.5)))] = True
        return {
            "global": torch.randn(2 * of["batch"], 3, of["global_size"], of["global_size"], generator=generator),
            "local": torch.randn(of["locals"] * of["batch"], 3, of["local_size"], of["local_size"], generator=generator),
            "masks": masks,
        }


def groups_of(student: nn.ModuleDict, depth: int) -> list[dict]:
    """Layer-wise decay of the learning rate, slower patch embedding, no weight decay on vectors."""
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in student.named_parameters():
        layer = depth + 1
        if ".blocks." in name:
            layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
        elif "embed" in name or "token" in name:
            layer = 0
        factor = 0.9 ** (depth + 1 - layer) * (0.2 if "patch_embed" in name else 1)
        decay = 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 0.04
        groups.setdefault((1e-3 * factor, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def main() -> None:
    clock, settings = started()
    torch.manual_seed(settings["seed"])
    student = nn.ModuleDict({"backbone": Backbone(settings), "head": Head(settings)})
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(groups_of(student, settings["depth"]))
    bf16 = settings["precision"] == "bf16"
    for batch in DataLoader(Crops(settings), batch_size=None, num_workers=settings["workers"]):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(student, teacher, batch, settings["locals"])
        loss.backward()
        for part in student.values():
            nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - 0.992)
    clock.write(settings["notes"], loss=float(loss.detach()))


if __name__ == "__main__":
    main()
