"""POA: pretrain once, get models of all sizes (arXiv 2408.01031). With `elastic=False` this is DINOv2 (arXiv 2304.07193).

Three branches see the same crops: a momentum teacher (intact, never masked), the intact student and an elastic student, a slice of
the student's own weights that is drawn anew at every step. Sub-networks are cut out of the teacher afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor, nn

from okavango.data.loading import derive
from okavango.data.masking import batch_masks
from okavango.data.multicrop import MultiCrop
from okavango.models.backbone import Backbone, Elastic
from okavango.models.features import Features, Subnet
from okavango.models.preprocess import Preprocess
from okavango.pretrain import collectives
from okavango.pretrain.draws import coverage_picture, drawn_order
from okavango.pretrain.objectives.distillation import (
    Centre,
    ProjectionHeads,
    cross_entropy,
    cross_view,
    koleo,
    masked_patch_loss,
    sinkhorn,
)
from okavango.pretrain.optim import Cosine, lerp_parameters
from okavango.pretrain.settings import POASettings


@dataclass(frozen=True)
class Crop:
    """Per sample: the geometric part of multi-crop, on uint8."""

    augment: MultiCrop

    def __call__(self, sample: dict[str, Any], seed: int) -> dict[str, Any]:
        return self.augment.crop(sample["image"], torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Collate:
    """Per batch: colours, blur and normalisation on stacked crops, and the masks."""

    augment: MultiCrop
    grid: tuple[int, int]
    settings: POASettings

    def __call__(self, samples: list[dict[str, Any]], seed: int) -> dict[str, Tensor]:
        """Batch with "global" (2B, C, S, S) and "local" (nB, C, L, L) float32, crop by crop, and "masks" bool (2B, N)."""
        globals_ = torch.stack([sample["global"] for sample in samples], 1)
        locals_ = torch.stack([sample["local"] for sample in samples], 1)
        generator = torch.Generator().manual_seed(derive(seed, "colours"))
        global_crops, local_crops = self.augment.photometric(globals_, locals_, generator)
        masks = batch_masks(
            2 * len(samples),
            self.grid,
            Random(derive(seed, "masks")),
            probability=self.settings.mask_probability,
            ratio=self.settings.mask_ratio,
        )
        return {"global": global_crops, "local": local_crops, "masks": torch.from_numpy(masks)}


def hidden_tokens(features: Features, hidden: Tensor, cells: tuple[int, int]) -> Tensor:
    """The token of each hidden cell (M, D), of a map that is finer than the tokens where the backbone is hierarchical.

    Args:
        hidden: int64 (M,), indices into (B, *cells) flattened.
        cells: rows and columns of the masks.
    """
    tokens, grid = features.tokens["image"], features.grid["image"]
    if grid != cells:
        crop, cell = hidden // (cells[0] * cells[1]), hidden % (cells[0] * cells[1])
        row, column = cell // cells[1] * grid[0] // cells[0], cell % cells[1] * grid[1] // cells[1]
        hidden = (crop * grid[0] + row) * grid[1] + column
    return tokens.flatten(0, 1)[hidden]


class POA(nn.Module):
    """The objective: owns both students' shared weights, the teacher and the heads.

    Args:
        backbone: the student; it is `Elastic`, or with `settings.elastic` off any backbone that takes `token_mask`.
        settings: see `POASettings`.
        steps: length of the run in optimiser steps, for the schedules.
        seed: of the subnet draws.
    """

    def __init__(self, backbone: Backbone, settings: POASettings, *, steps: int, seed: int = 0):
        super().__init__()
        self.pool: tuple[Subnet, ...] = ()
        if settings.elastic:
            if not isinstance(backbone, Elastic):
                raise ValueError(f"{backbone.architecture} is not elastic; use an elastic_* model or --objective.no-elastic")
            self.pool = backbone.sampling_pool(settings.sampling_scale)[:-1]
        if not backbone.mask_stride:
            raise ValueError(f"{backbone.architecture} has no patches that could be hidden from it; use an elastic_* model")
        self.settings, self.steps, self.seed = settings, steps, seed
        width = backbone.feature_info.channels
        rescale = getattr(backbone, "rescale", True)  # only an elastic backbone has the choice
        heads = ProjectionHeads(width, settings.head_hidden, settings.head_bottleneck, settings.prototypes, rescale)
        self.student = nn.ModuleDict({"backbone": backbone, "head": heads})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if settings.centering == "softmax":
            self.cls_centres = nn.ModuleList(Centre(count) for count in settings.prototypes)
            self.patch_centres = nn.ModuleList(Centre(count) for count in settings.prototypes)
        low, high = settings.teacher_temperature
        warmup = round(settings.teacher_temperature_warmup * steps)
        self.temperature = Cosine(high, high, steps, warmup=warmup, start=low, stretch=settings.stretch)
        self.momentum = Cosine(*settings.momentum, steps, stretch=settings.stretch)
        self.ibot_start = round(settings.ibot_start * steps)
        self.shared_subnet = settings.shared_subnet

    @property
    def _backbone(self) -> Backbone:
        return cast(Backbone, self.student["backbone"])

    def train(self, mode: bool = True) -> POA:
        super().train(mode)
        self.teacher.eval()
        return self

    # -- data ---------------------------------------------------------------------------------------------------------

    def _augment(self, preprocess: Preprocess) -> MultiCrop:
        image, crops = preprocess.array(), self.settings.crops
        return MultiCrop(
            channels=len(image.channels),
            mean=image.normalise.mean,
            std=image.normalise.std,
            **{name: getattr(crops, name) for name in crops.__dataclass_fields__},
        )

    def transform(self, preprocess: Preprocess) -> Callable[[dict, int], dict]:
        """Sample -> its crops; picklable, all randomness from the seed."""
        return Crop(self._augment(preprocess))

    @property
    def collate(self) -> Collate:
        """Crops of a micro-batch -> tensors and masks; picklable, all randomness from the seed."""
        side = self.settings.crops.global_size // self._backbone.mask_stride
        return Collate(self._augment(self._backbone.preprocess), (side, side), self.settings)

    def _cells(self, batch: dict) -> tuple[int, int]:
        """Rows and columns of the masks of a batch."""
        height, width = batch["global"].shape[-2:]
        return height // self._backbone.mask_stride, width // self._backbone.mask_stride

    # -- the step -----------------------------------------------------------------------------------------------------

    def draw(self, step: int) -> Subnet | None:
        """The elastic student of a step: the pool without its last entry, shuffled, used up, shuffled again.

        A pure function of (seed, step, rank); without the rank when the subnet is shared.
        """
        if not self.pool:
            return None
        rank = 0 if self.shared_subnet else collectives.rank()
        cycle, position = divmod(step, len(self.pool))
        return self.pool[drawn_order(len(self.pool), self.seed, rank, cycle)[position]]

    def _branch(self, network: nn.ModuleDict, batch: dict, masks: Tensor | None, hidden: Tensor, subnet: Subnet | None):
        """One student: class features of the global crops, and per head the logits of (globals, locals, hidden patches)."""
        token_mask = None if masks is None else {"image": masks}
        wide = network["backbone"](image=batch["global"], token_mask=token_mask, subnet=subnet)
        narrow = network["backbone"](image=batch["local"], subnet=subnet)
        rows = [wide.pooled, narrow.pooled]
        if masks is not None:
            rows.append(hidden_tokens(wide, hidden, self._cells(batch)))
        sizes = [len(part) for part in rows]
        return wide.pooled, [logits.split(sizes) for logits in network["head"](torch.cat(rows))]

    @torch.no_grad()
    def _targets(self, batch: dict, hidden: Tensor, step: int) -> list[tuple[Tensor, Tensor]]:
        """Per head: the teacher's targets of the global crops, halves swapped (2B, K), and of the hidden patches (M, K)."""
        features = self.teacher["backbone"](image=batch["global"])
        swapped = features.pooled.roll(len(features.pooled) // 2, 0)
        rows = torch.cat([swapped, hidden_tokens(features, hidden, self._cells(batch))])
        temperature = self.temperature(step)
        targets = []
        for index, logits in enumerate(self.teacher["head"](rows)):
            cls_logits, patch_logits = logits.split([len(swapped), len(hidden)])
            if self.settings.centering == "softmax":
                cls_targets = self.cls_centres[index](cls_logits, temperature)
                patch_targets = self.patch_centres[index](patch_logits, temperature)
            else:
                cls_targets = sinkhorn(cls_logits, temperature)
                patch_targets = sinkhorn(patch_logits, temperature) if step >= self.ibot_start else patch_logits
            targets.append((cls_targets, patch_targets))
        return targets

    def terms(self, batch: dict, step: int) -> dict[str, Tensor]:
        """All branches; the terms of the loss before their weights.

        Args:
            batch: what `collate` returns: "global" (2B, C, S, S), "local" (nB, C, L, L), "masks" bool (2B, N).
            step: optimiser step, from 0.
        Returns:
            per student (the elastic one's with the prefix ``elastic_``) "dino_global", "dino_local", "ibot", each (heads,), and
            "koleo" (); "same_view_global" and "same_view_local" (heads,). Only terms that are on.
        """
        settings, temperature = self.settings, self.settings.student_temperature
        masks = batch["masks"] if settings.ibot and step >= self.ibot_start else None
        if masks is not None:
            hidden = masks.flatten().nonzero().flatten()
            weights = (1 / masks.sum(1).clamp_min(1).float())[:, None].expand_as(masks)[masks]
        else:
            hidden, weights = torch.zeros(0, dtype=torch.long, device=batch["global"].device), None
        targets = self._targets(batch, hidden, step)
        crops = len(batch["global"])
        pairs = 2 * (len(batch["local"]) * 2 // crops)
        by_pairs = settings.pair_weights == "pairs"
        global_weight, local_weight = (2 / (2 + pairs), 1 / (2 + pairs)) if by_pairs else (1, 1 / max(1, pairs))

        def student(subnet: Subnet | None) -> tuple[dict[str, Tensor], list]:
            features, logits = self._branch(self.student, batch, masks, hidden, subnet)
            views = [cross_view(t[0], parts[0], parts[1], temperature) for t, parts in zip(targets, logits, strict=True)]
            terms = {
                "dino_global": global_weight * torch.stack([view[0] for view in views]),
                "dino_local": local_weight * torch.stack([view[1] for view in views]),
            }
            if weights is not None:
                terms["ibot"] = torch.stack(
                    [
                        masked_patch_loss(t[1], parts[2], weights, crops, temperature)
                        for t, parts in zip(targets, logits, strict=True)
                    ]
                )
            if settings.koleo:
                first, second = features.chunk(2)
                terms["koleo"] = koleo(first) + koleo(second)
            return terms, logits

        terms, intact = student(None)
        if settings.elastic:
            more, elastic = student(self.draw(step))
            terms |= {f"elastic_{name}": value for name, value in more.items()}
            for index, name in enumerate(("same_view_global", "same_view_local") if settings.same_view else ()):
                terms[name] = torch.stack(
                    [
                        cross_entropy((big[index].detach().float() / temperature).softmax(-1), small[index], temperature).mean()
                        for big, small in zip(intact, elastic, strict=True)
                    ]
                )
        return terms

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        """One call a step, all branches inside; see `terms` for the arguments.

        Returns:
            "loss" (), and each term's mean over the heads, without gradient.
        """
        settings, terms = self.settings, self.terms(batch, step)
        share = settings.balance if settings.elastic else 1.0
        entropies = [value for name, value in terms.items() if name.endswith("koleo")]
        spread = sum(entropies) / (len(entropies) if entropies and settings.koleo_rule == "mean" else 1)
        loss = torch.as_tensor(settings.koleo * spread)
        for name, value in terms.items():
            if not name.endswith("koleo"):
                loss = loss + (1 - share if name.startswith(("elastic_", "same_view")) else share) * value.mean()
        return {"loss": loss, **{name: value.detach().mean() for name, value in terms.items()}}

    # -- what the loop asks for -----------------------------------------------------------------------------------------

    def param_groups(self) -> list[dict]:
        """Parameters of the student, grouped by learning-rate factor and weight decay.

        Layer-wise decay over the blocks, a further factor on the patch embedding, no weight decay on biases, norms and layer
        scale, prototypes frozen at first.
        """
        backbone, settings = self._backbone, self.settings
        ids, after = backbone.layer_ids(), backbone.feature_info.layers + 1
        last = max(ids.get(name, after) for name, _ in backbone.named_parameters())  # a ResNet has nothing after its blocks
        groups: dict[tuple, list] = {}
        for name, parameter in self.student.named_parameters():
            if not parameter.requires_grad:
                continue
            inner = name.removeprefix("backbone.")
            lr = settings.layer_decay ** (last - ids.get(inner, after)) if name != inner else 1.0
            if "patch_embed" in name:
                lr *= settings.patch_embed_lr
            wd = 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0
            frozen = round(settings.last_layer_freeze * self.steps) if ".last_" in name else 0
            groups.setdefault((lr, wd, frozen), []).append((f"student.{name}", parameter))
        return [{"params": params, "lr_mult": lr, "wd_mult": wd, "start_step": start} for (lr, wd, start), params in groups.items()]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Backbone and heads are clipped apart."""
        return [[p for p in module.parameters() if p.requires_grad] for module in self.student.values()]

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student."""
        lerp_parameters(self.teacher.parameters(), self.student.parameters(), self.momentum(step))

    def after_run(self, out: Path) -> None:
        """Draw how often each candidate was the elastic student, as `coverage.png`."""
        if self.pool:
            ranks = 1 if self.shared_subnet else collectives.world_size()
            coverage_picture(out / "coverage.png", self.pool, seed=self.seed, steps=self.steps, ranks=ranks)

    def exports(self) -> dict[str, tuple[nn.Module, dict]]:
        """The teacher's backbone."""
        return {"backbone": (self.teacher["backbone"], {"objective": "poa" if self.settings.elastic else "dinov2"})}

    #: where `export-full/` holds the exported backbone
    backbone_prefix = "teacher.backbone."
