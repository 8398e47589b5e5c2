"""The elastic family against tensors recorded from the published POA code. Sizes and seeds are read from the fixtures."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch

from okavango.data.masking import batch_masks
from okavango.models.backbone import create_model
from okavango.models.elastic import Supernet, kept_blocks
from okavango.models.elastic_swin import relative_position_index
from okavango.models.features import Subnet
from okavango.pretrain.objectives.distillation import (
    Centre,
    ProjectionHeads,
    cross_entropy,
    cross_view,
    koleo,
    masked_patch_loss,
    sinkhorn,
)
from okavango.pretrain.objectives.poa import POA
from okavango.pretrain.optim import Cosine, Optimiser, clip_gradients
from okavango.pretrain.settings import Optim, POASettings
from okavango.zoo.poa import from_official, read_official, to_official

BACKBONE, LOSS, HEAD = 1e-4, 1e-5, 1e-6


def build(config: dict, image_size: int) -> Supernet:
    """The supernet of a recorded configuration, a ViT or, where it names the depths of stages, a Swin."""
    lowest, highest, head = config["min_embed_dim"], config["max_embed_dim"], config["head_dim"]
    common = dict(image_size=image_size, patch_size=config["patch_size"], min_width=lowest, max_width=highest, head_dim=head)
    if "max_depths" in config:
        return create_model(
            "elastic_swin",
            **common,
            width_step=head,
            window=config["window_size"],
            depths=config["max_depths"],
            min_depth=config["min_s3_depth"],
            mask_stride=config["patch_size"] * 8 // config["ibot_scale_factor"],
        )
    return create_model(
        "elastic_vit",
        **common,
        width_step=head * config.get("width_interval", 1),
        min_depth=config["min_depth"],
        max_depth=config["max_depth"],
    )


def enlarged(features, cells: int) -> torch.Tensor:
    """Tokens (B, cells, D) of a map repeated to more cells, as the reference gives them to the patch loss."""
    times = round((cells / features.tokens["image"].shape[1]) ** 0.5)
    tokens = features.tokens["image"].unflatten(1, features.grid["image"])
    return tokens.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1, 2)


def test_poa_vit(recorded):
    fixture = recorded("poa", "vit/io")
    config = fixture.config()
    net = build(config["model"], config["model"]["img_size"]).eval()
    net.load_state_dict(from_official(fixture.weights()))
    assert to_official(net.state_dict()).keys() == fixture.weights().keys()
    enumeration = config["enumeration"]
    assert list(net.widths) == enumeration["widths"] and list(net.depths) == enumeration["depths"]
    assert len(net.sampling_pool(config["model"]["net_select_scale"])) == enumeration["num_pool_entries"]
    masks = fixture.input("masks").bool()
    for entry in config["nets"]:
        tag, subnet = entry["tag"], Subnet(entry["width"], entry["depth"])
        assert list(kept_blocks(entry["depth"], config["model"]["max_depth"])) == entry["block_idx"]
        plain = net.extract(subnet)
        for kind in ("global", "masked", "local", "extra"):
            images = fixture.input("images_global" if kind == "masked" else f"images_{kind}")
            with torch.no_grad():
                token_mask = {"image": masks} if kind == "masked" else None
                features = net(image=images, token_mask=token_mask, subnet=subnet, layers=(-1,))
                extracted = features if kind == "masked" else plain(image=images)
            last = features.layers[entry["depth"] - 1]
            fixture.compare(f"{tag}/{kind}/x_norm_clstoken", features.pooled, BACKBONE)
            fixture.compare(f"{tag}/{kind}/x_norm_patchtokens", features.tokens["image"], BACKBONE)
            fixture.compare(f"{tag}/{kind}/x_prenorm", torch.cat([last.prefix, last.tokens["image"]], 1), BACKBONE)
            assert torch.allclose(extracted.pooled, features.pooled, atol=1e-5)
            assert torch.allclose(extracted.tokens["image"], features.tokens["image"], atol=1e-5)
        if positions := entry.get("probe_block_positions_n4"):
            with torch.no_grad():
                layers = net(image=fixture.input("images_global"), subnet=subnet, layers=positions).layers
            for index, position in enumerate(positions):
                fixture.compare(f"{tag}/probe{index}/patch", net.final_norm(layers[position].tokens["image"]), BACKBONE)
                fixture.compare(f"{tag}/probe{index}/cls", net.final_norm(layers[position].prefix)[:, 0], BACKBONE)


def test_poa_extraction_matches_official_script(recorded):
    """The tensors that the official script wrote, but for the final norm, which it loses."""
    from safetensors.torch import load_file

    fixture = recorded("poa", "vit/io")
    fixture.left_out.update(dict.fromkeys(fixture.tensors, "input"))
    config = fixture.config()
    net = build(config["model"], config["model"]["img_size"])
    net.load_state_dict(from_official(fixture.weights()))
    for path in (fixture.folder / "extracted").glob("*.safetensors"):
        ours = net.extract(Subnet.parse(path.stem)).trunk.state_dict()
        theirs = load_file(path)
        assert set(ours) - set(theirs) == {"norm.weight", "norm.bias"} and set(theirs) - set(ours) == {"mask_token"}
        for name in set(ours) & set(theirs):
            assert torch.allclose(ours[name], theirs[name], atol=1e-6), name


def test_poa_swin(recorded):
    fixture = recorded("poa", "swin/io")
    config = fixture.config()
    net = build(config["model"], config["model"]["img_size"]).eval()
    net.load_state_dict(from_official(fixture.weights()))
    back = to_official(net.state_dict())
    assert back.keys() == fixture.weights().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in fixture.weights().items())
    for name, tensor in fixture.weights().items():
        if name.endswith("relative_position_index"):
            assert torch.equal(tensor, relative_position_index(config["model"]["window_size"]))
    enumeration = config["enumeration"]
    assert list(net.widths) == enumeration["widths"] and [depth[2] for depth in net.depths] == enumeration["depths"]
    assert len(net.sampling_pool(2)) == enumeration["num_pool_entries"]
    masks = fixture.input("masks").bool()
    for entry in config["nets"]:
        tag, subnet = entry["tag"], net.check_subnet(Subnet(entry["width"], entry["s3_depth"]))
        blocks = kept_blocks(entry["s3_depth"], config["model"]["max_depths"][2])
        assert list(blocks) == entry["stage3_block_idx"] and [index % 2 == 1 for index in blocks] == entry["stage3_shift"]
        plain = net.extract(subnet)
        assert [stage.blocks[0].attn.relative_position_bias_table.shape[1] for stage in plain.stages] == entry["num_heads"]
        for kind in ("global", "masked", "local"):
            images = fixture.input("images_global" if kind == "masked" else f"images_{kind}")
            with torch.no_grad():
                token_mask = {"image": masks} if kind == "masked" else None
                features = net(image=images, token_mask=token_mask, subnet=subnet, layers=(-1,))
                extracted = features if kind == "masked" else plain(image=images)
            (last,) = features.layers.values()
            cells = fixture.tensors[f"{tag}/{kind}/x_norm_patchtokens"].shape[1]
            fixture.compare(f"{tag}/{kind}/x_norm_clstoken", features.pooled, BACKBONE)
            fixture.compare(f"{tag}/{kind}/x_norm_patchtokens", enlarged(features, cells), BACKBONE)
            fixture.compare(f"{tag}/{kind}/x_prenorm", last.tokens["image"], BACKBONE)
            if kind == "global":
                for number, a_map in enumerate(features.maps):
                    tokens = a_map.flatten(2).transpose(1, 2)
                    fixture.compare(f"{tag}/stage{number}/tokens", tokens, BACKBONE)
                    fixture.compare(f"{tag}/stage{number}/mean", tokens.mean(1), BACKBONE)
            for ours, theirs in zip((features.pooled, *features.maps), (extracted.pooled, *extracted.maps), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)


def test_poa_swin_extraction_matches_official_script(recorded):
    """The tensors that the official script wrote, but for the norm of the patch embedding, which it narrows."""
    from safetensors.torch import load_file

    fixture = recorded("poa", "swin/io")
    fixture.left_out.update(dict.fromkeys(fixture.tensors, "input"))
    config = fixture.config()
    net = build(config["model"], config["model"]["img_size"])
    net.load_state_dict(from_official(fixture.weights()))
    for path in (fixture.folder / "extracted").glob("*.safetensors"):
        ours = to_official(net.extract(net.check_subnet(Subnet.parse(path.stem))).state_dict())
        theirs = {name.removeprefix("backbone."): tensor for name, tensor in load_file(path).items()}
        assert set(theirs) - set(ours) == {"mask_token"} and not set(ours) - set(theirs)
        for name in set(ours) & set(theirs):
            if name.startswith("patch_embed."):
                assert torch.equal(ours[name][: len(theirs[name])], theirs[name]), name
            else:
                assert ours[name].shape == theirs[name].shape and torch.allclose(ours[name], theirs[name], atol=1e-6), name
        shapes = json.loads((fixture.folder / "extracted_shapes.json").read_text())
    for entry in config["nets"]:
        ours = to_official(net.extract(net.check_subnet(Subnet(entry["width"], entry["s3_depth"]))).state_dict())
        theirs = {name.removeprefix("backbone."): shape for name, shape in shapes[entry["tag"]].items()}
        for name, tensor in ours.items():
            assert name.startswith("patch_embed.") or list(tensor.shape) == theirs[name], name


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_poa_checkpoints_are_read(recorded, tmp_path, family):
    """A pickle as the published program writes it -> the network that the configuration describes."""
    fixture = recorded("poa", f"{family}/io")
    fixture.left_out.update(dict.fromkeys(fixture.tensors, "input"))
    config, weights = fixture.config()["model"], fixture.weights()
    teacher = {f"backbone.{name}": tensor for name, tensor in weights.items()} | {"dino_head.mlp0.2.bias": torch.zeros(3)}
    torch.save({"teacher": teacher}, tmp_path / "teacher.pth")
    model, left = read_official(
        tmp_path / "teacher.pth",
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        head_dim=config["head_dim"],
        min_width=config["min_embed_dim"],
        min_depth=config["min_s3_depth" if family == "swin" else "min_depth"],
    )
    expected = build(config, config["img_size"])
    expected.load_state_dict(from_official(weights))
    assert left == ["dino_head.mlp0.2.bias"] and not model.training
    assert model.arguments == expected.arguments and model.list_subnets() == expected.list_subnets()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_poa_heads(recorded):
    fixture = recorded("poa", "heads/io")
    config = fixture.config()["head"]
    heads = ProjectionHeads(config["max_in_dim"], config["hidden_dim"], config["bottleneck_dim"], config["out_dims"])
    heads.load_state_dict(from_official(fixture.weights()))
    for width in fixture.config()["widths"]:
        with torch.no_grad():
            logits = heads(fixture.input(f"w{width}/x"))
        for index, value in enumerate(logits):
            fixture.compare(f"w{width}/head{index}", value, HEAD)


def test_poa_losses(recorded):
    fixture = recorded("poa", "losses/io")
    config = fixture.config()
    temperature, tau, batch = config["student_temp"], config["teacher_temp"], config["batch"]
    masks, weights = fixture.input("masks").bool(), fixture.input("masks_weight")
    own_weights = (1 / masks.sum(1).clamp_min(1).float())[:, None].expand_as(masks)[masks]
    for head in range(len(config["prototypes"])):

        def get(name, head=head):
            return fixture.input(f"head{head}/{name}")

        def check(name, value, tolerance=LOSS, head=head):
            fixture.compare(f"head{head}/{name}", value, tolerance)

        cls_logits, patch_logits = get("teacher_cls_logits"), get("teacher_patch_logits")
        check("sinkhorn_cls", sinkhorn(cls_logits, tau))
        check("sinkhorn_cls_1iter", sinkhorn(cls_logits, tau, iterations=1))
        check("sinkhorn_patch", sinkhorn(patch_logits, tau))
        targets, patches = sinkhorn(cls_logits, tau), sinkhorn(patch_logits, tau)
        global_mean, local_sum = cross_view(targets, get("student_global_cls_logits"), get("student_local_cls_logits"), temperature)
        check("dino_global_loss", global_mean)
        check("dino_local_loss", local_sum)
        check("vanilla_teacher_global", (get("student_global_cls_logits") / temperature).softmax(-1))
        for kind in ("global", "local"):
            teacher = (get(f"student_{kind}_cls_logits") / temperature).softmax(-1)
            check(f"distill_{kind}_loss", cross_entropy(teacher, get(f"elastic_{kind}_cls_logits"), temperature).mean())
        student = get("student_patch_logits")
        check("ibot_loss", masked_patch_loss(patches, student, weights, 2 * batch, temperature))
        check("ibot_loss_noweight", masked_patch_loss(patches, student, own_weights, 2 * batch, temperature))

        cls_centre = Centre(config["prototypes"][head], config["center_momentum"])
        patch_centre = Centre(config["prototypes"][head], config["center_momentum"])
        for step in range(3):
            where = f"centering/step{step}/head{head}"
            fixture.compare(f"{where}/cls_out", cls_centre(fixture.input(f"{where}/teacher_cls_logits"), tau), LOSS)
            patch = patch_centre(fixture.input(f"{where}/teacher_patch_logits")[0], tau)
            fixture.compare(f"{where}/patch_out", patch[None], LOSS)
        fixture.compare(f"centering/final/head{head}/cls_center", cls_centre.centre[None], LOSS)
        fixture.compare(f"centering/final/head{head}/patch_center", patch_centre.centre[None, None], LOSS)

    x = fixture.input("koleo/x").clone().requires_grad_()
    loss = koleo(x)
    loss.backward()
    fixture.compare("koleo/loss", loss.detach(), LOSS)
    fixture.compare("koleo/grad", x.grad, LOSS)

    for name, entry in config["schedules"].items():
        schedule = Cosine(
            entry["base_value"],
            entry["final_value"],
            entry["total_iters"],
            warmup=entry.get("warmup_iters", 0),
            start=entry.get("start_warmup_value", 0.0),
            stretch=entry["iter_num_scale"],
        )
        length = len(fixture.tensors[f"schedule/{name}"])
        values = torch.tensor([schedule(step) for step in range(length)], dtype=torch.float64)
        fixture.compare(f"schedule/{name}", values, 1e-12)

    collate = config["collate"]
    drawn = torch.from_numpy(
        batch_masks(
            2 * collate["images"],
            tuple(collate["grid"]),
            Random(collate["python_random_seed"]),
            probability=collate["mask_probability"],
            ratio=tuple(collate["mask_ratio"]),
            min_patches=collate["min_num_patches"],
            min_aspect=collate["min_aspect"],
        )
    )
    fixture.compare("collate/masks", drawn, 0)
    fixture.compare("collate/mask_indices_list", drawn.flatten().nonzero().flatten(), 0)
    fixture.compare("collate/masks_weight", (1 / drawn.sum(1).clamp_min(1).float())[:, None].expand_as(drawn)[drawn], 1e-7)


@pytest.mark.parametrize("name", ["step_vit", "step_swin"])
def test_poa_step(recorded, name):
    fixture = recorded("poa", f"{name}/io")
    config = fixture.config()
    sampling_scale = 2.0 if name == "step_swin" else 3.0
    batch = {
        "global": fixture.input("global_crops"),
        "local": fixture.input("local_crops"),
        "masks": fixture.input("masks").bool(),
    }
    masks = batch["masks"]
    fixture.compare("mask_indices_list", masks.flatten().nonzero().flatten(), 0)
    fixture.compare("masks_weight", (1 / masks.sum(1).clamp_min(1).float())[:, None].expand_as(masks)[masks], 1e-7)
    weights = from_official(fixture.weights())
    for number, (tag, _, ibot, tau) in enumerate(config["steps"]):
        recorded_result = config["results"][number]
        settings = POASettings(
            balance=config["lam"],
            prototypes=tuple(config["protos"]),
            head_hidden=config["hid"],
            head_bottleneck=config["bott"],
            teacher_temperature=(tau, tau),
            momentum=(config["mom"], config["mom"]),
            ibot_start=0.0,
            ibot=ibot,
            layer_decay=config["lwd"],
            last_layer_freeze=0.1,
            sampling_scale=sampling_scale,
        )
        torch.manual_seed(0)
        net = build(config["student"], config["S"])
        objective = POA(net, settings, steps=10).train()
        assert list(objective.pool) == [net.check_subnet(Subnet(*entry)) for entry in config["pool"][:-1]]
        objective.load_state_dict(weights)
        subnet = net.check_subnet(Subnet(*recorded_result["network"]))
        objective.draw = lambda step, subnet=subnet: subnet
        terms = objective.terms(batch, 0)
        for head in range(len(config["protos"])):
            for kind in ("global", "local"):
                blend = config["lam"] * terms[f"dino_{kind}"] + (1 - config["lam"]) * terms[f"elastic_dino_{kind}"]
                fixture.compare(f"{tag}/loss/dino_{kind}_crops_loss_{head}", blend[head].detach(), LOSS)
                fixture.compare(f"{tag}/loss/distill_{kind}_crops_loss_{head}", terms[f"same_view_{kind}"][head].detach(), LOSS)
            if ibot:
                blend = config["lam"] * terms["ibot"] + (1 - config["lam"]) * terms["elastic_ibot"]
                fixture.compare(f"{tag}/loss/ibot_loss_{head}", blend[head].detach() / 2, LOSS)
        half = 0.1 * (terms["koleo"] + terms["elastic_koleo"]).detach() / 4
        fixture.compare(f"{tag}/loss/koleo_loss", half, LOSS)
        loss = objective(batch, 0)["loss"]
        fixture.compare(f"{tag}/total_loss", loss.detach(), LOSS)
        loss.backward()
        gradients = to_official({name: p.grad for name, p in objective.student.named_parameters() if p.grad is not None})
        recorded_names = {key.removeprefix(f"{tag}/grad/") for key in fixture.tensors if key.startswith(f"{tag}/grad/")}
        assert set(gradients) == recorded_names
        for name, gradient in gradients.items():
            fixture.compare(f"{tag}/grad/{name}", gradient, LOSS)

        # AdamW's first step is the sign of the gradient, so rounding noise where a gradient is zero by symmetry (key biases) would
        # show; the step is taken from the recorded gradients, which were compared above.
        exact = from_official({name: fixture.tensors[f"{tag}/grad/{name}"] for name in recorded_names})
        for name, parameter in objective.student.named_parameters():
            parameter.grad = exact[name].clone() if name in exact else None
        optim = Optim(lr=config["lr"], lr_scaling="none", warmup=0.0, weight_decay=(config["wd"],) * 2)
        groups = objective.param_groups()
        optimiser = Optimiser(groups, optim, 10, 1)
        optimiser.schedule(0)
        for group, own in zip(optimiser.adamw.param_groups, groups, strict=True):
            if any(".last_" in name for name, _ in own["params"]):
                group["lr"] = config["last_lr"]
        names = to_official({name: torch.tensor(0) for group in groups for name, _ in group["params"]})
        ours = {
            name: (group["lr_mult"], group["wd_mult"])
            for group, name in zip(
                (group for group in groups for _ in group["params"]), (name.removeprefix("student.") for name in names), strict=True
            )
        }
        theirs = {
            name: (group["lr_multiplier"], group["wd_multiplier"]) for group in config["param_groups"] for name in group["params"]
        }
        assert ours.keys() == theirs.keys() and all(ours[name] == pytest.approx(theirs[name], rel=1e-12) for name in ours)
        norms = clip_gradients(objective.clip_groups(), 1.5)
        for norm, expected in zip(norms, recorded_result["grad_norm_before_clip"].values(), strict=True):
            assert float(norm) == pytest.approx(expected, rel=1e-4)
        optimiser.adamw.step()
        objective.after_step(0)
        for side in ("student", "teacher"):
            if any(key.startswith(f"{tag}/{side}_after/") for key in fixture.tensors):
                for name, tensor in to_official(getattr(objective, side).state_dict()).items():
                    fixture.compare(f"{tag}/{side}_after/{name}", tensor, 1e-5)


REAL = {
    "vit": ("elastic_vit_large", "vit_large_intact", 3, "block_idx"),
    "swin": ("elastic_swin_base", "swin_base_intact", 2, "block_idx_stage3"),
}


@pytest.mark.parametrize("family", REAL)
def test_poa_real_sizes(recorded, family):
    """Tables of the real networks: pool, kept blocks, key shapes and learning-rate factors, on the meta device."""
    architecture, intact, scale, block_table = REAL[family]
    fixture = recorded("poa", "heads/io")
    fixture.left_out.update(dict.fromkeys(fixture.tensors, "input"))
    root = fixture.folder.parent
    enumeration = json.loads((root / "enumeration.json").read_text())[family]
    official = json.loads((root / "official_keys.json").read_text())[intact]
    table = json.loads((root / "param_groups.json").read_text())[family]
    with torch.device("meta"):
        net = create_model(architecture)
        objective = POA(net, POASettings(), steps=346)
    pool = net.sampling_pool(scale)
    assert list(net.widths) == enumeration["widths"] and pool[-1] == net.check_subnet(Subnet(*enumeration["intact"]))
    assert len(pool) == enumeration["pool_entries"] and len(net.list_subnets()) == enumeration["distinct"]
    grid = [[net.check_subnet(Subnet(width, depth)) for depth in enumeration["depths"]] for width in enumeration["widths"]]
    assert [[pool.count(subnet) for subnet in row] for row in grid] == enumeration["multiplicity"]
    assert [subnet for row in grid for subnet in row] == net.list_subnets()
    for depth, blocks in enumeration[block_table].items():
        assert list(kept_blocks(int(depth), enumeration["intact"][1])) == blocks
    shapes = {name: list(tensor.shape) for name, tensor in to_official(objective.teacher.state_dict()).items()}
    assert shapes == official["keys"]
    assert sum(p.numel() for p in net.parameters()) == official["backbone_params"]
    ours = {}
    for group in objective.param_groups():
        for name in to_official({name: torch.tensor(0) for name, _ in group["params"]}):
            ours[name.removeprefix("student.")] = [group["lr_mult"], group["wd_mult"], group["start_step"] > 0]
    assert ours.keys() == table["params"].keys()
    for name, row in table["params"].items():
        assert ours[name] == pytest.approx(row, rel=1e-9), name
