"""Segmenters as MONAI bundles: a folder that MONAI's own runner executes, and that says what goes in and comes out.

The network of a bundle takes one stacked tensor, its channels named in `configs/metadata.json`; it is imported from this package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from okavango.data.studies import write_scan
from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.segmentation.infer import label_map
from okavango.downstream.volumes import volume_specs
from okavango.models.backbone import create_model
from okavango.models.preprocess import Preprocess

WORDS = {"TC": "tumour core", "WT": "whole tumour", "ET": "enhancing tumour"}


class StackedSegmenter(nn.Module):
    """A segmenter that takes one tensor; `network_def` of a bundle.

    Args:
        architecture, arguments, preprocess: of the backbone, as in `config.json` of a checkpoint.
        head: arguments of `Segmenter`.
        modalities: what the channels of the tensor are, in this order; any subset, () for all of the head's.
    Raises:
        ValueError: a name that the head does not have.
    """

    def __init__(
        self,
        architecture: str,
        arguments: Mapping[str, Any],
        preprocess: Mapping[str, Any],
        head: Mapping[str, Any],
        modalities: Sequence[str] = (),
    ):
        super().__init__()
        backbone = create_model(architecture, **{key: _tuple(value) for key, value in arguments.items()})
        backbone.preprocess = Preprocess.from_json(preprocess)
        self.segmenter = Segmenter(backbone, **{key: _tuple(value) for key, value in head.items()})
        names = [backbone.preprocess.resolve(name) for name in modalities] or list(self.segmenter.modalities)
        if odd := [name for name in names if name not in self.segmenter.modalities]:
            raise ValueError(f"bundle: {odd[0]!r} is no sequence of this network; it has {', '.join(self.segmenter.modalities)}")
        self.modalities = tuple(names)

    def forward(self, stacked: Tensor) -> Tensor:
        """(B, modalities, D, H, W) -> logits, (B, regions, D, H, W)."""
        if stacked.shape[1] != len(self.modalities):
            raise ValueError(f"bundle: {stacked.shape[1]} channels; expected {len(self.modalities)}: {', '.join(self.modalities)}")
        # plain tensors: MONAI's remember transforms, which mean nothing inside
        plain = torch.as_tensor(stacked).as_subclass(Tensor)
        return self.segmenter.logits(dict(zip(self.modalities, plain.split(1, 1), strict=True)))


def load_weights(network: StackedSegmenter, path: str | os.PathLike) -> StackedSegmenter:
    """Fill a network from `models/model.pt`, without unpickling anything but tensors; strict. Returns it in eval mode."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.segmenter.load_state_dict(state)
    return network.eval()


class Runner:
    """Runs studies one by one through network, windows and postprocessing; `evaluator` of a bundle.

    MONAI's own `SupervisedEvaluator` does the same and needs pytorch-ignite; this one needs nothing.

    Args:
        dataset: of dictionaries with "image" (C, D, H, W), a MetaTensor. network, inferer, device: see MONAI.
        postprocessing: called with the dictionary, in which "pred" are then the logits.
    """

    def __init__(self, dataset: Any, network: nn.Module, inferer: Any, postprocessing: Any, device: Any = "cpu"):
        self.dataset, self.network, self.inferer, self.postprocessing, self.device = (
            dataset,
            network,
            inferer,
            postprocessing,
            device,
        )

    @torch.inference_mode()
    def run(self) -> list[dict[str, Any]]:
        """All studies, in order; what the postprocessing returned for each."""
        self.network.to(self.device).eval()
        results = []
        for index in range(len(self.dataset)):
            sample = dict(self.dataset[index])
            volumes = torch.as_tensor(sample["image"]).as_subclass(Tensor)  # the postprocessing finds the way back in "image"
            sample["pred"] = self.inferer(volumes[None].to(self.device), self.network)[0].cpu()
            results.append(self.postprocessing(sample))
        return results


class SaveLabels:
    """Last step of a postprocessing: regions after thresholding become label numbers in a file ``NAME_seg.nii.gz``.

    Args:
        output_dir: folder, made when the first file is written. codes: convention of the label numbers.
    """

    def __init__(self, output_dir: str | os.PathLike, codes: str = "brats"):
        self.output_dir, self.codes = Path(output_dir), codes

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """{"image": MetaTensor, "pred": MetaTensor (3, D, H, W), turned back into the stored grid} -> the same with "saved"."""
        pred, first = sample["pred"], Path(str(sample["image"].meta["filename_or_obj"]))
        labels = label_map(torch.as_tensor(pred).as_subclass(Tensor) > 0.5, self.codes)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / f"{first.name.removesuffix('.gz').removesuffix('.nii')}_seg.nii.gz"
        write_scan(path, labels, np.asarray(pred.affine, np.float64), "predicted by okavango")
        return {**sample, "saved": str(path)}


def studies_of(folder: str, modalities: Sequence[str]) -> list[dict[str, Any]]:
    """Dictionaries of files for a bundle's dataset: {"image": one path per channel} for each study that has all sequences."""
    from okavango.data.studies import Studies

    if not Path(folder).exists():  # a bundle is parsed before a folder is named
        return []
    return [
        {"image": [str(files[name]) for name in modalities]}
        for files in Studies(folder).files
        if all(name in files for name in modalities)
    ]


