"""Segmentation of studies: a decoder on a backbone of volumes, trained by Dice and cross-entropy. Any subset of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.data.studies import REGIONS
from okavango.downstream.classification.features import evaluating
from okavango.downstream.segmentation.losses import REGION_LOSSES, dice_ce
from okavango.downstream.volumes import StudyObjective, volume_specs
from okavango.models.backbone import Backbone, resolve_layers

TUMOUR = tuple(REGIONS["brats"])  # ("TC", "WT", "ET"), the order of channels


class Segmenter(StudyObjective):
    """Backbone and decoder. Satisfies the objective contract and adds `predict`.

    The target is either the tumour's regions, which overlap (sigmoids), or, where `labels` names them, label numbers that exclude
    each other (softmax, background first).

    A backbone of tokens gets a UNETR decoder, whose first block reads the volumes themselves: sequences that a study lacks are
    zeros there (the mean of a normalised volume, and its background), and are left out of the averaged hidden states. With
    `modalities`, the decoder is built for those sequences alone, as the published one is. A backbone with maps of full size, such
    as MONAI's networks, gets a convolution of 1 x 1 x 1.

    Args:
        backbone: of volumes, all on one grid.
        labels: names of the label numbers 1, 2, ...; () for regions.
        decoder: "unetr", or "linear": one linear layer on the last tokens, scaled up.
        feature_size: channels of the UNETR decoder at full size.
        layers: blocks whose outputs it reads, () for evenly spaced ones.
        loss: "dice_bce", or "official" (see `losses.dice_softmax_multihot`); labels have their own.
        **settings: see `StudyObjective`.
    Raises:
        ValueError: a setting out of range, a backbone with neither tokens nor maps of full size.
    """

    facts = ("seg",)
    entry = "okavango.downstream.segmentation.head:Segmenter"

    def __init__(
        self,
        backbone: Backbone,
        *,
        labels: Sequence[str] = (),
        decoder: Literal["unetr", "linear"] = "unetr",
        feature_size: int = 16,
        layers: Sequence[int] = (),
        loss: str = "dice_bce",
        **settings: Any,
    ):
        super().__init__(backbone, **settings)
        if loss not in REGION_LOSSES:
            raise ValueError(f"segmentation: loss={loss!r}; expected {' or '.join(REGION_LOSSES)}")
        if labels and loss != "dice_bce":
            raise ValueError(f"segmentation: loss={loss!r} is of regions; labels that exclude each other have their own")
        if decoder not in ("unetr", "linear"):
            raise ValueError(f"segmentation: decoder={decoder!r}; expected unetr or linear")
        self.labels, self.loss, self.feature_size = tuple(labels), loss, feature_size
        self.kind: str = decoder
        self.seg = "labels" if labels else "regions"
        self.top_label = len(self.labels)
        self.regions = self.labels or TUMOUR
        outputs = len(self.labels) + 1 if labels else len(TUMOUR)
        specs = volume_specs(backbone.preprocess)
        info = backbone.feature_info
        self.patch = info.strides[-1]
        self.layers: tuple[int, ...] = ()
        if self.patch == 1:
            self.kind = "map"
            self.decoder: nn.Module = nn.Conv3d(info.layer_channels[-1], outputs, 1)
        elif decoder == "linear":
            self.decoder = nn.Conv3d(info.layer_channels[-1], outputs, 1)
        else:
            from okavango.downstream.segmentation.unetr import UnetrDecoder, hidden_blocks

            channels = sum(len(specs[name].channels) for name in self.modalities)
            self.decoder = UnetrDecoder(channels, outputs, info.layer_channels[-1], self.patch, feature_size)
            count = self.decoder.levels - 1
            self.layers = resolve_layers(layers, info.layers) if layers else hidden_blocks(info.layers, count)
            if len(self.layers) != count:
                raise ValueError(f"segmentation: {len(self.layers)} layers; patches of {self.patch} voxels need {count}")
        self.train(self.training)

    def logits(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Scores before sigmoid or softmax, (B, regions or 1 + labels, D, H, W).

        Args:
            inputs: modality -> (B, C, D, H, W); those that are not given are absent. What the head was not built for is not used.
            present: bool (B, modalities of the backbone), what each sample has.
        Raises:
            ValueError: none of the head's modalities.
        """
        inputs = {name: inputs[name] for name in self.modalities if name in inputs}
        if not inputs:
            raise ValueError(f"segmentation: no input; expected some of {', '.join(self.modalities)}")
        size = next(iter(inputs.values())).shape[-3:]
        if present is not None:
            present = present & torch.tensor([name in inputs for name in self.backbone.modalities], device=present.device)
        inputs = {name: _padded(volume, self.patch) for name, volume in inputs.items()}
        features = self.backbone(inputs, present=present, layers=self.layers)
        if self.kind == "map":
            if not features.maps:
                raise ValueError(f"segmentation: {self.backbone.architecture} returned no map of full size")
            out = self.decoder(features.maps[0])
        elif self.kind == "linear":
            out = self.decoder(self._map(features, present))
            out = F.interpolate(out, scale_factor=float(self.patch), mode="trilinear")
        else:
            hidden = [self._map(features.layers[index], present) for index in self.layers]
            out = self.decoder(self._volumes(inputs, present), hidden, self._map(features, present))
        return out[..., : size[0], : size[1], : size[2]]

    def _map(self, features: Any, present: Tensor | None) -> Tensor:
        from okavango.downstream.segmentation.unetr import averaged

        return averaged(features.tokens, features.grid, self.backbone.modalities, present)

    def _volumes(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> Tensor:
        """All volumes of the head as channels, zero where absent."""
        first, specs, columns = next(iter(inputs.values())), volume_specs(self.preprocess), list(self.backbone.modalities)
        channels = []
        for name in self.modalities:
            if name not in inputs:
                channels.append(first.new_zeros(first.shape[0], len(specs[name].channels), *first.shape[2:]))
            elif present is None:
                channels.append(inputs[name])
            else:
                channels.append(torch.where(present[:, columns.index(name), None, None, None, None], inputs[name], 0))
        return torch.cat(channels, 1)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            batch: what `collate` made.
            step: not used; the objective contract has it.
        Returns:
            "loss": scalar, with gradient; "dice": mean over regions or labels of the batch's Dice after thresholding, 0..1.
        """
        target = batch["seg"]
        logits = self.logits(batch, batch["present"]).float()
        loss = dice_ce(logits, target) if self.labels else REGION_LOSSES[self.loss](logits, target)
        with torch.no_grad():
            if self.labels:
                names = torch.arange(1, len(self.labels) + 1, device=logits.device)[None, :, None, None, None]
                said, true = logits.argmax(1, keepdim=True) == names, target == names
            else:
                said, true = logits > 0, target.bool()
            axes = (0, 2, 3, 4)
            dice = (2 * (said & true).sum(axes) + 1e-5) / (said.sum(axes) + true.sum(axes) + 1e-5)
        return {"loss": loss, "dice": dice.mean()}

    def predict(self, inputs: Mapping[str, Tensor], *, present: Tensor | None = None) -> Tensor:
        """Probabilities, float32 (B, regions or labels, D, H, W); run in eval mode without gradients.

        Args:
            inputs: what ``preprocess(t1=..., flair=...)`` returns, without its "present"; see `logits`.
        """
        with evaluating(self), torch.no_grad():
            return self.probabilities(self.logits(inputs, present).float())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each region, or of each label without the background."""
        return logits.softmax(1)[:, 1:] if self.labels else logits.sigmoid()

    def head_config(self) -> dict[str, Any]:
        """What rebuilds this head around its backbone: for `save_checkpoint(head=...)`."""
        own = {"labels": list(self.labels), "feature_size": self.feature_size, "layers": list(self.layers), "loss": self.loss}
        kind = {} if self.kind == "map" else {"decoder": self.kind}
        return {"entry": self.entry, "arguments": {**own, **kind, **self.arguments()}}

    def exports(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """The trained segmenter and what its card says."""
        return {"segmenter": (self, {"task": "segmentation", "regions": list(self.regions), **self.head_config()["arguments"]})}


def _padded(volume: Tensor, multiple: int) -> Tensor:
    """With zeros behind, so that the patch divides all sides."""
    short = [-side % multiple for side in volume.shape[-3:]]
    return F.pad(volume, [0, short[2], 0, short[1], 0, short[0]]) if any(short) else volume
