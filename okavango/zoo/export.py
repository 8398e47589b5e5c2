"""Backbones as graphs for other runtimes: ONNX files and `torch.export` programs.

The graph takes one plain tensor per modality (`NAME_ids` and `NAME_mask` for text) as `preprocess` yields it, and returns named
tensors: `pooled`, `prefix`, `tokens_MODALITY`, `map_STRIDE`, those that the backbone has.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from okavango.models.backbone import Backbone, Elastic
from okavango.models.features import Features, Subnet, TextBatch
from okavango.zoo.checkpoint import probe_inputs, probe_shapes

ONNX_TOLERANCE = 1e-4
ONE_FILE = 1_900_000_000  # bytes; protobuf ends at 2 GiB


class ExportError(ValueError):
    """A backbone cannot be exported, or the exported graph does not compute what the backbone does."""


class _Plain(nn.Module):
    """Plain tensors in by keyword, plain tensors out by name."""

    def __init__(self, backbone: Backbone, subnet: Subnet | None):
        super().__init__()
        self.backbone, self.subnet = backbone, subnet

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        inputs: dict[str, Tensor | TextBatch] = {}
        for name in self.backbone.modalities:
            if name in tensors:
                inputs[name] = tensors[name]
            else:
                inputs[name] = TextBatch(tensors[f"{name}_ids"], tensors[f"{name}_mask"])
        return named_outputs(self.backbone(inputs, subnet=self.subnet))


def named_outputs(features: Features) -> dict[str, Tensor]:
    """The parts of `Features` that are there, by name."""
    found = {"pooled": features.pooled, "prefix": features.prefix}
    found |= {f"tokens_{modality}": tokens for modality, tokens in features.tokens.items()}
    found |= {f"map_{stride}": a_map for stride, a_map in zip(features.strides or (), features.maps or (), strict=True)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def plain_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Modality -> batch, with every `TextBatch` as two tensors `NAME_ids` and `NAME_mask`."""
    plain: dict[str, Tensor] = {}
    for name, value in inputs.items():
        plain |= {f"{name}_ids": value.ids, f"{name}_mask": value.mask} if isinstance(value, TextBatch) else {name: value}
    return plain


def export_program(
    model: Backbone, path: str | os.PathLike, *, subnet: Subnet | str | None = None, batch: int | str = "dynamic"
) -> Path:
    """Write a `torch.export` program; ``torch.export.load(path).module()(image=x)["pooled"]`` runs it.

    Args:
        model: any backbone; its mode and device stay as they are.
        path: ends in ``.pt2``.
        subnet: the slice of an elastic backbone to export.
        batch: "dynamic", or a fixed number of samples.
    Raises:
        ExportError: wrong suffix, or torch cannot trace the backbone.
    """
    path = _checked(path, ".pt2", batch)
    program, _ = _program(model, subnet, batch)
    extra = {"preprocess.json": json.dumps(model.preprocess.to_json())}
    with _beside(path) as draft:
        torch.export.save(program, draft, extra_files=extra)
        os.replace(draft, path)
    return path


def export_onnx(
    model: Backbone, path: str | os.PathLike, *, subnet: Subnet | str | None = None, batch: int | str = "dynamic"
) -> Path:
    """Write an ONNX file, run it by onnxruntime on two batch sizes and compare with torch.

    The preprocess is stored as JSON in the file's metadata under ``okavango.preprocess``. Weights above 1.9 GB go to a second file
    ``NAME.onnx.data``.

    Args:
        model, subnet, batch: as for `export_program`.
        path: ends in ``.onnx``; written only when the comparison holds.
    Raises:
        ExportError: onnx or onnxruntime is missing, the backbone cannot be traced, or an output differs by more than 1e-4.
    """
    path = _checked(path, ".onnx", batch)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"export to ONNX needs {error.name}: pip install okavango[export]") from None
    program, plain = _program(model, subnet, batch)
    example = _example(plain.backbone, 2 if batch == "dynamic" else int(batch))
    names = list(plain(**example))
    try:
        onnx = torch.onnx.export(program, input_names=list(example), output_names=names, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"{type(model).__name__} has no ONNX form ({reason}); export_program takes more") from error
    assert onnx is not None  # always returned with dynamo=True
    onnx.model.metadata_props["okavango.preprocess"] = json.dumps(model.preprocess.to_json())
    external = sum(tensor.nbytes for tensor in plain.state_dict().values()) > ONE_FILE
    with _beside(path) as draft:
        onnx.save(str(draft), external_data=external)
        session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
        for size in (1, 3) if batch == "dynamic" else (int(batch),):
            _compare(session, plain, _example(plain.backbone, size), names)
        for written in draft.parent.iterdir():
            os.replace(written, path.with_name(written.name))
    return path


@torch.inference_mode()
def _compare(session, plain: _Plain, example: dict[str, Tensor], names: list[str]) -> None:
    wanted = plain(**example)
    found = session.run(names, {name: tensor.numpy() for name, tensor in example.items()})
    for name, output in zip(names, found, strict=True):
        target = wanted[name]
        if tuple(output.shape) != tuple(target.shape):
            raise ExportError(f"ONNX output {name!r} has shape {list(output.shape)}; torch gives {list(target.shape)}")
        worst = float((torch.from_numpy(output).double() - target.double()).abs().max())
        if not worst <= ONNX_TOLERANCE:
            raise ExportError(f"ONNX output {name!r} differs from torch by {worst:.3g}; at most {ONNX_TOLERANCE:g} is allowed")


def _program(model: Backbone, subnet: Subnet | str | None, batch: int | str) -> tuple[torch.export.ExportedProgram, _Plain]:
    """The traced graph and the module it was traced from, a copy of the model on the CPU in float32 and eval mode."""
    subnet = Subnet.parse(subnet) if isinstance(subnet, str) else subnet
    if subnet is not None and isinstance(model, Elastic):
        model, subnet = model.extract(subnet), None  # a smaller graph than slicing inside it
    plain = _Plain(copy.deepcopy(model).to("cpu", torch.float32), subnet).eval().requires_grad_(False)
    dynamic = batch == "dynamic"
    example = _example(plain.backbone, 2 if dynamic else int(batch))
    sizes = {name: {0: torch.export.Dim("batch")} for name in example} if dynamic else None
    try:
        program = torch.export.export(
            plain,
            (),
            kwargs=example,
            dynamic_shapes={"tensors": sizes} if sizes else None,
            prefer_deferred_runtime_asserts_over_guards=True,  # guards that compare two keyword inputs do not compile otherwise
        )
    except Exception as error:  # torch.export raises many types, none with a common base
        reason = str(error).strip().splitlines()[0]
        if "Constraints violated" in reason:
            reason = "its forward fixes the batch size (len(x) does, x.shape[0] does not); mend it or pass batch=1"
        raise ExportError(f"{type(model).__name__} cannot be traced: {reason}") from error
    return program, plain


def _example(backbone: Backbone, batch: int) -> dict[str, Tensor]:
    return plain_inputs(probe_inputs(probe_shapes(backbone.preprocess, batch)))


def _checked(path: str | os.PathLike, suffix: str, batch: int | str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise ExportError(f"{path}: the name must end in {suffix}")
    if batch != "dynamic" and not (isinstance(batch, int) and batch > 0):
        raise ExportError(f"batch {batch!r}: expected 'dynamic' or a positive number of samples")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file of the same name in a temporary folder beside `path`, so that moving it there is one rename."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
