"""Weights files of torchvision's classification networks -> our checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torchvision import models

from okavango.models.backbone import unknown_name
from okavango.models.preprocess import Preprocess
from okavango.models.wrapped import Wrapped, create, torchvision_spec
from okavango.zoo.checkpoint import sha256_now
from okavango.zoo.loading import LoadReport, load_weights

HASH = 8  # torchvision's files end in so many digits of their sha256


def read_official(path: Path, architecture: str) -> tuple[Wrapped, LoadReport]:
    """The tower that a file such as ``mobilenet_v2-b0353104.pth`` holds; the classifier is left out.

    Args:
        path: ``.safetensors``, or a pickle, which is read with `weights_only`.
        architecture: torchvision's name of the network.
    Returns:
        The model, and what became of every tensor. Where the file is one that torchvision lists, by its name and hash, the
        preprocess is the one that torchvision gives these weights; otherwise it is the usual one of ImageNet.
    Raises:
        ValueError: no such network, a torn or foreign file, or a listed name with other contents.
    """
    path = Path(path)
    known = models.list_models(module=models)
    if architecture not in known:
        raise ValueError(unknown_name("torchvision model", architecture, known))
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    listed = next((each for each in models.get_model_weights(architecture) if each.url.endswith(f"/{path.name}")), None)
    if listed is not None and not sha256_now(path).startswith(path.stem.rpartition("-")[2][:HASH]):
        raise ValueError(f"{path}: its sha256 does not begin with the digits in its name; fetch the file again")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TypeError("not a dict of tensors")
    except Exception as error:  # a torn or foreign file makes the readers raise almost anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__}: {reason})") from None
    model = create("torchvision", architecture)
    own = {name.removeprefix("trunk.") for name in model.state_dict()}
    heads = {name.split(".")[0] for name in tensors} & {"fc", "classifier", "head", "heads"}
    skip = {name: "the classifier of ImageNet's classes" for name in tensors if name.split(".")[0] in heads and name not in own}
    report = load_weights(model, tensors, rename={name: f"trunk.{name}" for name in tensors}, skip=skip)
    if listed is not None:
        model.preprocess = Preprocess(image=torchvision_spec(listed, None, f"torchvision/{architecture}"))
    return model.eval(), report
