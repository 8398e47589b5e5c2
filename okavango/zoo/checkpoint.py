"""A checkpoint is a folder: `config.json`, `model.safetensors` and `README.md` (its card). Format version 1.

Nothing in the weights file varies between equal runs. Saving writes a hidden sibling folder first and renames it, so a checkpoint
is either whole or not there. Loading compares the full sha256, never unpickles anything, and says what became of every tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from okavango.files import write_json
from okavango.models.backbone import Backbone, create_model
from okavango.models.features import Features, Subnet, TextBatch
from okavango.models.preprocess import Preprocess, Text
from okavango.zoo.card import render_card
from okavango.zoo.loading import CheckpointError, LoadReport, load_weights

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = FILES = ("config.json", "model.safetensors", "README.md")
KINDS = ("backbone", "objective", "head")
_FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "kind": (str,),
    "architecture": (str,),
    "arguments": (dict,),
    "preprocess": (dict,),
    "parent": (dict, type(None)),
    "subnet": (str, type(None)),
    "backbone_prefix": (str,),
    "head": (dict, type(None)),
    "probe": (dict,),
    "weights": (dict,),
    "okavango": (str,),
}
PROBE_TOLERANCE = 1e-3  # of the root mean square of the output; kernels differ between CPUs by about 1e-6

Head = Callable[[Backbone, dict], nn.Module]


# -- reading ------------------------------------------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """`config.json` of a checkpoint, checked.

    Raises:
        CheckpointError: not a checkpoint, a newer format, a field that is missing or of the wrong type.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a checkpoint, it has no {CONFIG}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch or save the checkpoint again") from None
    problems = config_problems(config)
    if problems:
        raise CheckpointError(f"{path}: {problems[0]}")
    return config


