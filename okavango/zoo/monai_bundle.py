"""The network of a MONAI bundle as a backbone, ``monai/bundle``: to compare with, or to go on from.

Read are ``configs/`` (JSON or YAML) and the weights in ``models/``. A bundle is somebody's program: nothing of it is run. Its
`network_def` may name classes of MONAI, with plain values and references to such; expressions and ``scripts/`` are refused.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from okavango.models.backbone import Backbone
from okavango.models.bm_mae import ALIASES
from okavango.models.monai_nets import create
from okavango.models.preprocess import Normalise
from okavango.zoo.loading import CheckpointError, LoadReport, load_weights

CONFIGS = [f"{name}.{ending}" for name in ("inference", "train") for ending in ("json", "yaml", "yml")]
WEIGHTS = ("model.safetensors", "model.pt", "model.pth")


def read_bundle(folder: Path | str) -> tuple[Backbone, LoadReport]:
    """Network and weights of a bundle, its last layer left out, and a preprocess from what its files tell.

    Modalities are the channels of `metadata.json`, in their order, by our names where they are known ("T1c" is t1ce). Size,
    orientation and spacing are those of the inferer and the preprocessing; where they do not tell, volumes are taken as they are
    stored, and normalised over nonzero voxels (`Normalise.origin` says so then).

    Returns:
        The backbone, in eval mode, and what became of every tensor.
    Raises:
        CheckpointError: no bundle, no `network_def` or weights in it, weights that do not fit, TorchScript.
        ValueError: a network that is not MONAI's, or that makes no map of full size; see `okavango.models.monai_nets`.
    """
    folder = Path(folder)
    configs = folder / "configs"
    if not configs.is_dir():
        raise CheckpointError(f"{folder}: no bundle of MONAI; expected a folder with configs/ and models/ in it")
    config, definition = _definition(configs)
    try:
        metadata = json.loads((configs / "metadata.json").read_text(encoding="utf-8"))
        (image,) = list(metadata["network_data_format"]["inputs"].values())[:1]
        channels = image["channel_def"]
        names = [channels[str(index)] for index in range(len(channels))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{configs / 'metadata.json'}: does not tell the channels of the input ({reason})") from None
    steps = _steps(config)
    model = create(
        "bundle",
        definition=definition,
        modalities=_modalities(names),
        size=_size(config, image),
        spacing=steps.get("Spacing", {}).get("pixdim"),
        orientation=steps.get("Orientation", {}).get("axcodes"),
    )
    rule = "zscore_nonzero" if steps.get("NormalizeIntensity", {}).get("nonzero", True) else "zscore"
    origin = "" if "NormalizeIntensity" in steps else "assumed, the bundle does not tell one that is known here"
    for name in model.modalities:
        model.preprocess = model.preprocess.replace(name, normalise=Normalise(rule=rule, origin=origin))  # type: ignore[arg-type]
    tensors = read_weights(folder / "models")
    places = set(model.state_dict())
    rename = {name: _place(name, places) for name in tensors}
    skip = {name: "the last layer, which makes the bundle's classes" for name in tensors if _is_last(rename[name], model, places)}
    return model.eval(), load_weights(model, tensors, rename=rename, skip=skip)


def _definition(configs: Path) -> tuple[Any, dict[str, Any]]:
    """The parsed file that has a `network_def`, and that as plain data."""
    from monai.bundle import ConfigParser

    found = [configs / name for name in CONFIGS if (configs / name).is_file()]
    for path in found:
        parser = ConfigParser()
        try:
            parser.read_config(path)
            parser.resolve_macro_and_relative_ids()
        except Exception as error:  # a torn or foreign file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: cannot be read ({reason})") from None
        if "network_def" in parser:
            definition = _plain(parser, "@network_def", path)
            if not isinstance(definition, dict) or "_target_" not in definition:
                raise CheckpointError(f"{path}: network_def names no class; expected an entry _target_")
            return parser, definition
    looked = ", ".join(path.name for path in found) or "nothing to read"
    raise CheckpointError(f"{configs}: has no network_def ({looked}); expected one in inference.json or train.json")


def _plain(parser: Any, value: Any, path: Path, depth: int = 0) -> Any:
    """With references replaced by what they stand for."""
    if depth > 50:
        raise CheckpointError(f"{path}: references in network_def run in a circle")
    if isinstance(value, Mapping):
        return {key: _plain(parser, each, path, depth + 1) for key, each in value.items() if key != "_desc_"}
    if isinstance(value, list | tuple):
        return [_plain(parser, each, path, depth + 1) for each in value]
    if isinstance(value, str) and value.startswith("$"):
        raise CheckpointError(
            f"{path}: network_def needs {value!r}, an expression; code of a bundle is not run, write its value there"
        )
    if isinstance(value, str) and value.startswith("@"):
        try:
            return _plain(parser, parser[value[1:]], path, depth + 1)
        except KeyError:
            raise CheckpointError(f"{path}: network_def refers to {value!r}, which is not there") from None
    return value


def _steps(config: Any) -> dict[str, dict[str, Any]]:
    """Transform, without the d of dictionaries -> its arguments, of the preprocessing; those that are plain values."""
    try:
        transforms = config["preprocessing"]["transforms"]
    except (KeyError, TypeError):
        return {}
    found = {}
    for step in transforms if isinstance(transforms, list) else []:
        if isinstance(step, dict) and "_target_" in step:
            name = str(step["_target_"]).rpartition(".")[2].removesuffix("d")
            found[name] = {key: value for key, value in step.items() if not str(value).startswith(("$", "@"))}
    return found


def _size(config: Any, image: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the inferer's windows, or of the input, where they are plain numbers; 128 otherwise."""
    try:
        windows = config["inferer"]["roi_size"]
    except (KeyError, TypeError):
        windows = None
    for sides in (windows, image.get("spatial_shape")):
        if isinstance(sides, list) and len(sides) == 3 and all(isinstance(side, int) and side > 0 for side in sides):
            return tuple(sides)
    return (128, 128, 128)


