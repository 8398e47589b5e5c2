"""Keys of the published BM-MAE code (`Lucas-rbnt/BM-MAE`, CC BY-NC 4.0: not for commercial use) <-> ours.

The names and shapes of tensors are all that was taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from okavango.models.bm_mae import ALIASES, BMMAE
from okavango.zoo.loading import LoadReport, load_weights, renamed

LICENCE = "cc-by-nc-4.0"

_FROM = (
    (r"^tokenizers\.(\w+)\.patch_embedding\.patch_embeddings\.", r"backbone.patch_embed.\1."),
    (r"^tokenizers\.(\w+)\.patch_embedding\.position_embeddings$", r"backbone.patch_embed.\1.positions"),
    (r"^(cls_token$|blocks\.|norm\.)", r"backbone.\1"),
    (r"^decoder\.mask_tokens$", "decoder.mask_token"),
    (r"^decoder\.position_embeddings$", "decoder.positions"),
    (r"^decoder\.modality_embeddings\.", "decoder.modality_embed."),
    (r"^decoder\.decoder_(embed|blocks|norm|pred)\.", r"decoder.\1."),
)
_TO = (
    (r"^backbone\.patch_embed\.(\w+)\.positions$", r"tokenizers.\1.patch_embedding.position_embeddings"),
    (r"^backbone\.patch_embed\.(\w+)\.", r"tokenizers.\1.patch_embedding.patch_embeddings."),
    (r"^backbone\.", ""),
    (r"^decoder\.mask_token$", "decoder.mask_tokens"),
    (r"^decoder\.positions$", "decoder.position_embeddings"),
    (r"^decoder\.modality_embed\.", "decoder.modality_embeddings."),
    (r"^decoder\.(embed|blocks|norm|pred)\.", r"decoder.decoder_\1."),
)
_BLOCK_FROM = ((r"^(.*blocks\.\d+\.attn)\.out_proj\.", r"\1.proj."), (r"^(.*blocks\.\d+\.mlp)\.linear([12])\.", r"\1.fc\2."))
_BLOCK_TO = ((r"^(.*blocks\.\d+\.attn)\.proj\.", r"\1.out_proj."), (r"^(.*blocks\.\d+\.mlp)\.fc([12])\.", r"\1.linear\2."))


def ours(name: str) -> str:
    """A published key -> that of a module with the encoder as `backbone` and, of pretraining, `decoder`; heads' keys stay.

    The segmentation network has its encoder under ``vit.``.
    """
    return renamed(renamed(name.removeprefix("vit."), _FROM), _BLOCK_FROM)


def theirs(name: str) -> str:
    """The inverse of `ours`, without ``vit.``."""
    return renamed(renamed(name, _BLOCK_TO), _TO)


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> those of an objective or head, see `ours`."""
    return {ours(name): tensor for name, tensor in tensors.items()}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    return {theirs(name): tensor for name, tensor in tensors.items()}


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a published file: ``.safetensors``, or a pickled state dict, which is read with `weights_only`.

    Raises:
        ValueError: no such file, or none of the published code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        pickled = path.suffix != ".safetensors"
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        known = any(name.removeprefix("vit.").startswith("tokenizers.") for name in tensors)
    except Exception as error:  # a torn or foreign file makes the readers raise almost anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__}: {reason})") from None
    if not known:
        raise ValueError(f"{path}: no weights of the published BM-MAE code (keys like tokenizers.t1.patch_embedding.*)")
    return tensors


def encoder_arguments(tensors: Mapping[str, Tensor], heads: int = 12) -> dict[str, Any]:
    """Arguments of `BMMAE` that published weights tell; the number of attention heads they do not.

    A segmentation network's encoder has no class token. Classifiers and survival heads were trained with dropout 0.1.
    """
    plain = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    found = {name.split(".")[1] for name in plain if name.startswith("tokenizers.")}
    modalities = (*(name for name in ALIASES if name in found), *sorted(found - set(ALIASES)))
    embed = f"tokenizers.{modalities[0]}.patch_embedding"
    width, _, patch, *_ = plain[f"{embed}.patch_embeddings.weight"].shape
    return {
        "modalities": modalities,
        "size": patch * round(plain[f"{embed}.position_embeddings"].shape[1] ** (1 / 3)),
        "patch_size": patch,
        "width": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in plain if name.startswith("blocks.")),
        "heads": heads,
        "mlp": plain["blocks.0.mlp.linear1.weight"].shape[0],
        "dropout": 0.1 if "output_layer.0.weight" in plain else 0.0,
        "class_token": "cls_token" in plain,
    }