def config_problems(config: Any) -> list[str]:
    """What is wrong with the content of a `config.json`."""
    if not isinstance(config, dict):
        return ["expected a JSON object"]
    if config.get("format_version") != FORMAT_VERSION:
        return [f"format_version {config.get('format_version')!r}; this okavango reads version {FORMAT_VERSION}, update it"]
    problems = []
    for name, types in _FIELDS.items():
        if name not in config:
            problems.append(f"field {name!r} is missing")
        elif not isinstance(config[name], types):
            problems.append(f"field {name!r} is {config[name]!r}; expected {' or '.join(t.__name__ for t in types)}")
    if problems:
        return problems
    weights, head = config["weights"], config["head"]
    if config["kind"] not in KINDS:
        problems.append(f"kind {config['kind']!r}; expected one of {', '.join(KINDS)}")
    if weights.get("file") != WEIGHTS or not isinstance(weights.get("bytes"), int) or len(str(weights.get("sha256"))) != 64:
        problems.append(f"field 'weights' is {weights!r}; expected file {WEIGHTS!r}, bytes and a sha256 of 64 hexadecimal digits")
    if config["arguments"].get("pretrained"):  # a config from elsewhere must not fetch or open further files
        problems.append("arguments name 'pretrained'; the weights of a checkpoint are its own, remove it")
    if head is not None and not (isinstance(head.get("entry"), str) and isinstance(head.get("arguments"), dict)):
        problems.append(f"field 'head' is {head!r}; expected entry 'module:function' and arguments")
    try:
        Preprocess.from_json(config["preprocess"])
    except (ValueError, TypeError) as error:
        problems.append(f"field 'preprocess': {error}")
    return problems


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a file; remembered while its size, time and inode stay the same."""
    stat = os.stat(path)
    return _file_sha256(os.fspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, mtime_ns: int, inode: int) -> str:
    del size, mtime_ns, inode
    return sha256_now(path)


def sha256_now(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a file as it is on the disk now."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_problem(folder: str | os.PathLike, config: Mapping[str, Any]) -> str | None:
    """Why the weights file is not the one that `config` describes, in one line; None when it is."""
    path, weights = Path(folder) / WEIGHTS, config["weights"]
    if not path.is_file():
        return f"{path}: the file is missing"
    if path.stat().st_size != weights["bytes"]:
        return f"{path}: {path.stat().st_size} bytes; {CONFIG} says {weights['bytes']}"
    digest = file_sha256(path)
    return None if digest == weights["sha256"] else f"{path}: sha256 {digest}; {CONFIG} says {weights['sha256']}"


def load_checkpoint(
    folder: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    model: nn.Module | None = None,
    heads: Mapping[str, Head] | None = None,
    base: str | os.PathLike | None = None,
) -> tuple[nn.Module, LoadReport]:
    """Build the model that a checkpoint holds and fill it.

    An objective or a head contains a backbone. That backbone is returned unless `heads` knows the head or `model` is something
    else than a backbone; the other tensors are then reported as skipped.

    Args:
        folder: the checkpoint.
        device: where the model goes.
        dtype: of floating weights; None means as the architecture builds them (float32), whatever the file holds.
        strict: see `load_weights`.
        model: filled instead of a new one; an objective or head takes all tensors of a checkpoint of its kind.
        heads: entry ("module:function") -> function of (backbone, arguments) that builds the head. Only these are ever called.
        base: folder of the frozen backbone, for a checkpoint that holds only what was trained on it; see `base_folder`.
    Returns:
        The model in eval mode, with the report also as ``model.load_report``.
    Raises:
        CheckpointError: no checkpoint, damaged weights, an unknown head, or (strict) weights that do not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    problem = weights_problem(folder, config)
    if problem:
        raise CheckpointError(f"{problem}; fetch or save the checkpoint again")

    make_head, head = None, config["head"]
    if head and heads and model is None:
        make_head = heads.get(head["entry"])
        if make_head is None:
            raise CheckpointError(f"{folder}: head {head['entry']!r} is not allowed here; known: {', '.join(heads)}")

    def build() -> nn.Module:
        try:
            backbone = create_model(config["architecture"], **_tuples(config["arguments"]))
        except TypeError as error:
            raise CheckpointError(f"architecture {config['architecture']!r} refuses the stored arguments: {error}") from error
        backbone.preprocess = Preprocess.from_json(config["preprocess"])
        return make_head(backbone, _tuples(head["arguments"])) if make_head else backbone

    whole = make_head is not None or not (model is None or isinstance(model, Backbone))
    prefix = "" if whole else config["backbone_prefix"]
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = list(file.keys())
            # Cloned: tensors in a mapped file start at odd addresses, where kernels round otherwise than in torch's own memory.
            tensors = {name: file.get_tensor(name).clone() for name in names if name.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: not a safetensors file ({error}); fetch or save the checkpoint again") from None
    rename = {name: name.removeprefix(prefix) for name in tensors} if prefix else {}
    if config.get("partial"):
        for name, (place, tensor) in _frozen(base_folder(folder, config, base), config["parent"], tensors).items():
            tensors[f"base/{name}"], rename[f"base/{name}"] = tensor, place
    try:
        if model is None:
            model, report = _build_and_load(build, tensors, rename, strict)
        else:
            report = load_weights(model, tensors, rename=rename, strict=strict)
            if isinstance(model, Backbone):
                model.preprocess = Preprocess.from_json(config["preprocess"])
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    rest = {name: "not part of the backbone" for name in names if name not in tensors}
    report = dataclasses.replace(report, skipped={**report.skipped, **rest})
    model.load_report = report  # type: ignore[assignment]
    return model.to(device, dtype).eval(), report


def base_folder(folder: str | os.PathLike, config: Mapping[str, Any], base: str | os.PathLike | None = None) -> Path:
    """Where the frozen network of a checkpoint lies that holds only what was trained on it.

    Args:
        folder: the checkpoint; config: its `config.json`.
        base: the answer, where the caller knows it; None takes what the checkpoint says, which is a path that starts from `folder`.
    Raises:
        CheckpointError: nothing is there.
    """
    parent = config["parent"]
    for found in (Path(folder, parent["name"]), Path(parent["name"])) if base is None else (Path(base),):
        if (found / WEIGHTS).is_file():
            return found
    raise CheckpointError(
        f"{folder}: holds only what was trained on its base {parent['name']!r} (sha256 {parent['sha256'][:16]}...), and no "
        f"checkpoint is {'there' if base is None else f'at {base}'}; put it back, or name it by base="
    )


def _frozen(base: Path, parent: Mapping[str, str], own: Iterable[str]) -> dict[str, tuple[str, Tensor]]:
    """The tensors of a frozen network, and where they stand in a model that was adapted from it.

    Args:
        base: its checkpoint, or that of a model which was adapted before and holds it; parent: with the sha256 that is expected.
        own: names of what was trained; a layer with LoRA's updates keeps its own weights one level deeper.
    Returns:
        name in the base -> (name in the model, tensor).
    """
    if (found := file_sha256(base / WEIGHTS)) != parent["sha256"]:
        raise CheckpointError(f"base {base}: sha256 {found}; expected {parent['sha256']}, the one that was trained on")
    prefix = read_config(base)["backbone_prefix"]
    updated = sorted({name.partition(".lora_")[0] for name in own if ".lora_" in name}, key=len)

    def place(name: str) -> str:
        name = f"backbone.{name}"
        for layer in updated:
            if name.startswith(f"{layer}."):
                name = f"{layer}.base_layer{name.removeprefix(layer)}"
        return name

    with safe_open(base / WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        adapted = [name for name in names if name.startswith(f"{prefix}backbone.") and ".lora_" not in name]
        places = {name: name.removeprefix(prefix) for name in adapted} or {name: place(name.removeprefix(prefix)) for name in names}
        return {name: (place, file.get_tensor(name).clone()) for name, place in places.items()}


def _build_and_load(
    build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], rename: Mapping[str, str], strict: bool
) -> tuple[nn.Module, LoadReport]:
    """Build on the meta device, which spends nothing on random weights; build for real where that leaves anything unfilled."""
    try:
        with torch.device("meta"):
            model = build()
    except (RuntimeError, NotImplementedError):  # reads the values of tensors while it is being built
        model = None
    if model is not None and not _has_ties(model):
        report = load_weights(model, tensors, rename=rename, strict=strict)
        if not any(tensor.is_meta for tensor in _all_tensors(model)):
            return model, report
    with torch.random.fork_rng(devices=[]):  # loading must not move the caller's random numbers
        model = build()
    return model, load_weights(model, tensors, rename=rename, strict=strict)


def _has_ties(model: nn.Module) -> bool:
    return len(list(model.named_parameters(remove_duplicate=False))) != len(list(model.parameters()))


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers (also those that are not saved) and tensors kept as plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _tuples(value):
    """JSON has no tuples: lists of arguments become tuples again."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


# -- probe --------------------------------------------------------------------------------------------------------------------


def probe_shapes(preprocess: Preprocess, batch: int = 1) -> dict[str, dict[str, Any]]:
    """Modality -> ``{"shape": [...]}`` of an input that the backbone takes; texts also have ``vocabulary``."""
    shapes: dict[str, dict[str, Any]] = {}
    for name, spec in preprocess.items():
        if isinstance(spec, Text):
            shapes[name] = {"shape": [batch, spec.length], "vocabulary": spec.vocabulary}
        else:
            shapes[name] = {"shape": [batch, len(spec.channels), *spec.size]}
    return shapes


def probe_inputs(shapes: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, Tensor | TextBatch]:
    """Inputs that are the same on every machine and in every version of every library: they come out of SHAKE-128.

    Returns:
        modality -> float32 values in [-2, 2), as after normalisation, or a `TextBatch` of ids below the vocabulary.
    """
    inputs: dict[str, Tensor | TextBatch] = {}
    for name, entry in shapes.items():
        shape = tuple(entry["shape"])
        raw = hashlib.shake_128(f"{seed}:{name}".encode()).digest(4 * int(np.prod(shape)))
        numbers = np.frombuffer(raw, "<u4").reshape(shape)
        if "vocabulary" in entry:
            ids = torch.from_numpy((numbers % max(1, entry["vocabulary"])).astype(np.int64))
            inputs[name] = TextBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        else:
            inputs[name] = torch.from_numpy((numbers / 2.0**30 - 2).astype(np.float32))
    return inputs


def summary(features: Features) -> Tensor:
    """One vector a sample (B, D): `pooled`, or the mean of the coarsest map or of the first modality's tokens without it."""
    if features.pooled is not None:
        return features.pooled
    if features.maps:
        return features.maps[-1].flatten(2).mean(-1)
    return next(iter(features.tokens.values())).mean(1)


@torch.inference_mode()
def _digest(backbone: nn.Module, shapes: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    output = summary(backbone(probe_inputs(shapes, seed))).double().flatten()
    return {"size": len(output), "norm": float(output.norm()), "head": [round(float(value), 6) for value in output[:8]]}


def _digest_problem(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    if stored["size"] != found["size"]:
        return f"probe: the output has {found['size']} values; the checkpoint says {stored['size']}"
    limit = PROBE_TOLERANCE * max(found["norm"] / found["size"] ** 0.5, 1e-6) + 1e-6
    pairs = [(stored["norm"] / stored["size"] ** 0.5, found["norm"] / found["size"] ** 0.5)]
    pairs += list(zip(stored["head"], found["head"], strict=True))
    worst = max(abs(a - b) for a, b in pairs)
    return None if worst <= limit else f"probe: the output differs by {worst:.3g}; at most {limit:.3g} is allowed"


def verify_checkpoint(folder: str | os.PathLike, *, base: str | os.PathLike | None = None) -> list[str]:
    """All that is wrong with a checkpoint, one line each; empty when it is sound.

    Checks that the files are there, the fields of the config, the sha256 of the weights, the card's front matter, that every
    tensor finds its place in the backbone, and that the backbone answers the probe as it did when it was saved. `base` is that of
    `load_checkpoint`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    problems = [f"{folder / name}: the file is missing" for name in FILES if not (folder / name).is_file()]
    try:
        config = read_config(folder)
    except CheckpointError as error:
        return problems + ([] if f"{folder / CONFIG}: the file is missing" in problems else [str(error)])
    if (folder / CARD).is_file() and not (folder / CARD).read_text(encoding="utf-8").startswith("---\n"):
        problems.append(f"{folder / CARD}: no YAML front matter (licence, tags)")
    damage = weights_problem(folder, config) if (folder / WEIGHTS).is_file() else None
    if damage or problems:
        return problems + ([damage] if damage else [])
    try:
        backbone, _ = load_checkpoint(folder, base=base)
        probe = config["probe"]
        problem = _digest_problem(probe["output"], _digest(backbone, probe["inputs"], probe["seed"]))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return [f"{folder}: {problem}"] if problem else []


# -- writing ------------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    kind: str = "backbone",
    card: Mapping[str, Any] | None = None,
    parent: Mapping[str, str] | None = None,
    subnet: Subnet | None = None,
    dtype: torch.dtype | None = None,
    backbone_prefix: str = "",
    head: Mapping[str, Any] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    base: str | os.PathLike | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all; an older checkpoint at the same place is replaced.

    What was written is loaded once more to record how the backbone answers the probe, so a checkpoint that cannot be loaded is
    never left behind. The model, its mode and the random numbers of the caller stay as they are.

    Args:
        model: a backbone, or an objective or head that contains one.
        folder: where the checkpoint goes; parents are made.
        kind: "backbone", "objective" or "head".
        card: what the README says, see `render_card`.
        parent: ``{"name", "sha256"}`` of the checkpoint this one came from.
        subnet: the slice of the parent that this is.
        dtype: of floating tensors in the file; None means as they are.
        backbone_prefix: of the backbone's tensors inside an objective or head, e.g. "teacher.backbone.".
        head: ``{"entry": "module:function", "arguments": {...}}``, what rebuilds a head, or an objective, around its backbone.
        extra_config: further fields of `config.json`.
        base: checkpoint folder of the frozen backbone of an adapted one, or of one that was adapted before from the same: only what
            was trained is written, and loading needs the base again, by the name in `parent` (by default the way from `folder` to
            it) and its sha256.
    Returns:
        The folder.
    Raises:
        CheckpointError: the folder holds something else, the backbone cannot be rebuilt, arguments are not JSON, the disk is full.
    """
    folder = Path(folder)
    whole = model.state_dict()
    if base is not None:
        if problem := base_problem(model, base):
            raise CheckpointError(f"{problem}; save it without base=")
        parent = {"name": os.path.relpath(base, folder), **(parent or {}), "sha256": file_sha256(Path(base) / WEIGHTS)}
        extra_config = {**(extra_config or {}), "partial": True}
        whole = dict(model.trained())  # type: ignore[operator]
    config = _config(model, kind, parent, subnet, backbone_prefix, head, extra_config or {})
    _refuse_foreign(folder)
    tensors = {}
    for name, tensor in sorted(whole.items()):
        tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # tied tensors share memory, the format allows none
    floats = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _staging(folder) as staging:
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
            (staging / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner can read
            config["weights"] = {
                "file": WEIGHTS,
                "sha256": file_sha256(staging / WEIGHTS),
                "bytes": (staging / WEIGHTS).stat().st_size,
                "dtype": "+".join(floats),
            }
            (staging / CARD).write_text(render_card({"title": folder.name, **(card or {})}, config), encoding="utf-8")
            write_json(staging / CONFIG, config, indent=2)
            backbone, _ = load_checkpoint(staging, base=base)
            config["probe"]["output"] = _digest(backbone, config["probe"]["inputs"], config["probe"]["seed"])
            write_json(staging / CONFIG, config, indent=2)
            replace_folder(staging, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); free some space or choose another folder") from None
    return folder


def base_problem(model: nn.Module, base: str | os.PathLike) -> str | None:
    """Why a checkpoint is not the frozen network of an adapted backbone, in one line; None when it is.

    Args:
        model: with a method `trained`, see `okavango.models.adapters.Adapted`; base: the checkpoint's folder.
    """
    trained: Any = getattr(model, "trained", None)
    if trained is None:
        return f"{type(model).__name__}: is not an adapted backbone"
    own, tensors = dict(trained()), model.state_dict()
    frozen = dict(_frozen(Path(base), {"sha256": file_sha256(Path(base) / WEIGHTS)}, own).values())
    for name in tensors.keys() - own.keys():
        if name not in frozen or not torch.equal(frozen[name], tensors[name].detach().cpu()):
            return f"{type(model).__name__}: {name!r} is not that of {os.fspath(base)}"
    return None


def _config(model, kind, parent, subnet, prefix, head, extra) -> dict[str, Any]:
    """All of `config.json` but the weights and the probe's output."""
    if kind not in KINDS:
        raise CheckpointError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
    if prefix and not prefix.endswith("."):
        raise CheckpointError(f"backbone_prefix {prefix!r}: must end with a dot")
    try:
        backbone = model.get_submodule(prefix.removesuffix("."))
    except AttributeError:
        raise CheckpointError(
            f"{type(model).__name__} has no submodule {prefix.removesuffix('.')!r}; mend backbone_prefix"
        ) from None
    if not isinstance(backbone, Backbone):
        what = f"{type(model).__name__}.{prefix}".removesuffix(".")
        raise CheckpointError(f"{what} is a {type(backbone).__name__}, not a Backbone; name the one inside by backbone_prefix")
    if (kind == "head" and head is None) or (kind == "backbone" and head is not None):
        raise CheckpointError("kind 'head' and head= go together: pass both or none")
    config = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "architecture": backbone.architecture,
        "arguments": dict(backbone.arguments),
        "preprocess": backbone.preprocess.to_json(),
        "parent": dict(parent) if parent else None,
        "subnet": str(subnet) if subnet else None,
        "backbone_prefix": prefix,
        "head": dict(head) if head else None,
        "probe": {"seed": 0, "inputs": probe_shapes(backbone.preprocess)},
        "weights": {},
        "okavango": _version(),
    }
    clash = sorted(set(extra) & set(config))
    if clash:
        raise CheckpointError(f"extra_config: {clash[0]!r} is a field of its own; choose another name")
    config |= extra
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{type(model).__name__}: its arguments or extra_config are not plain JSON ({error})") from None


def _version() -> str:
    try:
        return version("okavango")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _refuse_foreign(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder}: exists and is not a folder; choose another place")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: holds files but no checkpoint, so it is not overwritten; choose another place")
    if folder.is_dir():
        extra = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
        if extra:
            raise CheckpointError(f"{folder}: holds {extra[0]!r} beside the checkpoint, so it is not overwritten; move it away")


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden sibling of `folder` to write in; what killed processes left there is swept away."""
    start = f".{folder.name}.saving-"
    for path in folder.parent.glob(f"{start}*"):
        pid = path.name.removeprefix(start)
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    staging = folder.parent / f"{start}{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def replace_folder(staging: Path, folder: Path) -> None:
    """Put a finished folder in its place: everything in it reaches the disk first, then it is renamed."""
    for path in [*staging.iterdir(), staging]:
        sync(path)
    if folder.exists():
        old = folder.parent / f".{folder.name}.old-{os.getpid()}"
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old)
    else:
        staging.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
