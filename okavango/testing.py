"""Conformance checks for backbones and objectives, for this library's own and for those of other packages.

    from okavango.testing import check_backbone
    check_backbone(lambda: MyBackbone(width=64))

Each rule is one function; a rule that is broken raises `AssertionError` with one sentence that says what was expected.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from okavango.models.backbone import Backbone, Elastic, create_model
from okavango.models.features import Features, TextBatch
from okavango.models.preprocess import Text
from okavango.zoo.checkpoint import load_checkpoint, probe_inputs, probe_shapes, save_checkpoint
from okavango.zoo.export import export_onnx, export_program

TOLERANCE = 1e-5  # times the largest value that is compared, at least 1

Sizes = Mapping[str, tuple[int, ...]]


def check_backbone(
    build: Callable[[], Backbone] | str,
    *,
    batch: int = 2,
    sizes: Sizes | None = None,
    export: bool = True,
    tmp: str | Path | None = None,
) -> list[str]:
    """Check all that the library promises of a backbone.

    Args:
        build: returns a new backbone whose architecture is registered (so that a checkpoint can rebuild it); or a name for
            `create_model`.
        batch: samples, at least 2.
        sizes: modality -> sizes of the input in pixels or voxels, where the preprocess's own are too large for a test.
        export: also export to `torch.export` and ONNX and run both (slow); always at the preprocess's own size.
        tmp: folder for files; None takes a temporary one.
    Returns:
        names of the rules that were checked.
    Raises:
        AssertionError: one sentence about the first broken rule.

    A parameter that a plain forward does not use (a mask token, a classifier) is listed in `backbone.optional_parameters`.

    Example:
        >>> "subnets" in check_backbone("elastic_vit_tiny", export=False)
        True
    """
    if batch < 2:
        raise ValueError(f"batch {batch}: expected at least 2 samples")
    torch.manual_seed(0)
    model = create_model(build) if isinstance(build, str) else build()
    _expect(isinstance(model, Backbone), f"{type(model).__name__}: must be a subclass of okavango.models.backbone.Backbone")
    model.eval()
    check_declarations(model)
    inputs = example_inputs(model, batch, sizes)
    check_shapes(model, inputs)
    check_deterministic(model, inputs)
    check_batch_independent(model, inputs)
    check_layers(model, inputs)
    check_unknown_modality(model)
    check_backward(model, inputs)
    done = ["declarations", "shapes", "deterministic", "batch_independent", "layers", "unknown_modality", "backward"]
    if hasattr(model, "list_subnets"):
        check_subnets(model, inputs)
        done.append("subnets")
    with tempfile.TemporaryDirectory(dir=tmp) as folder:
        check_checkpoint(model, inputs, Path(folder) / "checkpoint")
        done.append("checkpoint")
        if export:
            check_export(model, Path(folder))
            done.append("export")
    return done


def example_inputs(model: Backbone, batch: int, sizes: Sizes | None = None, seed: int = 0) -> dict[str, Tensor | TextBatch]:
    """Random inputs as after the preprocess, the same for equal seeds; modality -> batch."""
    sizes = dict(sizes or {})
    for modality in sizes:
        _expect(modality in model.preprocess, f"sizes names {modality!r}; the backbone takes {', '.join(model.modalities)}")
    preprocess = model.preprocess
    for modality, size in sizes.items():
        change = {"length": size[0]} if isinstance(preprocess[modality], Text) else {"size": tuple(size)}
        preprocess = preprocess.replace(modality, **change)
    return probe_inputs(probe_shapes(preprocess, batch), seed)


# -- the rules of a backbone ------------------------------------------------------------------------------------------------


def check_declarations(model: Backbone) -> None:
    """The attributes are there and agree with each other; the preprocess survives pickle and JSON."""
    who = type(model).__name__
    for name in ("architecture", "arguments", "preprocess", "feature_info"):
        _expect(
            hasattr(model, name),
            f"{who}: has no attribute {name!r}; `create_model` sets architecture and arguments, the class the rest",
        )
    info, preprocess = model.feature_info, model.preprocess
    _expect(len(preprocess) > 0, f"{who}: preprocess names no modality")
    for field in ("layer_channels", "strides"):
        count = len(getattr(info, field))
        _expect(
            count == info.layers, f"{who}: feature_info.{field} has {count} entries; expected one for each of {info.layers} layers"
        )
    _expect(pickle.loads(pickle.dumps(preprocess)) == preprocess, f"{who}: preprocess changes when it is pickled")
    _expect(type(preprocess).from_json(preprocess.to_json()) == preprocess, f"{who}: preprocess changes when it goes through JSON")
    known = {name for name, _ in model.named_parameters()}
    for name in _optional(model):
        _expect(name in known, f"{who}: optional_parameters names {name!r}, which is no parameter")
    ids = model.layer_ids()
    for name, depth in ids.items():
        _expect(name in known, f"{who}: layer_ids names {name!r}, which is no parameter")
        _expect(0 <= depth <= info.layers, f"{who}: layer_ids[{name!r}] is {depth}; expected 0..{info.layers}")


@torch.no_grad()
def check_shapes(model: Backbone, inputs: Mapping[str, Any]) -> None:
    """What is there has the declared shape; what is not there is None or empty; all values are finite."""
    who, info, features = type(model).__name__, model.feature_info, model(inputs)
    _expect(isinstance(features, Features), f"{who}: forward returned {type(features).__name__}; expected Features")
    batch = _batch(inputs)
    if features.pooled is not None:
        _shape(who, "pooled", features.pooled, (batch, info.channels))
    prefix = 0 if features.prefix is None else features.prefix.shape[1]
    _expect(prefix == info.prefix or not features.tokens, f"{who}: {prefix} prefix tokens; feature_info.prefix says {info.prefix}")
    _expect(features.prefix is None or prefix > 0, f"{who}: prefix is an empty tensor; expected None")
    _expect(
        set(features.grid) <= set(features.tokens), f"{who}: grid names {sorted(features.grid)}, tokens {sorted(features.tokens)}"
    )
    for modality, tokens in features.tokens.items():
        _expect(modality in model.preprocess, f"{who}: tokens of {modality!r}, which is not among its modalities")
        _expect(
            tokens.ndim == 3 and len(tokens) == batch, f"{who}: tokens[{modality!r}] is {list(tokens.shape)}; expected (B, N, D)"
        )
        if modality in features.grid:
            cells = math.prod(features.grid[modality])
            _expect(
                cells == tokens.shape[1],
                f"{who}: grid[{modality!r}] is {features.grid[modality]}, {cells} cells, but there are {tokens.shape[1]} tokens",
            )
    _expect((features.maps is None) == (features.strides is None), f"{who}: maps and strides must both be given or both be None")
    if features.maps is not None and features.strides is not None:
        _expect(
            len(features.maps) == len(features.strides), f"{who}: {len(features.maps)} maps, but {len(features.strides)} strides"
        )
        _expect(list(features.strides) == sorted(features.strides), f"{who}: strides {features.strides} are not fine to coarse")
        sides = next(value.shape[2:] for value in inputs.values() if isinstance(value, Tensor))
        for feature_map, stride in zip(features.maps, features.strides, strict=True):
            _expect(feature_map.ndim >= 4, f"{who}: a map is {list(feature_map.shape)}; expected channels first, (B, C, H, W)")
            for side, cells in zip(sides, feature_map.shape[2:], strict=True):
                _expect(
                    abs(cells - side / stride) < 1,
                    f"{who}: the map of stride {stride} has {cells} cells along a side of {side} pixels",
                )
    for path, leaf in _leaves(features):
        _expect(bool(torch.isfinite(leaf).all()), f"{who}: {path} has values that are not finite")


@torch.no_grad()
def check_deterministic(model: Backbone, inputs: Mapping[str, Any]) -> None:
    """In eval mode the same input gives the same output bit for bit, and nothing in the model moves."""
    who, before = type(model).__name__, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = model(inputs), model(inputs)
    for (path, a), (_, b) in zip(_leaves(first), _leaves(second), strict=True):
        _expect(torch.equal(a, b), f"{who}: {path} differs between two passes in eval mode; something random is left on")
    for name, tensor in model.state_dict().items():
        _expect(torch.equal(tensor, before[name]), f"{who}: {name!r} changed during a pass in eval mode")


@torch.no_grad()
def check_batch_independent(model: Backbone, inputs: Mapping[str, Any]) -> None:
    """A sample's features do not depend on its neighbours in the batch."""
    who, whole = type(model).__name__, model(inputs)
    for index in range(_batch(inputs)):
        single = model(_pytree.tree_map(lambda tensor, index=index: tensor[index : index + 1], dict(inputs)))
        for (path, a), (_, b) in zip(_leaves(whole), _leaves(single), strict=True):
            _close(a[index : index + 1], b, f"{who}: {path} of sample {index} alone differs from the same in a batch")


