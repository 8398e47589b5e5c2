"""BM-MAE against tensors recorded from its published code. Sizes and seeds are read from the fixtures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from okavango.data.masking import modality_masks, visible_first, visible_shares
from okavango.models.backbone import create_model
from okavango.models.bm_mae import patch_view, sincos
from okavango.pretrain.objectives.bm_mae import MaskedModalities
from okavango.zoo.bm_mae import ours, read_official, to_official

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
