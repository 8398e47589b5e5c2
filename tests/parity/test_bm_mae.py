"""BM-MAE against tensors recorded from its published code. Sizes and seeds are read from the fixtures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from okavango.data.masking import modality_masks, visible_first, visible_shares
from okavango.downstream.classification.studies import StudyClassifier
from okavango.downstream.classification.survival import SurvivalHead, discretise, evaluate_survival, hazard_nll, quantile_cuts, risk
from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.segmentation.losses import REGION_LOSSES
from okavango.downstream.segmentation.unetr import averaged
from okavango.models.backbone import create_model
from okavango.models.bm_mae import patch_view, sincos
from okavango.pretrain.objectives.bm_mae import MaskedModalities
from okavango.zoo.bm_mae import head_to_official, ours, read_head, read_official, to_official

ACTIVATIONS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-3
HEADS = ("cls.", "surv.")  # of `io`: compared with the heads


def read(fixture, **arguments):
    """The recorded objective, built from the shapes of its weights alone but for what they cannot tell."""
    sizes = fixture.config()["pretrain"]
    heads = {"heads": sizes["num_heads"], "decoder_heads": sizes["decoder_num_heads"]}
    model, report = read_official(
        fixture.folder / "state_dict.safetensors", **heads, objective=lambda *a, **k: MaskedModalities(*a, **k, **arguments)
    )
    assert not report.skipped and not report.missing and not report.unexpected
    return model


def patched(volumes: torch.Tensor, patch: int) -> torch.Tensor:
    return patch_view(volumes, patch).flatten(4).flatten(1, 3)


def joined(features, names) -> torch.Tensor:
    return torch.cat([*([] if features.prefix is None else [features.prefix]), *(features.tokens[name] for name in names)], 1)


def test_bm_mae(recorded):
    fixture = recorded("bm_mae", "io")
    config, names = fixture.config(), fixture.config()["modalities"]
    objective = read(fixture, decoder_dropout=0.0)
    back, weights = to_official(objective.state_dict()), fixture.weights()
    assert back.keys() == weights.keys() and all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    fixture.left_out.update({key: "compared with the heads" for key in fixture.tensors if key.startswith(HEADS)})
    volumes = {name: fixture.input(f"in.{name}") for name in names}
    with torch.no_grad():
        encoder(fixture, objective.backbone, volumes, config)
        synthesis(fixture, objective, volumes, config)
    masks(fixture, config)
    pretraining(fixture, objective, volumes, config)


def encoder(fixture, backbone, volumes, config):
    patch = config["pretrain"]["patch_size"]
    fixture.compare("sincos.encoder", sincos(backbone.native_grid, config["pretrain"]["hidden_size"])[None], 1e-6)
    fixture.compare("sincos.decoder", sincos(backbone.native_grid, config["pretrain"]["decoder_hidden_size"])[None], 1e-6)
    for name, volume in volumes.items():
        fixture.compare(f"target.{name}", patched(volume, patch), 0)
        embed = backbone.patch_embed[name]
        fixture.compare(f"tokens.{name}", embed(patched(volume, patch)) + embed.positions, ACTIVATIONS)
    for subset in config["encoder_subsets"]:
        features = backbone({name: volumes[name] for name in reversed(subset)})
        fixture.compare(f"encoder.{'-'.join(subset)}", joined(features, subset), ACTIVATIONS)
    headless = create_model("bm_mae", **{**backbone.arguments, "class_token": False}).eval()
    headless.load_state_dict({name: tensor for name, tensor in backbone.state_dict().items() if name != "cls_token"})
    for subset in config["encoder_nocls"]:
        features = headless({name: volumes[name] for name in subset})
        fixture.compare(f"encoder_nocls.{'-'.join(subset)}", joined(features, subset), ACTIVATIONS)


def synthesis(fixture, objective, volumes, config):
    """The published code wants a tensor for what it makes; ours makes it of those that there are."""
    patch = config["pretrain"]["patch_size"]
    for subset in config["reconstruct_visible"]:
        given = {name: volumes[name] for name in subset}
        made = objective.reconstruct(given)
        assert set(made) == set(volumes) - set(subset)
        hidden = {name: torch.ones(len(volume), objective.decoder.positions.shape[1]) > 0 for name, volume in volumes.items()}
        hidden |= {name: ~hidden[name] for name in subset}
        also = objective.reconstruct(
            {**volumes, **{name: torch.full_like(volumes[name], torch.nan) for name in made}}, token_mask=hidden
        )
        for name, volume in made.items():
            fixture.compare(f"reconstruct.from_{'-'.join(subset)}.{name}", patched(volume, patch), ACTIVATIONS)
            assert torch.allclose(also[name], volume, atol=ACTIVATIONS)


def masks(fixture, config):
    names, ratio = config["modalities"], config["pretrain"]["masking_ratio"]
    shares, shuffle = fixture.input("mask.proportions").numpy(), fixture.input("mask.noise.final").numpy()
    noise = {name: fixture.input(f"mask.noise.{name}").numpy() for name in names}
    count = int(shuffle.shape[1] * (1 - ratio))
    orders = np.stack([visible_first(shares[i], [noise[name][i] for name in names], shuffle[i], count) for i in range(len(shares))])
    hidden = np.ones(orders.shape, bool)
    np.put_along_axis(hidden, orders[:, :count], False, 1)
    fixture.compare("mask.ids_keep", torch.from_numpy(orders[:, :count]), 0)
    fixture.compare("mask.ids_restore", torch.from_numpy(orders.argsort(1)), 0)
    parts = dict(zip(names, np.split(hidden, len(names), 1), strict=True))
    for name, part in parts.items():
        fixture.compare(f"mask.{name}", torch.from_numpy(part), 0)
    fixture.compare("mask.visible_count", torch.from_numpy(np.stack([(~part).sum(1) for part in parts.values()], 1)), 0)


def pretraining(fixture, objective, volumes, config):
    names = config["modalities"]
    tables = {name: fixture.tensors[f"mask.{name}"].bool() for name in names}
    batch = {**volumes, "masks": torch.stack(list(tables.values()), 1)}
    batch["present"] = torch.ones(batch["masks"].shape[:2], dtype=torch.bool)
    with torch.no_grad():
        encoded, packing, _ = objective.backbone.encode(volumes, token_mask=tables)
        assert len(encoded) == fixture.tensors["pretrain.encoder_tokens"].shape[:2].numel()  # nothing else was computed
        kept = fixture.tensors["mask.ids_keep"] + 1
        whole = packing.spread(encoded)
        tokens = whole.gather(1, kept[..., None].expand(-1, -1, whole.shape[2]))
        fixture.compare("pretrain.encoder_tokens", torch.cat([whole[:, :1], tokens], 1), ACTIVATIONS)
        fixture.compare("pretrain.decoder_input", objective.decoder.sequence(encoded, packing), ACTIVATIONS)
        for name, patches in objective.patches(volumes, token_mask=tables)[0].items():
            fixture.compare(f"pretrain.pred.{name}", patches, ACTIVATIONS)
        normalised = read(fixture, decoder_dropout=0.0, normalise_targets=True)
        losses(fixture, "pretrain.loss_norm", normalised(batch, 0), names)
    out = objective.train()(batch, 0)
    losses(fixture, "pretrain.loss", out, names)
    out["loss"].backward()
    gradients = dict(objective.named_parameters())
    norms = json.loads((fixture.folder / "grad_norms.json").read_text())["grad_norm"]
    for name, norm in norms.items():
        if norm is None:
            assert ours(name) not in gradients and ours(name) in dict(objective.named_buffers())
        else:
            assert float(gradients[ours(name)].grad.norm()) == pytest.approx(norm, rel=GRADIENTS), name
    assert {ours(name) for name in norms} == set(objective.state_dict())
    fixture.compare("grad.cls_token", objective.backbone.cls_token.grad, LOSS)
    fixture.compare("grad.mask_tokens", objective.decoder.mask_token.grad, LOSS)
    fixture.compare("grad.t1_bias", objective.backbone.patch_embed["t1"].bias.grad, LOSS)


def losses(fixture, key, out, names):
    fixture.compare(f"{key}.total", out["loss"][None], LOSS)
    for name in names:
        fixture.compare(f"{key}.{name}", out[name][None], LOSS)


def test_bm_mae_sampler(recorded):
    """As many visible tokens as ever, shared out like those of the published sampler."""
    fixture = recorded("bm_mae", "io")
    fixture.left_out.update(dict.fromkeys(fixture.tensors, "input"))
    config = fixture.config()
    stats, draws = config["recorded"]["sampler_stats"], config["recorded"]["sampler_stats"]["draws"]
    names, total = config["modalities"], config["recorded"]["num_tokens"]
    each, draw = [total // len(names)] * len(names), np.random.default_rng(0)
    ratio = config["pretrain"]["masking_ratio"]
    counts = np.array([[int((~mask).sum()) for mask in modality_masks(each, draw, ratio=ratio)] for _ in range(draws)])
    assert set(counts.sum(1)) == set(stats["sum_always"]) == {config["recorded"]["num_kept"]}
    error = counts.std() / draws**0.5
    assert np.abs(counts.mean(0) - np.mean(stats["mean_visible"])).max() < 5 * error
    assert np.abs(counts.std(0) / np.mean(stats["std_visible"]) - 1).max() < 0.1
    empty = stats["fraction_of_samples_with_a_fully_masked_modality"]
    assert abs((counts == 0).any(1).mean() - empty) < 5 * (2 * empty * (1 - empty) / draws) ** 0.5
    count = int(total * 0.6)  # here the bound matters, and it holds for every draw, the first one too
    for _ in range(200):
        assert (visible_shares(each, count, draw) * count < each).all()


def test_bm_mae_real_sizes(parity_root):
    """Names and shapes of the published files, and the counts of their parameters, on the meta device."""
    table = json.loads((parity_root / "bm_mae" / "official_keys.json").read_text())
    official, counted = table["bmmae.pth"], table["parameters"]
    with torch.device("meta"):
        objective = MaskedModalities(create_model("bm_mae"))
        headless = create_model("bm_mae", class_token=False)
    shapes = {name: list(tensor.shape) for name, tensor in to_official(objective.state_dict()).items()}
    assert shapes == official
    assert {ours(name) for name in official} == set(objective.state_dict())
    assert sum(tensor.numel() for tensor in objective.state_dict().values()) == counted["total"]
    assert sum(parameter.numel() for parameter in objective.parameters()) == counted["trainable"]
    assert sum(tensor.numel() for tensor in objective.decoder.state_dict().values()) == counted["decoder"]
    assert sum(tensor.numel() for tensor in objective.backbone.state_dict().values()) == counted["encoder_with_tokenizers_and_cls"]
    for kind, encoder in (("classification", objective.backbone), ("segmentation", headless)):
        keys = next(keys for name, keys in table.items() if name.startswith(f"finetuned_{kind}"))
        inside = {ours(name): shape for name, shape in keys.items() if ours(name).startswith("backbone.")}
        assert inside == {f"backbone.{name}": list(tensor.shape) for name, tensor in encoder.state_dict().items()}


# -- fine-tuned heads --------------------------------------------------------------------------------------------------------


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


def test_bm_mae_segmentation(recorded, tmp_path):
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


def test_bm_mae_segmentation_at_the_published_size(recorded, tmp_path):
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


def test_bm_mae_pooled_heads(recorded, tmp_path):
    """Classification and survival: encoder of pretraining with recorded linear layers."""
    fixture, linear = recorded("bm_mae", "io"), recorded("bm_mae", "heads")
    mine = ("cls.", "surv.", "in.")
    for key in fixture.tensors:
        if not key.startswith(mine):
            fixture.left_out.setdefault(key, "compared with the encoder")
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