def _modalities(names: list[str]) -> list[str]:
    """Names of channels as modalities: known sequences by our names, others as identifiers, each once."""
    known = {alias: name for name, others in ALIASES.items() for alias in (name, *others)}
    found: list[str] = []
    for name in names:
        plain = "".join(sign if sign.isalnum() else "_" for sign in str(name).strip().lower()).strip("_")
        plain = known.get(plain.replace("_", ""), plain if plain.isidentifier() else f"channel_{plain}".rstrip("_"))
        found.append(plain if plain not in found else f"{plain}_{len(found)}")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of ``model.safetensors`` or ``model.pt``, a state dict which is read with `weights_only`.

    Raises:
        CheckpointError: neither is there, TorchScript, or no state dict.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        script = ", model.ts is TorchScript, which is a program and is not run" if (folder / "model.ts").is_file() else ""
        raise CheckpointError(f"{folder}: no {WEIGHTS[0]} or {WEIGHTS[1]}{script}; download the bundle's weights (large_files.yml)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise CheckpointError(f"{path}: is TorchScript, a program, and is not run; save its state_dict() as model.safetensors")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a torn or foreign file makes the readers raise almost anything
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not a file of weights ({type(error).__name__}: {reason})") from None
    for key in ("state_dict", "model", "network"):  # what trainers put around it
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path}: holds no state dict, names and tensors; save one")
    return dict(found)


def _place(name: str, places: set[str]) -> str:
    """A name in the file -> that in the backbone; our own bundles keep what is inside `segmenter`."""
    name = name.removeprefix("module.")
    ours = any(place.startswith("network.segmenter.") for place in places) and not name.startswith("segmenter.")
    return f"network.segmenter.{name}" if ours else f"network.{name}"


def _is_last(place: str, model: Backbone, places: set[str]) -> bool:
    """Whether a tensor belongs to what was replaced by nothing."""
    if place in places:
        return False
    try:
        return isinstance(model.get_submodule(place.rpartition(".")[0]), torch.nn.Identity)
    except AttributeError:
        return False