@torch.no_grad()
def check_layers(model: Backbone, inputs: Mapping[str, Any]) -> None:
    """`layers=` returns those asked for and no others, takes negative indices, refuses others, and leaves the rest as it was."""
    who, info = type(model).__name__, model.feature_info
    plain = model(inputs)
    _expect(not plain.layers, f"{who}: layers {sorted(plain.layers)} were returned, but none was asked for")
    asked = (0, -1) if info.layers else ()
    features = model(inputs, layers=asked)
    wanted = {index % info.layers for index in asked}
    _expect(set(features.layers) == wanted, f"{who}: layers={asked} returned {sorted(features.layers)}; expected {sorted(wanted)}")
    for index, layer in features.layers.items():
        for modality, tokens in layer.tokens.items():
            cells = math.prod(layer.grid[modality]) if modality in layer.grid else tokens.shape[1]
            _shape(who, f"layer {index}, tokens[{modality!r}]", tokens, (_batch(inputs), cells, info.layer_channels[index]))
    for (path, a), (_, b) in zip(_leaves(plain), _leaves(_without_layers(features)), strict=True):
        _expect(torch.equal(a, b), f"{who}: {path} changes when layers are asked for")
    for index in (info.layers, -info.layers - 1):
        _raises(
            partial(model, inputs, layers=(index,)),
            f"{who}: layers=({index},) must raise ValueError (resolve_layers does)",
        )


