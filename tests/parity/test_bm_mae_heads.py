"""BM-MAE's fine-tuned heads against tensors recorded from the published code: segmentation, classification, survival."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from okavango.downstream.classification.studies import StudyClassifier
from okavango.downstream.classification.survival import SurvivalHead, discretise, evaluate_survival, hazard_nll, quantile_cuts, risk
from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.segmentation.losses import REGION_LOSSES
from okavango.downstream.segmentation.unetr import averaged
from okavango.zoo.bm_mae import head_to_official, read_head

ACTIVATIONS, LOSS = 1e-4, 1e-5


def segmenter(path, heads, modalities=()):
    def build(backbone, found):
        assert found.pop("kind") == "segmentation"
        return Segmenter(backbone, modalities=modalities, loss="official", **found)

    return read_head(path, build, heads=heads)[0]


def subset_file(weights, names, subset, path):
    """The network of some modalities, as the recording made it: its first convolutions read their channels only."""
    columns = [names.index(name) for name in subset]
    others = tuple(f"vit.tokenizers.{name}." for name in names if name not in subset)
    tensors = {key: tensor for key, tensor in weights.items() if not key.startswith(others)}
    for key in ("encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight"):
        tensors[key] = tensors[key][:, columns].contiguous()
    save_file(tensors, path)
    return path


def test_segmentation(recorded, tmp_path):
    fixture = recorded("bm_mae", "io_seg")
    config = fixture.config()
    names, heads = config["modalities"], config["seg"]["num_heads"]
    path = fixture.folder / "state_dict_seg.safetensors"
    weights, whole = load_file(path), segmenter(path, heads)
    back = head_to_official(whole.state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[key], tensor) for key, tensor in weights.items())
    volumes, label = {name: fixture.input(f"in.{name}") for name in names}, fixture.input("label")
    for key in [key for key in fixture.tensors if key.startswith("logits.")]:
        subset = key.removeprefix("logits.").split("-")
        kind = "-".join(subset)
        own = segmenter(subset_file(weights, names, subset, tmp_path / f"{kind}.safetensors"), heads)
        assert own.modalities == tuple(subset)
        with torch.no_grad():
            logits = own.logits({name: volumes[name] for name in reversed(subset)})
            features = own.backbone({name: volumes[name] for name in subset}, layers=own.layers)
            assert own.layers == (3, 6, 9)
            for part, states in {"out": features, **{f"hidden{i}": layer for i, layer in features.layers.items()}}.items():
                mean = averaged(states.tokens, states.grid, own.backbone.modalities, None)
                fixture.compare(f"vit_{part}.{kind}", mean.flatten(2).transpose(1, 2), ACTIVATIONS)
            fixture.compare(key, logits, ACTIVATIONS)
            fixture.compare(f"dice_ce.{kind}", REGION_LOSSES["official"](logits, label)[None], LOSS)
            # one network for all subsets: what is absent is zeros in the first block, and the rest the same
            present = torch.tensor([[name in subset for name in names]])
            fixture.compare(key, whole.logits(volumes, present), ACTIVATIONS)


def test_segmentation_at_the_published_size(recorded, tmp_path):
    fixture = recorded("bm_mae", "io_seg128")
    config = fixture.config()
    weights = load_file(fixture.folder / "state_dict_seg.safetensors")
    inputs = {key.removeprefix("in_int8."): fixture.input(key).float() / 32 for key in fixture.tensors if key.startswith("in_")}
    subset = [name for name in config["modalities"] if name in inputs]
    path = subset_file(weights, config["modalities"], subset, tmp_path / "weights.safetensors")
    small = segmenter(path, config["seg"]["num_heads"])
    size = next(iter(inputs.values())).shape[-1]
    model = Segmenter(
        type(small.backbone)(**{**small.backbone.arguments, "size": size}), feature_size=small.feature_size, loss="official"
    ).eval()
    fresh = model.state_dict()
    tables = {key: table for key, table in fresh.items() if key.endswith(".positions")}  # plain sines and cosines of this grid
    model.load_state_dict({**small.state_dict(), **tables})
    with torch.no_grad():
        features = model.backbone(inputs)
        mean = averaged(features.tokens, features.grid, model.backbone.modalities, None)
        fixture.compare("vit_out", mean.flatten(2).transpose(1, 2), ACTIVATIONS)
        logits = model.logits(inputs)
    fixture.compare("logits_stride8", logits[:, :, 4::8, 4::8, 4::8], ACTIVATIONS)
    fixture.compare("logits_mean", logits.mean((0, 2, 3, 4)), ACTIVATIONS)
    fixture.compare("logits_std", logits.std((0, 2, 3, 4)), ACTIVATIONS)


def test_pooled_heads(recorded, tmp_path):
    """Classification and survival: encoder of pretraining with recorded linear layers."""
    fixture, linear = recorded("bm_mae", "io"), recorded("bm_mae", "heads")
    mine = ("cls.", "surv.", "in.")
    fixture.left_out.update({key: "compared with the encoder" for key in fixture.tensors if not key.startswith(mine)})
    config = fixture.config()
    volumes = {name: fixture.input(f"in.{name}") for name in config["modalities"]}
    encoder = {key: tensor for key, tensor in fixture.weights().items() if not key.startswith("decoder.")}

    def read(kind, build):
        own = {key.removeprefix(f"{kind}."): linear.input(key) for key in linear.tensors if key.startswith(f"{kind}.")}
        save_file({**encoder, **own}, tmp_path / f"{kind}.safetensors")
        model = read_head(tmp_path / f"{kind}.safetensors", build, heads=config["pretrain"]["num_heads"])[0]
        back = head_to_official(model.state_dict())
        assert set(back) == {*encoder, *own} and all(torch.equal(back[key], tensor) for key, tensor in own.items())
        for key in [key for key in fixture.tensors if key.startswith(f"{kind}.logits.")]:
            subset = key.removeprefix(f"{kind}.logits.").split("-")
            with torch.no_grad():
                fixture.compare(key, model.logits({name: volumes[name] for name in subset}), ACTIVATIONS)
        return model

    classifier = read("cls", lambda backbone, found: StudyClassifier(backbone, ("no", "yes"), hidden=found["hidden"]))
    label = fixture.input("cls.label")
    first = config["head_subsets"][0]
    batch = {**{name: volumes[name] for name in first}, "label": label.long()}
    batch["present"] = torch.tensor([[name in first for name in config["modalities"]]] * len(label))
    fixture.compare("cls.bce", classifier(batch, 0)["loss"][None], LOSS)

    head = read("surv", lambda backbone, found: SurvivalHead(backbone, bins=found["outputs"], hidden=found["hidden"]))
    phi, index, event = (fixture.input(f"surv.in.{name}") for name in ("phi", "time_idx", "event"))
    assert phi.shape[1] == head.bins
    fixture.compare("surv.nll", hazard_nll(phi, index, event)[None], LOSS)
    fixture.compare("surv.risk", risk(phi, "logits"), LOSS)
    time, seen = fixture.input("surv.disc.time").numpy(), fixture.input("surv.disc.event").numpy().astype(bool)
    cuts = quantile_cuts(time, seen, head.bins, official=True)
    fixture.compare("surv.disc.cuts", torch.from_numpy(cuts), 1e-12)
    found, kept = discretise(time, seen, cuts)
    fixture.compare("surv.disc.time_idx", torch.from_numpy(found), 0)
    fixture.compare("surv.disc.event_out", torch.from_numpy(kept).float(), 0)
    curves = np.tile(np.linspace(1, 0.1, len(cuts)), (len(time), 1))
    risks = fixture.input("surv.cindex.risk").numpy()
    measured = evaluate_survival((time, seen), (time, seen), curves, cuts, risks)
    fixture.compare("surv.cindex", torch.tensor([measured["c_index"]], dtype=torch.float64), 1e-12)
