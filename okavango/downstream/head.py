"""What heads that are trained on a backbone share: everything of the objective contract that does not know the task."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from okavango.models.backbone import Backbone
from okavango.models.preprocess import Preprocess


class BackboneHead(nn.Module):
    """Base of a head that holds its backbone as `backbone`.

    Args:
        frozen: the backbone stays as it is, in eval mode.
        layer_decay: the learning rate of block i is multiplied by ``layer_decay ** (blocks + 1 - i)`` (ELECTRA, BEiT); 1 for none.
        decay_vectors: weight decay also on biases, norms and scales.
    Raises:
        ValueError: a layer decay out of range.
    """

    #: where the backbone stands inside
    backbone_prefix = "backbone."

    def __init__(self, backbone: Backbone, *, frozen: bool, layer_decay: float, decay_vectors: bool = False):
        super().__init__()
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay={layer_decay}; expected above 0, at most 1")
        self.frozen, self.layer_decay, self.decay_vectors = frozen, layer_decay, decay_vectors
        self.backbone = backbone
        if frozen:
            backbone.requires_grad_(False)

    @property
    def preprocess(self) -> Preprocess:
        """The backbone's own."""
        return self.backbone.preprocess

    def train(self, mode: bool = True) -> Self:
        """Training mode for what is trained: a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def param_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by layer and kind, from the embedding to the head; see `layer_groups`."""
        return layer_groups(self, self.backbone, self.layer_decay, decay_vectors=self.decay_vectors)

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """The gradient norm is taken over everything that is trained."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]

    def after_step(self, step: int) -> None:
        """Nothing to follow: there is no teacher."""


def layer_groups(head: nn.Module, backbone: Backbone, layer_decay: float, *, decay_vectors: bool = False) -> list[dict[str, Any]]:
    """Trained parameters of a head that holds a backbone as `backbone`, by layer and kind, from the embedding to the head.

    Args:
        layer_decay: the rate of a layer over that of the next one; the head's is 1.
        decay_vectors: biases, norms and scales have weight decay too.
    Returns:
        groups of {"name", "params": [(name, parameter)], "lr_mult", "wd_mult"}.
    """
    layers = {f"backbone.{name}": layer for name, layer in backbone.layer_ids().items()}
    top = max(layers.values(), default=0) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layers.get(name, top), decay_vectors or (parameter.ndim > 1 and not name.endswith("bias"))
        group = {
            "name": f"layer {layer}{'' if decayed else ', no decay'}",
            "params": [],
            "lr_mult": layer_decay ** (top - layer),
            "wd_mult": float(decayed),
        }
        groups.setdefault((layer, decayed), group)["params"].append((name, parameter))
    return [groups[key] for key in sorted(groups)]