def check_unknown_modality(model: Backbone) -> None:
    """A modality that the backbone does not have, or no input at all, is refused."""
    who = type(model).__name__
    _raises(lambda: model({"no_such_modality": torch.zeros(1)}), f"{who}: an unknown modality must raise ValueError")
    _raises(lambda: model({}), f"{who}: empty input must raise ValueError")


def check_backward(model: Backbone, inputs: Mapping[str, Any]) -> None:
    """Every trainable parameter gets a finite gradient from a plain forward in training mode; frozen ones get none."""
    who, twin = type(model).__name__, copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(0)
    loss = sum((leaf * torch.randn(leaf.shape, generator=generator)).sum() for _, leaf in _leaves(twin(inputs)))
    if not any(parameter.requires_grad for parameter in twin.parameters()):
        return
    loss.backward()  # type: ignore[union-attr]
    optional = set(_optional(model))
    for name, parameter in twin.named_parameters():
        if not parameter.requires_grad:
            _expect(parameter.grad is None, f"{who}: {name!r} is frozen, but has a gradient")
        elif name not in optional:
            _expect(
                parameter.grad is not None, f"{who}: {name!r} has no gradient; use it, freeze it or list it in optional_parameters"
            )
            finite = parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
            _expect(finite, f"{who}: the gradient of {name!r} is not finite")


@torch.no_grad()
def check_subnets(model: Backbone, inputs: Mapping[str, Any]) -> None:
    """The smallest, the largest and a random subnet run; each equals the stand-alone model that `extract` cuts out."""
    who = type(model).__name__
    if not isinstance(model, Elastic):
        raise AssertionError(f"{who}: an elastic backbone has list_subnets, check_subnet, sampling_pool and extract")
    subnets = model.list_subnets()
    _expect(len(set(subnets)) == len(subnets) > 0, f"{who}: list_subnets is empty or lists one twice")
    ordered = sorted(subnets)
    for subnet in dict.fromkeys((ordered[0], ordered[-1], random.Random(0).choice(ordered))):
        sliced = model(inputs, subnet=subnet)
        extracted = model.extract(subnet)
        _expect(not extracted.training, f"{who}: extract({subnet}) must return a model in eval mode")
        channels = extracted.feature_info.channels
        if sliced.pooled is not None:
            _shape(who, f"pooled of {subnet}", sliced.pooled, (_batch(inputs), channels))
        for (path, a), (_, b) in zip(_leaves(sliced), _leaves(extracted(inputs)), strict=True):
            _close(a, b, f"{who}: {path} of subnet {subnet} differs from that of the extracted model")
        own = {parameter.data_ptr() for parameter in model.parameters()}
        _expect(
            not own & {p.data_ptr() for p in extracted.parameters()}, f"{who}: extract({subnet}) shares weights with the supernet"
        )
    intact = model(inputs)
    for (path, a), (_, b) in zip(_leaves(intact), _leaves(model(inputs, subnet=ordered[-1])), strict=True):
        _expect(torch.equal(a, b), f"{who}: {path} of the largest subnet {ordered[-1]} differs from that of the intact network")