def decoder_settings(tensors: Mapping[str, Tensor], heads: int = 12) -> dict[str, Any]:
    """Fields of `BMMAESettings` that weights of pretraining tell."""
    return {
        "decoder_width": tensors["decoder.decoder_embed.weight"].shape[0],
        "decoder_depth": 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.decoder_blocks.")),
        "decoder_heads": heads,
        "decoder_mlp": tensors["decoder.decoder_blocks.0.mlp.linear1.weight"].shape[0],
    }


def read_official(
    path: Path | str, *, heads: int = 12, decoder_heads: int = 12, objective: Callable[..., nn.Module] | None = None
) -> tuple[nn.Module, LoadReport]:
    """Build what a published file holds: of pretraining (``bmmae.pth``), or fine-tuned for classification, survival, segmentation.

    Args:
        path: see `read_weights`.
        heads, decoder_heads: attention heads, which the weights do not tell.
        objective: builds the objective around the encoder, ``objective(encoder, **settings)``; files of pretraining are then read
            whole. Without it, and of other files, the encoder is read and the rest reported as skipped.
    Returns:
        The objective or the encoder, in eval mode, and what became of every tensor.
    Raises:
        ValueError: not a file of the published code.
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    tensors = read_weights(path)
    model: nn.Module = BMMAE(**encoder_arguments(tensors, heads))
    whole = objective is not None and "decoder.decoder_embed.weight" in tensors
    if whole and objective is not None:
        model = objective(model, **decoder_settings(tensors, decoder_heads))
    prefix = "" if whole else "backbone."
    rename = {name: ours(name).removeprefix(prefix) for name in tensors}
    skip = {name: "not part of the encoder" for name in tensors if not ours(name).startswith(prefix)}
    return model.eval(), load_weights(model, tensors, rename=rename, skip=skip)


# -- fine-tuned heads ---------------------------------------------------------------------------------------------------------


def head_ours(name: str) -> str:
    """As `ours`, also for the rest of fine-tuned networks: the UNETR's parts go to `decoder`, the two linear layers to `head`."""
    own = ours(name)
    if own.startswith("backbone."):
        return own
    return f"head.{own.removeprefix('output_layer.')}" if own.startswith("output_layer.") else f"decoder.{own}"


def head_theirs(name: str, segmentation: bool) -> str:
    """The inverse of `head_ours`; of segmentation networks, the encoder stands under ``vit.``."""
    if name.startswith("head."):
        return f"output_layer.{name.removeprefix('head.')}"
    if name.startswith("decoder."):
        return name.removeprefix("decoder.")
    return f"vit.{theirs(name)}" if segmentation else theirs(name)


def head_from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys of a fine-tuned network -> those of our heads."""
    return {head_ours(name): tensor for name, tensor in tensors.items()}


def head_to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `head_from_official`."""
    segmentation = any(name.startswith("decoder.") for name in tensors)
    return {head_theirs(name, segmentation): tensor for name, tensor in tensors.items()}


def head_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights of a fine-tuned network tell of its head.

    Returns:
        {"kind": "segmentation", "feature_size"}, or {"kind": "pooled", "hidden", "outputs"}.
    Raises:
        ValueError: neither head is there.
    """
    if "encoder1.layer.conv1.conv.weight" in tensors:
        return {"kind": "segmentation", "feature_size": tensors["encoder1.layer.conv1.conv.weight"].shape[0]}
    if "output_layer.2.weight" in tensors:
        outputs, hidden = tensors["output_layer.2.weight"].shape
        return {"kind": "pooled", "hidden": hidden, "outputs": outputs}
    raise ValueError("the weights are of no fine-tuned BM-MAE: neither encoder1.* of a UNETR nor output_layer.* is there")


def is_fine_tuned(path: Path | str) -> bool:
    """Whether a published file holds a fine-tuned network, rather than one of pretraining."""
    return bool({"encoder1.layer.conv1.conv.weight", "output_layer.2.weight"} & set(read_weights(path)))


def read_head(
    path: Path | str, build: Callable[[BMMAE, dict[str, Any]], nn.Module], *, heads: int = 12
) -> tuple[nn.Module, LoadReport]:
    """Build a fine-tuned network from its published file.

    Args:
        path: see `read_weights`.
        build: makes the head around the encoder from `head_arguments`.
        heads: attention heads, which the weights do not tell.
    Returns:
        The head, in eval mode, and what became of every tensor.
    Raises:
        ValueError: not a fine-tuned file of the published code.
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    tensors = read_weights(path)
    model = build(BMMAE(**encoder_arguments(tensors, heads)), head_arguments(tensors))
    return model.eval(), load_weights(model, tensors, rename={name: head_ours(name) for name in tensors})