def export_bundle(
    model: Segmenter, out: str | os.PathLike, *, name: str = "", licence: str = "", modalities: Sequence[str] = ()
) -> Path:
    """Write a bundle.

    Args:
        model: of regions, on a backbone of volumes of one channel each.
        out: folder; it must not exist yet.
        name: for people. licence: of the weights, "" for unknown.
        modalities: channels of the input in this order, () for all of the head's.
    Returns:
        The folder.
    Raises:
        ValueError: the folder exists, labels instead of regions, or a preprocess that MONAI has no transforms for.
    """
    import monai

    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another folder")
    if model.labels:
        raise ValueError("a bundle is written for the regions of a tumour; this model has labels of its own")
    specs = volume_specs(model.preprocess)
    names = [model.preprocess.resolve(each) for each in modalities] or list(model.modalities)
    spec = specs[names[0]]
    if spec.normalise.rule != "zscore_nonzero" or any(len(specs[each].channels) > 1 for each in names):
        raise ValueError(f"a bundle needs sequences of one channel, normalised by zscore_nonzero; got {spec.normalise.rule}")
    network = {
        "_target_": "okavango.downstream.segmentation.bundle.StackedSegmenter",
        "architecture": model.backbone.architecture,
        "arguments": model.backbone.arguments,
        "preprocess": model.preprocess.to_json(),
        "head": model.head_config()["arguments"],
        "modalities": names,
    }
    steps: list[dict[str, Any]] = [{"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}]
    if spec.orientation:
        steps.append({"_target_": "Orientationd", "keys": "image", "axcodes": spec.orientation})
    if spec.spacing:
        steps.append({"_target_": "Spacingd", "keys": "image", "pixdim": list(spec.spacing), "mode": "bilinear"})
    steps.append({"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True})
    after = [
        {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
        {"_target_": "okavango.downstream.segmentation.bundle.SaveLabels", "output_dir": "@output_dir"},
    ]
    inference = {
        "imports": [
            "$import os",
            "$import torch",
            "$import okavango.downstream.segmentation.bundle as okavango_bundle",
        ],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "studies",
        "output_dir": "$os.path.join(@bundle_root, 'predictions')",
        "modalities": names,
        "dataset_data": "$okavango_bundle.studies_of(@dataset_dir, @modalities)",
        "network_def": {**network, "modalities": "@modalities"},
        "network": ("$okavango_bundle.load_weights(@network_def, os.path.join(@bundle_root, 'models', 'model.pt'))"),
        "preprocessing": {"_target_": "Compose", "transforms": steps},
        "dataset": {"_target_": "Dataset", "data": "@dataset_data", "transform": "@preprocessing"},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(spec.size),
            "sw_batch_size": 1,
            "overlap": 0.5,
            "mode": "gaussian",
            "device": "cpu",
        },
        "postprocessing": {"_target_": "Compose", "transforms": after},
        "evaluator": {
            "_target_": "okavango.downstream.segmentation.bundle.Runner",
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "device": "@device",
        },
        "run": ["$@evaluator.run()"],
    }
    common = {"num_channels": len(names), "spatial_shape": list(spec.size), "dtype": "float32", "is_patch_data": True}
    metadata = {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported from an okavango checkpoint"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"okavango": _version(), "nibabel": _version("nibabel")},
        "name": name or f"{model.backbone.architecture} segmentation",
        "task": "segmentation of brain tumours from any subset of MRI sequences",
        "description": f"{model.backbone.architecture} with a {model.kind} decoder, for {', '.join(names)}",
        "authors": "see the checkpoint",
        "copyright": "see the checkpoint",
        "data_source": "see the checkpoint",
        "data_type": "nibabel",
        "image_classes": f"one channel per sequence: {', '.join(names)}; z-scored over nonzero voxels",
        "label_classes": "label numbers of BraTS until 2022: 1 necrotic core, 2 oedema, 4 enhancing tumour",
        "pred_classes": "channels " + ", ".join(f"{i} {WORDS[region]}" for i, region in enumerate(model.regions)),
        "eval_metrics": {},
        "intended_use": "research; not a medical device, not validated for diagnosis",
        "references": ["arXiv 2505.00568", "arXiv 2103.10504"],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    **common,
                    "value_range": [],
                    "channel_def": {str(index): each for index, each in enumerate(names)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    **{**common, "num_channels": len(model.regions)},
                    "value_range": [],
                    "channel_def": {str(index): WORDS[region] for index, region in enumerate(model.regions)},
                }
            },
        },
    }
    readme = [
        f"# {metadata['name']}",
        "",
        f"Input channels, in this order: {', '.join(f'{i} {each}' for i, each in enumerate(names))}. "
        f"Outputs, logits: {', '.join(f'{i} {WORDS[each]}' for i, each in enumerate(model.regions))}.",
        "MONAI's own brats_mri_segmentation bundle has its input channels in another order.",
        "",
        "Any subset of the sequences: set `modalities` in `configs/inference.json`, or on the command line,",
        "`--modalities \"['t1ce','flair']\"`.",
        "",
        "```sh",
        "python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir STUDIES --output_dir OUT",
        "```",
        "",
        "It needs the packages okavango[mri] and, for that command line, fire. Predictions are written in the place of the first",
        "sequence of each study, with the label numbers 1, 2, 4.",
        "",
        "Nothing has been measured for this bundle; `eval_metrics` is empty.",
    ]
    for folder in ("configs", "models", "docs"):
        (out / folder).mkdir(parents=True)
    torch.save({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, out / "models" / "model.pt")
    for file, content in {"metadata": metadata, "inference": inference}.items():
        (out / "configs" / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "docs" / "README.md").write_text("\n".join(readme) + "\n", encoding="utf-8")
    (out / "docs" / "data_license.txt").write_text("The checkpoint's card says what it was trained on.\n", encoding="utf-8")
    (out / "LICENSE").write_text(f"Licence of the weights: {licence or 'unknown, see the checkpoint'}\n", encoding="utf-8")
    return out


def _version(package: str = "okavango") -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        import okavango

        return okavango.__version__


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