@torch.no_grad()
def check_checkpoint(model: Backbone, inputs: Mapping[str, Any], folder: Path) -> None:
    """Saved and loaded again, the model gives the same output bit for bit and keeps its preprocess."""
    who = type(model).__name__
    try:
        save_checkpoint(model, folder)
        loaded, _ = load_checkpoint(folder)
    except Exception as error:
        message = f"{who}: its checkpoint cannot be written and loaded: {error}; mend `architecture` and `arguments`"
        raise AssertionError(message) from error
    _expect(loaded.preprocess == model.preprocess, f"{who}: the preprocess changed in the checkpoint")
    for (path, a), (_, b) in zip(_leaves(model(inputs)), _leaves(loaded(inputs)), strict=True):
        _expect(torch.equal(a, b), f"{who}: {path} changed by saving and loading; is a buffer missing from state_dict?")


def check_export(model: Backbone, folder: Path) -> None:
    """`torch.export` with any batch size and ONNX give what the model gives."""
    who = type(model).__name__
    try:
        program = torch.export.load(export_program(model, folder / "model.pt2")).module()
        export_onnx(model, folder / "model.onnx")  # compares by itself
    except Exception as error:
        raise AssertionError(f"{who}: cannot be exported: {error}") from error
    if any(isinstance(spec, Text) for spec in model.preprocess.values()):
        return  # the program's inputs are the two tensors of a TextBatch; the ONNX comparison covers them
    for batch in (1, 3):
        inputs = example_inputs(model, batch)
        with torch.no_grad():
            target, found = model(inputs).pooled, program(**inputs).get("pooled")
        if target is not None:
            _close(target, found, f"{who}: pooled of the exported program differs for a batch of {batch}")


# -- objectives -------------------------------------------------------------------------------------------------------------


def check_objective(objective: nn.Module, samples: Sequence[dict[str, Any]], *, preprocess=None, step: int = 0) -> list[str]:
    """Check all that the training loop needs of an objective.

    Args:
        objective: the module; it is trained by one step of plain gradient descent here.
        samples: what the data source yields, at least two, e.g. ``{"image": uint8 (C, H, W)}``.
        preprocess: given to `objective.transform`; None takes that of the first export.
        step: number that the loop would pass.
    Returns:
        names of the rules that were checked.
    Raises:
        AssertionError: one sentence about the first broken rule.
    """
    who = type(objective).__name__
    contract: Any = objective  # the methods that the loop needs have no class of their own
    exports = contract.exports()
    _expect(len(exports) > 0, f"{who}: exports() is empty; expected at least one module to save")
    for name, entry in exports.items():
        good = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], nn.Module) and isinstance(entry[1], dict)
        _expect(good, f"{who}: exports()[{name!r}] must be (module, card as a dict)")
    if preprocess is None:
        preprocess = next((module.preprocess for module, _ in exports.values() if hasattr(module, "preprocess")), None)
        _expect(preprocess is not None, f"{who}: no export has a preprocess; pass preprocess=")

    transform, collate = contract.transform(preprocess), contract.collate
    batch = _check_pipeline(who, transform, collate, samples)
    trainable = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    check_groups(objective)

    objective.train()
    out = objective(batch, step)
    _expect(isinstance(out, dict) and "loss" in out, f"{who}: forward must return a dict with 'loss'")
    loss = out["loss"]
    _expect(isinstance(loss, Tensor) and loss.ndim == 0, f"{who}: the loss must be a scalar tensor")
    _expect(bool(torch.isfinite(loss)), f"{who}: the loss is {float(loss.detach())}")
    _expect(loss.requires_grad, f"{who}: the loss has no gradient")
    for name, value in out.items():
        bad = name != "loss" and isinstance(value, Tensor) and value.requires_grad
        _expect(not bad, f"{who}: {name!r} is returned for the log and must be detached")
    loss.backward()
    _expect(any(p.grad is not None for _, p in trainable), f"{who}: no parameter got a gradient")
    for name, parameter in trainable:
        finite = parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
        _expect(finite, f"{who}: the gradient of {name!r} is not finite")
    with torch.no_grad():
        for _, parameter in trainable:
            if parameter.grad is not None:
                parameter.sub_(1e-4 * parameter.grad)
    objective.zero_grad()
    contract.after_step(step)
    _expect(bool(torch.isfinite(objective(batch, step + 1)["loss"])), f"{who}: the loss is not finite after one step")
    return ["exports", "transform", "collate", "param_groups", "clip_groups", "forward", "backward", "after_step"]


