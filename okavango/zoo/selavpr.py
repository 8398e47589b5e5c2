"""Keys of the published SelaVPR code (`Lu-Feng/SelaVPR`, MIT) <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from okavango.models.adapters import Adapted
from okavango.models.preprocess import Image, Preprocess, Resize
from okavango.models.selavpr import selavpr, selavpr_vit_base, selavpr_vit_large, selavpr_vit_small
from okavango.zoo.loading import LoadReport, load_weights, renamed

# published evaluations resize the normalised picture without antialias, which moves descriptors
PUBLISHED_RESIZE = Resize(rule="exact", interpolation="bilinear", antialias=False, on="normalised")
SKIP = {"*mask_token": "not used by the method"}
_PRESETS = {(384, 12): selavpr_vit_small, (768, 12): selavpr_vit_base, (1024, 24): selavpr_vit_large}

_NAMES = (  # official -> ours, by the start of a name; N is a number
    ("backbone.blocks.N.adapter1.D_fc1.", "adapters.trunk-blocks-N-attn.down."),
    ("backbone.blocks.N.adapter1.D_fc2.", "adapters.trunk-blocks-N-attn.up."),
    ("backbone.blocks.N.adapter2.D_fc1.", "adapters.trunk-blocks-N-mlp.down."),
    ("backbone.blocks.N.adapter2.D_fc2.", "adapters.trunk-blocks-N-mlp.up."),
    ("backbone.register_tokens", "backbone.trunk.reg_token"),
    ("backbone.", "backbone.trunk."),
    ("aggregation.1.p", "pool.p"),
    ("LocalAdapt.upconv1.", "local.convs.0."),
    ("LocalAdapt.upconv2.", "local.convs.1."),
)


def _rule(old: str, new: str) -> tuple[str, str]:
    return "^" + re.escape(old).replace("N", r"(\d+)"), new.replace("N", r"\1")


_FROM = tuple(_rule(theirs, ours) for theirs, ours in _NAMES)
_TO = tuple(_rule(ours, theirs) for theirs, ours in _NAMES)


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official keys, with or without ``module.``, -> ours; the mask token, which nothing uses, is left out."""
    return {
        renamed(name.removeprefix("module."), _FROM): tensor for name, tensor in tensors.items() if not name.endswith("mask_token")
    }


def to_official(tensors: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """The inverse of `from_official`, with a mask token of zeros, which the published code asks for.

    Args:
        prefix: "module." for the keys of a published checkpoint's ``model_state_dict``.
    """
    named = {prefix + renamed(name, _TO): tensor for name, tensor in tensors.items()}
    if (token := tensors.get("backbone.trunk.cls_token")) is not None:
        named[f"{prefix}backbone.mask_token"] = token.new_zeros(1, token.shape[-1])
    return named


def read_official(path: Path, *, image_size: int = 224, head_dim: int = 64) -> tuple[Adapted, LoadReport]:
    """Build the model that a published checkpoint (``SelaVPR_*.pth``) holds.

    Args:
        path: ``.safetensors``, or a pickle with ``model_state_dict``, which is read with `weights_only`; numpy's arrays, in which
            the published code keeps its recalls, are allowed.
        image_size: side of the input in pixels, since the weights do not tell it.
        head_dim: channels per attention head.
    Returns:
        The model, whose preprocess is that of the published evaluation, and what became of every tensor.
    Raises:
        ValueError: not a checkpoint of the published code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:  # a torn or foreign file makes the readers raise almost anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__}: {reason})") from None
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if not {"backbone.blocks.0.adapter1.D_fc1.weight", "backbone.pos_embed", "LocalAdapt.upconv2.weight"} <= set(plain):
        raise ValueError(
            f"{path}: no checkpoint of the published SelaVPR code (keys like module.backbone.blocks.0.adapter1.D_fc1.weight, "
            "module.LocalAdapt.upconv2.weight)"
        )
    arguments, build = _arguments(plain, image_size, head_dim)
    model = build(**arguments)
    model.architecture = build.__name__
    model.preprocess = Preprocess(image=Image(size=(image_size, image_size), resize=PUBLISHED_RESIZE))
    rename = {name: renamed(name.removeprefix("module."), _FROM) for name in tensors}
    return model.eval(), load_weights(model, tensors, rename=rename, skip=SKIP)


def _unpickle(path: Path) -> dict[str, Tensor]:
    # what numpy's arrays and numbers are made of in a pickle; nothing of it runs code of the file's choosing
    kinds = [np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]
    core = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    allowed: list[Any] = [core._reconstruct, core.scalar, np.ndarray, np.dtype, *kinds]
    old_names = [(function, f"numpy.core.multiarray.{function.__name__}") for function in (core._reconstruct, core.scalar)]
    with torch.serialization.safe_globals([*allowed, *old_names]):
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return stored.get("model_state_dict", stored)


def _arguments(tensors: Mapping[str, Tensor], image_size: int, head_dim: int):
    """What the shapes of the weights tell, and the function that builds such a model."""
    width, _, patch_size, _ = tensors["backbone.patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("backbone.blocks."))
    registers = tensors["backbone.register_tokens"].shape[1] if "backbone.register_tokens" in tensors else 0
    hidden = tensors["backbone.blocks.0.adapter1.D_fc1.weight"].shape[0]
    arguments = {
        "image_size": image_size,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "head_dim": head_dim,
        "registers": registers,
        "table_size": patch_size * round((tensors["backbone.pos_embed"].shape[1] - 1) ** 0.5),
        "adapt": {"kind": "bottleneck", "ratio": hidden / width},
        "local": tuple(tensors[f"LocalAdapt.upconv{number}.weight"].shape[1] for number in (1, 2)),
    }
    return arguments, _PRESETS.get((width, depth), selavpr)
