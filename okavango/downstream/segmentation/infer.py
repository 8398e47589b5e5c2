"""Whole volumes through a segmenter: windows with Gaussian weights, and the way back to the study's own grid."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from okavango.data.sources import BadSample, Source
from okavango.data.studies import REGIONS, Prepare, write_scan
from okavango.downstream.classification.features import evaluating
from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.volumes import stack, volume_specs, whole
from okavango.models.preprocess import Preprocess
from okavango.models.volume import undo

SETTINGS = "predictions.json"


def window_probabilities(
    model: Segmenter, inputs: Mapping[str, Tensor], present: Tensor | None = None, *, overlap: float = 0.5, batch: int = 1
) -> Tensor:
    """Probabilities over volumes of any size: windows of the size that the model was trained at, blended by Gaussian weights.

    The scores of windows are averaged before sigmoid or softmax, as MONAI's bundles do it (`sliding_window_inference`, weights of
    standard deviation an eighth of the window).

    Args:
        model: in eval mode, on the device where windows are computed; the volumes stay where they are.
        inputs, present: of one study; see `Segmenter.logits`.
        overlap: share of a window's side that two neighbours share, 0 up to, not including, 1.
        batch: windows per forward pass.
    Returns:
        float32 (1, regions or labels, D, H, W) where the inputs are.
    """
    from monai.inferers import sliding_window_inference

    names = [name for name in model.modalities if name in inputs]
    counts = [inputs[name].shape[1] for name in names]
    device = next(model.parameters()).device
    present = None if present is None else present.to(device)

    def windows(stacked: Tensor) -> Tensor:
        # MONAI may hand over several windows of the one study
        rows = None if present is None else present.expand(len(stacked), -1)
        return model.logits(dict(zip(names, stacked.split(counts, 1), strict=True)), rows).float()

    volumes = torch.cat([inputs[name] for name in names], 1)
    roi = volume_specs(model.preprocess)[names[0]].size
    with torch.inference_mode():
        logits = sliding_window_inference(
            volumes, roi, batch, windows, overlap=overlap, mode="gaussian", sw_device=device, device=volumes.device
        )
        assert isinstance(logits, Tensor)
        return model.probabilities(logits)


def segment(
    model: Segmenter, sample: Mapping[str, Any], *, modalities: Sequence[str] = (), overlap: float = 0.5, batch: int = 1
) -> Tensor:
    """Masks of one study on the grid on which it is stored.

    The whole volume is segmented, but for the border that is zero in all sequences, which stays background. Where the spec turns or
    resamples, probabilities are brought back, linearly, and then decided on.

    Args:
        model: in eval mode.
        sample: modality or alias -> `Scan`, and "id"; other keys are not looked at.
        modalities: sequences that may be used, () for all that the study and the model have.
        overlap, batch: see `window_probabilities`.
    Returns:
        bool (regions, D, H, W), or uint8 (1, D, H, W) of label numbers where the model has labels; on the CPU.
    Raises:
        BadSample: see `Prepare`, or the study has none of the sequences.
    """
    names = [name for name in model.modalities if name in modalities or not modalities]
    preprocess = Preprocess({name: model.preprocess[name] for name in names})
    prepared = Prepare(whole(preprocess))(sample)
    batch_of_one = stack([prepared], model.preprocess, names)
    present = batch_of_one.pop("present")
    with evaluating(model):
        found = window_probabilities(model, batch_of_one, present, overlap=overlap, batch=batch)[0].cpu()
    back = undo(prepared["geometry"], found)
    if not model.labels:
        return back > 0.5
    background = 1 - back.sum(0, keepdim=True)
    return torch.cat([background, back]).argmax(0, keepdim=True).to(torch.uint8)


def label_map(regions: Tensor, codes: str = "brats") -> Tensor:
    """Tumour core, whole tumour, enhancing tumour -> label numbers: enhancing, else core, else oedema, else 0.

    Args:
        regions: bool (3, D, H, W). codes: a convention of `okavango.data.studies.REGIONS`.
    Returns:
        uint8 (D, H, W). A core outside the whole tumour is kept, so the written regions contain each other.

    Example:
        >>> label_map(torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).bool().view(3, 1, 1, 4)).flatten().tolist()
        [0, 1, 4, 2]
    """
    table = REGIONS[codes]
    core, whole_tumour, enhancing = regions.bool()
    (et,) = table["ET"]
    (necrosis,) = set(table["TC"]) - {et}
    (oedema,) = set(table["WT"]) - set(table["TC"])
    out = torch.zeros(core.shape, dtype=torch.uint8)
    out[whole_tumour], out[core], out[enhancing] = oedema, necrosis, et
    return out


def predict_folder(
    model: Segmenter,
    source: Source,
    out: str | os.PathLike,
    *,
    made_by: Mapping[str, Any],
    modalities: Sequence[str] = (),
    codes: str = "brats",
    overlap: float = 0.5,
    batch: int = 1,
    say: Callable[[str], None] = print,
) -> Iterable[tuple[str, Path]]:
    """Write ``ID_seg.nii.gz`` for every study, in the study's own grid and place; yields (id, path) of each as it is there.

    A file appears whole or not at all and is not made again, so a run that was killed goes on where it was.

    Args:
        out: folder; `predictions.json` in it says what made its files.
        made_by: the model, fit for JSON; a folder of predictions of another one, or with other settings, is refused.
        codes: convention of the label numbers that are written.
    Raises:
        ValueError: the folder holds other predictions.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {**made_by, "modalities": list(modalities), "codes": "" if model.labels else codes, "overlap": overlap}
    known = out / SETTINGS
    if known.exists():
        if json.loads(known.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
            raise ValueError(f"{out} holds predictions by another model or other settings ({known}); choose another folder")
    else:
        known.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    ids = getattr(source, "ids", None) or [str(index) for index in range(len(source))]
    if doubled := len(ids) - len({_file_name(id) for id in ids}):
        raise ValueError(f"{source.name}: {doubled} studies would be written over others, their ids differ in signs only")
    for index, id in enumerate(ids):
        path = out / f"{_file_name(id)}_seg.nii.gz"
        if path.exists():
            say(f"{id}: is there already")
            yield id, path
            continue
        try:
            sample = source[index]
            masks = segment(model, sample, modalities=modalities, overlap=overlap, batch=batch)
        except BadSample as error:
            say(f"left out {error.id or id}: {error.reason}")
            continue
        labels = masks[0] if model.labels else label_map(masks, codes)
        affine = sample.get("affine")
        write_scan(path, labels, np.eye(4) if affine is None else affine, "predicted by okavango")
        found = {int(number): int(count) for number, count in zip(*np.unique(labels.numpy(), return_counts=True), strict=True)}
        say(f"{id}: {path.name}, voxels per label {found}")
        yield id, path


def _file_name(id: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in id)
