"""The elastic family against tensors recorded from the published POA code. Sizes and seeds are read from the fixtures."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch

from okavango.data.masking import batch_masks
from okavango.models.backbone import create_model
from okavango.models.elastic_vit import ElasticViT, kept_blocks
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
from okavango.zoo.poa import from_official, to_official

BACKBONE, LOSS, HEAD = 1e-4, 1e-5, 1e-6


def build(config: dict, image_size: int) -> ElasticViT:
    lowest, highest, head = config["min_embed_dim"], config["max_embed_dim"], config["head_dim"]
    return create_model(
        "elastic_vit",
        image_size=image_size,
        patch_size=config["patch_size"],
        min_width=lowest,
        max_width=highest,
        width_step=head * config["width_interval"],
        min_depth=config["min_depth"],
        max_depth=config["max_depth"],
        head_dim=head,
    )


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


def test_poa_step(recorded):
    fixture = recorded("poa", "step_vit/io")
    config = fixture.config()
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
        )
        torch.manual_seed(0)
        objective = POA(build({"width_interval": 1, **config["student"]}, config["S"]), settings, steps=10).train()
        assert [[s.width, s.depth] for s in objective.pool] == config["pool"][:-1]
        objective.load_state_dict(weights)
        subnet = Subnet(*recorded_result["network"])
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


def test_poa_real_sizes(recorded):
    """Tables of the real ViT: pool, kept blocks, key shapes and learning-rate factors, on the meta device."""
    fixture = recorded("poa", "heads/io")
    fixture.left_out.update(dict.fromkeys(fixture.tensors, "input"))
    root = fixture.folder.parent
    enumeration = json.loads((root / "enumeration.json").read_text())["vit"]
    with torch.device("meta"):
        net = create_model("elastic_vit_large")
        official = json.loads((root / "official_keys.json").read_text())["vit_large_intact"]
        objective = POA(net, POASettings(), steps=346)
    pool = net.sampling_pool(3)
    assert len(pool) == enumeration["pool_entries"] and len(net.list_subnets()) == enumeration["distinct"]
    assert [[pool.count(Subnet(w, d)) for d in net.depths] for w in net.widths] == enumeration["multiplicity"]
    for depth, blocks in enumeration["block_idx"].items():
        assert list(kept_blocks(int(depth), net.depths[-1])) == blocks
    shapes = {name: list(tensor.shape) for name, tensor in to_official(objective.teacher.state_dict()).items()}
    assert shapes == official["keys"]
    assert sum(p.numel() for p in net.parameters()) == official["backbone_params"]
    table = json.loads((root / "param_groups.json").read_text())["vit"]
    ours = {}
    for group in objective.param_groups():
        for name in to_official({name: torch.tensor(0) for name, _ in group["params"]}):
            ours[name.removeprefix("student.")] = [group["lr_mult"], group["wd_mult"], group["start_step"] > 0]
    assert ours.keys() == table["params"].keys()
    for name, row in table["params"].items():
        assert ours[name] == pytest.approx(row, rel=1e-9), name


@pytest.mark.parametrize("name", ["swin/io", "step_swin/io"])
def test_poa_not_yet(recorded, name):
    """Fixtures of the elastic Swin, which does not exist here yet: named in the report, not compared."""
    fixture = recorded("poa", name)
    fixture.left_out.update(dict.fromkeys(fixture.tensors, "the elastic Swin is not implemented yet"))
