"""BM-MAE (arXiv 2505.00568): hide most patches of several scans of a brain, predict their voxels from the others.

The encoder computes visible tokens only. A light decoder sees all positions of all modalities at once. To it, a modality that a
study lacks is one whose tokens are all hidden, which is how a missing scan is synthesised; the loss leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.data.loading import DataError, derive
from okavango.data.masking import modality_masks
from okavango.data.sources import Source
from okavango.data.studies import Augment, Prepare, Prepared, StudyTransform
from okavango.models.bm_mae import BMMAE, Block, Packing, from_patches, grid_of, patch_view, positions_at, run_blocks, sincos
from okavango.models.preprocess import Preprocess
from okavango.pretrain.settings import BMMAESettings


@dataclass(frozen=True)
class Collate:
    """Studies, some of which lack a modality, to one batch with masks; all randomness from the seed."""

    modalities: tuple[str, ...]
    patch_size: int
    settings: BMMAESettings

    def __call__(self, samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Tensor]:
        """Samples {modality: (1, D, H, W), tensors or arrays} -> one batch.

        Returns:
            modality -> float32 (B, 1, D, H, W), zero where a study lacks it, for those that at least one study has; "present" bool
            (B, M); "masks" bool (B, M, N), True where a token is hidden, all of them where a study lacks the modality.
        Raises:
            DataError: volumes of several sizes, or a study without any of the modalities.
        """
        present = torch.tensor([[name in sample for name in self.modalities] for sample in samples])
        sizes = sorted({tuple(sample[name].shape) for sample in samples for name in self.modalities if name in sample})
        if len(sizes) != 1 or len(sizes[0]) != 4 or not bool(present.any(1).all()):
            known = ", ".join(self.modalities)
            raise DataError(f"volumes of one batch are {sizes}; expected one size (1, D, H, W), and in each study one of {known}")
        blank = torch.zeros(sizes[0])
        batch = {
            name: torch.stack([torch.as_tensor(sample[name]).float() if name in sample else blank for sample in samples])
            for name, there in zip(self.modalities, present.any(0).tolist(), strict=True)
            if there
        }
        count = int(np.prod(grid_of(sizes[0][1:], self.patch_size)))
        masks = torch.ones(*present.shape, count, dtype=torch.bool)
        for index, there in enumerate(present):
            draw = np.random.Generator(np.random.Philox(derive(seed, "masks", index)))
            ratio, concentration = self.settings.mask_ratio, self.settings.concentration
            drawn = modality_masks([count] * int(there.sum()), draw, ratio=ratio, concentration=concentration)
            masks[index, there] = torch.from_numpy(np.stack(drawn))
        return {**batch, "present": present, "masks": masks}


class Decoder(nn.Module):
    """From encoded tokens to the voxels of every patch of every modality."""

    positions: Tensor

    def __init__(self, backbone: BMMAE, settings: BMMAESettings):
        super().__init__()
        width, self.modalities = settings.decoder_width, backbone.modalities
        self.native_grid, self.rule = backbone.native_grid, backbone.arguments["positions"]
        self.embed = nn.Linear(backbone.feature_info.channels, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.modality_embed = nn.ParameterDict(
            {name: nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02)) for name in self.modalities}
        )
        self.register_buffer("positions", sincos(self.native_grid, width)[None])
        self.blocks = nn.ModuleList(
            Block(width, settings.decoder_heads, settings.decoder_mlp, settings.decoder_dropout)
            for _ in range(settings.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.pred = nn.Linear(width, backbone.patch_size**3)

    def sequence(self, encoded: Tensor, packing: Packing) -> Tensor:
        """Encoded tokens (T, D) -> (B, prefix + M N, width): a mask token wherever there is none, modality and position added."""
        (grid,) = set(packing.grids.values())
        whole = packing.spread(self.embed(encoded), self.mask_token[0, 0])
        table = positions_at(self.positions, self.native_grid, grid, self.rule).to(whole.dtype)
        hidden = self.mask_token.to(whole.dtype).expand(len(whole), table.shape[1], -1)
        given = packing.split(whole)
        parts = [given.get(name, hidden) + self.modality_embed[name].to(whole.dtype) + table for name in self.modalities]
        return torch.cat([whole[:, : packing.prefix], *parts], 1)

    def forward(self, encoded: Tensor, packing: Packing, *, recompute: bool = False) -> dict[str, Tensor]:
        """Encoded tokens (T, D) -> modality -> states (B, N, width) that `pred` turns into voxels, also of those not given."""
        x = self.sequence(encoded, packing)
        batch, length, _ = x.shape
        x, _ = run_blocks(self.blocks, x.flatten(0, 1), [(batch * length, length)], recompute=recompute)
        states = self.norm(x).unflatten(0, (batch, length))[:, packing.prefix :]
        return dict(zip(self.modalities, states.chunk(len(self.modalities), 1), strict=True))


def masked_error(predicted: Tensor, target: Tensor, *, normalise: bool = False) -> Tensor:
    """Squared error of hidden patches (R, voxels): mean over voxels, then over patches; 0 when there are none.

    Args:
        normalise: targets get mean 0 and variance 1, each patch for itself (n - 1 in the denominator, 1e-6 added).
    """
    if not len(target):
        return predicted.float().sum()
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return F.mse_loss(predicted.float(), target.float())


class MaskedModalities(nn.Module):
    """The objective: encoder and decoder of BM-MAE.

    Args:
        backbone: a `BMMAE`.
        **settings: fields of `BMMAESettings`.
    Raises:
        ValueError: another backbone.
    """

    #: where the backbone stands inside, and how `config.json` calls this objective
    backbone_prefix = "backbone."
    entry = "okavango.pretrain.objectives.bm_mae:MaskedModalities"

    def __init__(self, backbone: BMMAE, **settings: Any):
        super().__init__()
        if not isinstance(backbone, BMMAE):
            raise ValueError(f"{backbone.architecture}: expected a BM-MAE encoder, bm_mae or bm_mae_tiny")
        self.settings = BMMAESettings(**settings)
        self.backbone = backbone
        self.decoder = Decoder(backbone, self.settings)

    # -- data ---------------------------------------------------------------------------------------------------------

    def samples(self, source: Source) -> Source:
        """Studies as the encoder's preprocess has them, kept in `settings.cache`."""
        return cast(Source, Prepared(source, Prepare(self.backbone.preprocess), self.settings.cache or None))

    def transform(self, preprocess: Preprocess) -> StudyTransform:
        """Study -> flipped, scaled, shifted volumes; picklable, all randomness from the seed."""
        settings = self.settings
        return StudyTransform(Prepare(preprocess), Augment(flip=settings.flip, scale=settings.scale, shift=settings.shift))

    @property
    def collate(self) -> Collate:
        """Volumes of a micro-batch -> tensors and masks; picklable, all randomness from the seed."""
        return Collate(self.backbone.modalities, self.backbone.patch_size, self.settings)

    # -- the step -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """One step; see `Collate` for the batch.

        Returns:
            "loss" (): the sum over modalities of the mean error of their hidden patches in the whole batch; and the error of each
            modality, without gradient, 0 for one that no study of the batch has.
        """
        modalities = self.backbone.modalities
        volumes = {name: batch[name] for name in modalities if name in batch}
        masks = dict(zip(modalities, batch["masks"].unbind(1), strict=True))
        there = dict(zip(modalities, batch["present"].unbind(1), strict=True))
        visible = {name: masks[name] for name in volumes}
        encoded, packing, _ = self.backbone.encode(volumes, present=batch["present"], token_mask=visible)
        states = self.decoder(encoded, packing, recompute=self.backbone.activation_checkpointing and self.training)
        errors = {}
        for name in modalities:
            errors[name] = encoded.new_zeros((), dtype=torch.float32)
            if name in volumes:
                sample, index = (masks[name] & there[name][:, None]).nonzero(as_tuple=True)
                cells = patch_view(volumes[name], self.backbone.patch_size)
                target = cells[sample, *torch.unravel_index(index, packing.grids[name])].flatten(1)
                predicted = self.decoder.pred(states[name][sample, index])
                errors[name] = masked_error(predicted, target, normalise=self.settings.normalise_targets)
        return {"loss": torch.stack(list(errors.values())).sum(), **{name: error.detach() for name, error in errors.items()}}

    def patches(
        self, inputs: Mapping[str, Tensor], *, present: Tensor | None = None, token_mask: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Packing]:
        """Predicted patches (B, N, patch ** 3) of all modalities, which mean nothing where tokens are visible; and the packing."""
        encoded, packing, _ = self.backbone.encode(inputs, present=present, token_mask=token_mask)
        return {name: self.decoder.pred(states) for name, states in self.decoder(encoded, packing).items()}, packing

    @torch.no_grad()
    def reconstruct(
        self,
        inputs: Mapping[str, Tensor],
        *,
        synthesize: Iterable[str] | None = None,
        present: Tensor | None = None,
        token_mask: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Volumes of modalities, those that are not given included; use it in eval mode.

        Args:
            inputs: modality or alias -> (B, 1, D, H, W), as after the preprocess.
            synthesize: modalities or aliases that are wanted; None takes all that are not given, or hidden in part. One that is
                given whole is made of the others.
            present, token_mask: see `BMMAE.forward`; hidden patches are predicted, visible ones are those of the input.
        Returns:
            modality -> (B, 1, D, H, W) in units of the preprocess, standard deviations of the scan; there is no way back to its
            stored values.
        Raises:
            ValueError: a study of which nothing is left to make them of, or a model that predicts normalised patches.
        """
        if self.settings.normalise_targets:
            raise ValueError("this model predicts patches without their mean and variance (normalise_targets); nothing to show")
        backbone = self.backbone
        given, hidden = backbone._named(inputs), backbone._named(token_mask or {})
        complete = set(given) if present is None else {backbone.modalities[i] for i in present.all(0).nonzero().flatten().tolist()}
        partly = {name for name in given if name in hidden or name not in complete}
        wanted = [name for name in backbone.modalities if name not in given or name in partly]
        if synthesize is not None:
            wanted = [backbone.preprocess.resolve(name) for name in synthesize]
        sources = {name: volumes for name, volumes in given.items() if name not in wanted or name in partly}
        if present is not None:
            present = present & torch.tensor([name in sources for name in backbone.modalities], device=present.device)
        if sources:
            predicted, packing = self.patches(sources, present=present, token_mask=hidden)
        if not sources or (packing.visible is not None and not bool(packing.visible.any(1).all())):
            raise ValueError(f"a study has nothing left to make {', '.join(wanted)} of; give another modality")
        size = next(iter(sources.values())).shape[-3:]
        made = {name: from_patches(predicted[name], size, backbone.patch_size) for name in wanted}
        if packing.visible is not None:
            seen = packing.split(F.pad(packing.visible, (packing.prefix, 0)))
            for name in partly.intersection(wanted):
                voxels = seen[name][..., None].expand(-1, -1, backbone.patch_size**3)
                made[name] = torch.where(from_patches(voxels, size, backbone.patch_size), sources[name], made[name])
        return made

    # -- what the loop asks for -----------------------------------------------------------------------------------------

    def param_groups(self) -> list[dict]:
        """All parameters; those that weight decay spares, if any, apart."""
        groups: dict[float, list] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim > 1 and not name.endswith("_token") and "modality_embed" not in name
                groups.setdefault(float(plain or self.settings.decay_all), []).append((name, parameter))
        return [{"params": params, "lr_mult": 1.0, "wd_mult": wd} for wd, params in groups.items()]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """All together."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]

    def after_step(self, step: int) -> None:
        """Nothing to follow: there is no teacher."""

    def head_config(self) -> dict[str, Any]:
        """What rebuilds this objective around its encoder, for synthesis: `okavango.zoo.hub.load(..., heads=...)`."""
        return {"entry": self.entry, "arguments": asdict(self.settings)}

    def exports(self) -> dict[str, tuple[nn.Module, dict]]:
        """The encoder; the whole objective lies in `export-full/`."""
        return {"backbone": (self.backbone, {"objective": "bm_mae"})}


def load_objective(folder: Path | str, device: str | torch.device = "cpu") -> MaskedModalities:
    """Encoder and decoder of `export-full/`, or of a converted checkpoint, in eval mode: what synthesis needs.

    Raises:
        CheckpointError: the checkpoint is damaged or holds no decoder.
    """
    from okavango.zoo.checkpoint import CheckpointError, load_checkpoint

    heads = {MaskedModalities.entry: lambda backbone, arguments: MaskedModalities(backbone, **arguments)}
    model, _ = load_checkpoint(folder, device=device, heads=heads)
    if not isinstance(model, MaskedModalities):
        raise CheckpointError(f"{folder}: holds no decoder, only an encoder; take export-full of a run, or a converted bmmae.pth")
    return model