def check_groups(objective: nn.Module) -> None:
    """`param_groups` and `clip_groups` each hold every trainable parameter once, and nothing else."""
    who = type(objective).__name__
    contract: Any = objective
    names = {id(p): name for name, p in objective.named_parameters() if p.requires_grad}
    groups = contract.param_groups()
    listed = [parameter for group in groups for _, parameter in group["params"]]
    clipped = [parameter for group in contract.clip_groups() for parameter in group]
    for what, parameters in (("param_groups", listed), ("clip_groups", clipped)):
        seen = [id(parameter) for parameter in parameters]
        for key, name in names.items():
            count = seen.count(key)
            _expect(count == 1, f"{who}: {what}() lists the trainable parameter {name!r} {count} times; expected once")
        _expect(len(seen) == len(names), f"{who}: {what}() lists a parameter that is frozen or not the objective's own")
    for group in groups:
        for name, parameter in group["params"]:
            _expect(
                names.get(id(parameter)) == name,
                f"{who}: param_groups() calls a parameter {name!r}; it is {names.get(id(parameter))!r}",
            )
        for factor in ("lr_mult", "wd_mult"):
            _expect(group.get(factor, 1.0) >= 0, f"{who}: param_groups() has {factor} {group.get(factor)}; expected 0 or more")


def _check_pipeline(who: str, transform: Callable, collate: Callable, samples: Sequence[dict]) -> dict[str, Any]:
    def run(transform: Callable, collate: Callable, seed: int) -> tuple[list, dict]:
        torch.manual_seed(torch.initial_seed() + 1)  # whoever draws from the global generator is found out
        random.seed(random.random())
        done = [transform(copy.deepcopy(sample), seed + i) for i, sample in enumerate(samples)]
        return done, collate(copy.deepcopy(done), seed)

    try:
        twins = pickle.loads(pickle.dumps((transform, collate)))
    except Exception as error:
        raise AssertionError(f"{who}: transform and collate must be picklable for DataLoader workers: {error}") from error
    (sample, batch), (again_sample, again_batch), (_, twin_batch) = (
        run(transform, collate, 0),
        run(transform, collate, 0),
        run(twins[0], twins[1], 0),
    )
    _expect(isinstance(batch, dict), f"{who}: collate returned {type(batch).__name__}; expected a dict")
    _expect(_same(sample, again_sample), f"{who}: transform gives different samples for one seed; all randomness must come from it")
    _expect(_same(batch, again_batch), f"{who}: collate gives different batches for one seed; all randomness must come from it")
    _expect(_same(batch, twin_batch), f"{who}: transform or collate behave differently after pickling")
    return batch


# -- words of the checks ----------------------------------------------------------------------------------------------------


def _expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


def _raises(action: Callable[[], Any], sentence: str) -> None:
    try:
        action()
    except ValueError:
        return
    except Exception as error:
        raise AssertionError(f"{sentence}, not {type(error).__name__}") from error
    raise AssertionError(sentence)


def _shape(who: str, what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _expect(tuple(tensor.shape) == shape, f"{who}: {what} has shape {list(tensor.shape)}; expected {list(shape)}")


def _close(a: Tensor, b: Tensor, sentence: str) -> None:
    _expect(a.shape == b.shape, f"{sentence} (shapes {list(a.shape)} and {list(b.shape)})")
    worst = float((a - b).abs().max()) if a.numel() else 0.0
    limit = TOLERANCE * max(1.0, float(a.abs().max()) if a.numel() else 0.0)
    _expect(worst <= limit, f"{sentence} by {worst:.2g}; at most {limit:.2g} is allowed")


def _leaves(features: Features) -> list[tuple[str, Tensor]]:
    """Floating tensors of features, by a readable path."""
    pairs = _pytree.tree_flatten_with_path(features)[0]
    return [(_pytree.keystr(path), leaf) for path, leaf in pairs if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _without_layers(features: Features) -> Features:
    return Features(**{**{name: getattr(features, name) for name in features.__dataclass_fields__}, "layers": {}})


def _same(a: Any, b: Any) -> bool:
    left, right = _pytree.tree_flatten(a), _pytree.tree_flatten(b)
    if left[1] != right[1]:
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else bool((x == y) if not hasattr(x, "all") else (x == y).all())
        for x, y in zip(left[0], right[0], strict=True)
    )


def _batch(inputs: Mapping[str, Any]) -> int:
    value = next(iter(inputs.values()))
    return len(value.ids if isinstance(value, TextBatch) else value)


def _optional(model: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(model, "optional_parameters", ()))
