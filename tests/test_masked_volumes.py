"""BM-MAE: subsets, packing, padding, new modalities, masks, the objective and its runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import weights
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango import verbs
from okavango.cli import main
from okavango.data.loading import DataError
from okavango.data.masking import modality_masks, visible_shares
from okavango.models.backbone import create_model, latency
from okavango.models.bm_mae import ALIASES, from_patches, grid_of, patch_view, positions_at, sincos
from okavango.models.volume import Scan
from okavango.pretrain.objectives.bm_mae import Collate, MaskedModalities, load_objective, masked_error
from okavango.pretrain.optim import learning_rate
from okavango.pretrain.settings import BMMAESettings, Optim
from okavango.recipes import named
from okavango.testing import check_backbone, check_objective
from okavango.zoo.bm_mae import from_official, read_official, to_official
from okavango.zoo.catalogue import list_models
from okavango.zoo.checkpoint import save_checkpoint
from okavango.zoo.hub import HubError, load
from okavango.zoo.loading import CheckpointError

NAMES = ("t1", "t1ce", "t2", "flair")
SMALL = dict(size=16, patch_size=8, width=24, depth=2, heads=2, mlp=32, spacing=None, orientation=None)
DECODER = dict(decoder_width=12, decoder_depth=1, decoder_heads=2, decoder_mlp=16, decoder_dropout=0.0)
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def build(**arguments):
    torch.manual_seed(1)
    return create_model("bm_mae", **{**SMALL, **arguments}).eval()


def volumes(batch: int, size=16, names=NAMES, seed: int = 0) -> dict[str, torch.Tensor]:
    sides = (size,) * 3 if isinstance(size, int) else size
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, 1, *sides, generator=draw) for name in names}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and torch.allclose(a, b, **CLOSE), float((a - b).abs().max())


subsets = st.lists(st.booleans(), min_size=4, max_size=4).filter(any)


# -- the backbone -----------------------------------------------------------------------------------------------------------------


@given(st.permutations(NAMES), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=15)
def test_the_order_of_modalities_never_matters(order, count, aliases):
    model, given = build(), volumes(2)
    chosen = order[:count]
    spoken = {(ALIASES[name][0].upper() if aliases else name): given[name] for name in chosen}
    out = model(spoken, layers=(0,))
    again = model({name: given[name] for name in sorted(chosen, key=NAMES.index)}, layers=(0,))
    assert list(out.tokens) == list(again.tokens) == [name for name in NAMES if name in chosen]
    assert torch.equal(out.pooled, again.pooled)
    assert all(torch.equal(out.tokens[name], again.tokens[name]) for name in chosen)
    assert all(torch.equal(out.layers[0].tokens[name], again.layers[0].tokens[name]) for name in chosen)


@given(st.lists(subsets, min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_a_subset_in_a_mixed_batch_equals_the_subset_alone(rows, class_token, seed):
    """Features and gradients, though what is absent holds numbers that are none."""
    model = build(class_token=class_token)
    present, whole = torch.tensor(rows), volumes(len(rows), seed=seed)
    for index, name in enumerate(NAMES):
        whole[name][~present[:, index]] = torch.nan
    pull = torch.randn(len(rows), 24)

    out = model(whole, present=present, layers=(-1,))
    (out.pooled * pull).sum().backward()
    mixed = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    for row, there in enumerate(rows):
        own = {name: whole[name][row : row + 1] for name, has in zip(NAMES, there, strict=True) if has}
        alone = model(own, layers=(-1,))
        close(out.pooled[row : row + 1], alone.pooled)
        for name, has in zip(NAMES, there, strict=True):
            assert (
                bool(out.token_mask[name][row].all() if has else (~out.token_mask[name][row]).all())
                if not all(map(all, rows))
                else 1
            )
            if has:
                close(out.tokens[name][row : row + 1], alone.tokens[name])
                close(out.layers[1].tokens[name][row : row + 1], alone.layers[1].tokens[name])
            else:
                assert not out.tokens[name][row].any()
        (alone.pooled * pull[row]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(parameter.grad, mixed.get(name, torch.zeros_like(parameter)))


@given(st.integers(0, 999), st.booleans())
@settings(deadline=None, max_examples=15)
def test_hidden_tokens_have_no_influence_and_are_not_computed(seed, class_token):
    model, given = build(class_token=class_token), volumes(3, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    hidden = {name: torch.rand(3, 8, generator=draw) < share for name, share in zip(NAMES, (0.5, 1.1, 0.2, 0.9), strict=True)}
    rows: list[int] = []
    hook = model.blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    out = model(given, token_mask={"t1n" if name == "t1" else name: mask for name, mask in hidden.items()})
    hook.remove()
    assert rows == [3 * class_token + sum(int((~mask).sum()) for mask in hidden.values())]
    other = {name: volume.clone() for name, volume in given.items()}
    for name, mask in hidden.items():
        for sample, cell in mask.nonzero().tolist():
            patch_view(other[name], 8)[sample, *np.unravel_index(cell, (2, 2, 2))] = torch.inf
    also = model(other, token_mask=hidden)
    assert torch.equal(out.pooled, also.pooled) and all(torch.equal(out.tokens[name], also.tokens[name]) for name in NAMES)
    assert all(torch.equal(out.token_mask[name], ~hidden[name]) for name in NAMES)


@pytest.mark.parametrize("class_token", [True, False])
def test_nothing_visible_gives_no_nan(class_token):
    model, given = build(class_token=class_token).train(), volumes(2)
    everything = {name: torch.ones(2, 8, dtype=torch.bool) for name in NAMES}
    one = {**everything, "t2": torch.tensor([[False] * 8, [True] * 8])}
    for mask in (everything, one):
        out = model(given, token_mask=mask, layers=(0, 1))
        out.pooled.sum().backward()
        assert bool(out.pooled.isfinite().all())
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)
        model.zero_grad()


@given(st.tuples(*[st.integers(5, 25)] * 3), st.sampled_from(["interpolate", "extend"]))
@settings(deadline=None, max_examples=15)
def test_padding_never_changes_the_result(size, rule):
    """A side that the patch does not divide is filled up with zeros at its end, as the caller might do it."""
    model, given = build(positions=rule), volumes(1, size, ("t1", "flair"))
    grid = grid_of(size, 8)
    full = {name: torch.zeros(1, 1, *(8 * cells for cells in grid)) for name in given}
    for name, volume in given.items():
        full[name][..., : size[0], : size[1], : size[2]] = volume
    out, same = model(given), model(full)
    assert out.grid == {"t1": grid, "flair": grid} and torch.equal(out.pooled, same.pooled)
    back = from_patches(patch_view(given["t1"], 8).flatten(4).flatten(1, 3), size, 8)
    assert torch.equal(back, given["t1"])


@pytest.mark.parametrize("like", [None, "t2f"])
def test_a_new_modality_leaves_the_old_ones_as_they_were(like, tmp_path):
    model, given = build(), volumes(2)
    chosen = [given, {"t2": given["t2"]}, {"flair": given["flair"], "t1": given["t1"]}]
    before = [model(inputs) for inputs in chosen]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_modality("pet", like)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    for inputs, old in zip(chosen, before, strict=True):
        new = model(inputs)
        assert torch.equal(new.pooled, old.pooled) and all(torch.equal(new.tokens[name], old.tokens[name]) for name in inputs)
    pet = volumes(2, names=("pet",))
    out = model({**pet, "t1": given["t1"]}, present=torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 1]]) > 0)
    assert out.token_mask["pet"].any(1).tolist() == [False, True] and model.modalities == (*NAMES, "pet")
    if like:
        assert torch.equal(model(pet=given["t1"]).pooled, model(flair=given["t1"]).pooled)
    save_checkpoint(model, tmp_path / "five")
    assert torch.equal(load(tmp_path / "five")(pet).pooled, model(pet).pooled)
    for taken in ("t1", "t1n", "pet", "no name"):
        with pytest.raises(ValueError, match=taken):
            model.add_modality(taken)


def test_positions_of_other_grids():
    table = sincos((4, 4, 4), 24)[None]
    assert torch.equal(positions_at(table, (4, 4, 4), (4, 4, 4), "interpolate"), table)
    wider = positions_at(table, (4, 4, 4), (2, 6, 4), "extend")
    assert torch.equal(wider.unflatten(1, (2, 6, 4))[0, :, :4], table.unflatten(1, (4, 4, 4))[0, :2])
    ramp = torch.arange(4.0)[None, :, None, None].expand(1, 4, 4, 4).reshape(1, 64, 1)
    stretched = positions_at(ramp, (4, 4, 4), (8, 4, 4), "interpolate").unflatten(1, (8, 4, 4))[0, :, 0, 0, 0]
    assert stretched.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_sizes_of_a_checkpoint_may_differ():
    small, large = build(), build(size=24)
    from okavango.zoo.loading import load_weights

    report = load_weights(large, small.state_dict())
    assert set(report.resized) == {f"patch_embed.{name}.positions" for name in NAMES}
    assert torch.isfinite(large(volumes(1, 24)).pooled).all()


def test_dropout_and_checkpointing_are_for_training_only():
    quiet, noisy, given = build(), build(dropout=0.5), volumes(2)
    assert torch.equal(quiet(given).pooled, noisy(given).pooled)
    noisy.train()
    assert not torch.equal(noisy(given).pooled, noisy(given).pooled)
    grads = []
    for flag in (False, True):
        model = build().train()
        model.activation_checkpointing = flag
        model(given, present=torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0]]) > 0).pooled.sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_volume_of_several_sizes_and_other_helpers():
    assert "layers" in check_backbone(lambda: create_model("bm_mae", **SMALL), sizes={"t1": (8, 17, 24)}, export=False)
    assert latency(build(), repeats=1) > 0


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"size": 20}, "multiples of patch_size"),
        ({"size": (16, 16)}, "three"),
        ({"width": 28}, "multiple of 6"),
        ({"heads": 5}, "heads 5"),
        ({"positions": "learned"}, "interpolate"),
        ({"modalities": ("t1", "t1")}, "once"),
        ({"modalities": ()}, "at least one"),
        ({"modalities": ("t1.w",)}, "letters"),
    ],
)
def test_arguments_that_do_not_fit(arguments, word):
    with pytest.raises(ValueError, match=word):
        build(**arguments)


def test_inputs_that_do_not_fit():
    model, given = build(), volumes(2)
    for call, word in (
        (lambda: model(pet=given["t1"]), "pet"),
        (lambda: model({"t1": given["t1"], "T1n": given["t1"]}), "twice"),
        (lambda: model(t1=given["t1"][:, 0]), "expected"),
        (lambda: model(t1=given["t1"], t2=given["t2"][:1]), "samples"),
        (lambda: model(t1=given["t1"], present=torch.ones(2, 4) > 0), "not given"),
        (lambda: model(t1=given["t1"], present=torch.ones(2, 1) > 0), "present"),
        (lambda: model(t1=given["t1"], token_mask={"t1": torch.ones(2, 7) > 0}), "token_mask"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


# -- masks ------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 0.99), st.floats(0.1, 5), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_as_many_tokens_stay_visible_as_were_asked_for(tokens, ratio, concentration, seed):
    def draw():
        return np.random.Generator(np.random.Philox(seed))

    masks = modality_masks(tokens, draw(), ratio=ratio, concentration=concentration)
    assert [len(mask) for mask in masks] == tokens
    assert sum(int((~mask).sum()) for mask in masks) == int(sum(tokens) * (1 - ratio))
    again = modality_masks(tokens, draw(), ratio=ratio, concentration=concentration)
    assert all(np.array_equal(a, b) for a, b in zip(masks, again, strict=True))
    shares = visible_shares(tokens, count := int(sum(tokens) * (1 - ratio)), draw(), concentration)
    assert math.isclose(shares.sum(), 1) and (shares * count <= np.array(tokens) + 1e-9).all()


def test_every_token_is_as_likely_to_stay():
    draw = np.random.default_rng(0)
    seen = sum(~np.concatenate(modality_masks([8, 8], draw, ratio=0.75)) for _ in range(2000)) / 2000
    assert np.abs(seen - 0.25).max() < 0.06


# -- the objective ----------------------------------------------------------------------------------------------------------------


def objective(**changes) -> MaskedModalities:
    torch.manual_seed(2)
    return MaskedModalities(build(), **{**DECODER, **changes})


def studies(rows, size=16) -> list[dict]:
    """Samples as a source has them, arrays among them; what a row lacks is not there."""
    whole = volumes(len(rows), size)
    return [
        {name: whole[name][i].numpy() if i % 2 else whole[name][i] for name, has in zip(NAMES, row, strict=True) if has}
        | {"id": str(i)}
        for i, row in enumerate(rows)
    ]


ROWS = [(1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 0, 0), (1, 1, 0, 1)]


def batch_of(rows, seed=0, **changes) -> dict[str, torch.Tensor]:
    return Collate(NAMES, 8, BMMAESettings(**{**DECODER, **changes}))(studies(rows), seed)


def test_collation():
    batch = batch_of(ROWS)
    assert set(batch) == {"t1", "t1ce", "flair", "t2", "present", "masks"}
    assert batch["present"].int().tolist() == [list(row) for row in ROWS]
    assert batch["masks"].shape == (4, 4, 8) and bool(batch["masks"][~batch["present"]].all())
    assert (~batch["masks"]).flatten(1).sum(1).tolist() == [8, 4, 2, 6]
    assert not batch["t2"][1:].any() and batch["t1"].dtype == torch.float32
    assert "t2" not in batch_of(ROWS[1:])
    other, same = batch_of(ROWS, seed=1), batch_of(ROWS)
    assert torch.equal(batch["masks"], same["masks"]) and not torch.equal(batch["masks"], other["masks"])
    assert torch.equal(batch["masks"][:2], batch_of(ROWS[:2])["masks"])  # a function of the sample's place
    collate = Collate(NAMES, 8, BMMAESettings())
    for bad in (studies(ROWS[:1]) + studies(ROWS[:1], 24), [{"id": "none"}, *studies(ROWS[:1])]):
        with pytest.raises(DataError, match="volumes of one batch"):
            collate(bad, 0)


@given(st.lists(subsets, min_size=1, max_size=3), st.booleans(), st.integers(0, 50))
@settings(deadline=None, max_examples=10)
def test_the_loss_is_the_formula_whatever_is_absent(rows, normalise, seed):
    """Modality by modality, sample by sample, by a plain loop; what is absent counts for nothing."""
    model = objective(normalise_targets=normalise).eval()
    batch = batch_of([tuple(map(int, row)) for row in rows], seed)
    for index, name in enumerate(NAMES):
        if name in batch:
            batch[name][~batch["present"][:, index]] = torch.nan
    out = model(batch, 0)
    total = 0.0
    for name in NAMES:
        errors = []
        for row in range(len(rows)):
            own = {n: batch[n][row : row + 1] for m, n in enumerate(NAMES) if batch["present"][row, m]}
            hidden = {n: batch["masks"][row : row + 1, NAMES.index(n)] for n in own}
            if name not in own:
                continue
            predicted = model.patches(own, token_mask=hidden)[0][name][0]
            target = patch_view(own[name], 8).flatten(4).flatten(1, 3)[0]
            if normalise:
                target = (target - target.mean(1, True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
            errors += (predicted - target).square().mean(1)[hidden[name][0]].tolist()
        expected = sum(errors) / max(1, len(errors))
        assert float(out[name]) == pytest.approx(expected, rel=1e-4)
        total += expected
    assert float(out["loss"].detach()) == pytest.approx(total, rel=1e-4)


def test_a_modality_without_hidden_tokens_gives_no_nan():
    model, batch = objective(), batch_of(ROWS)
    batch["masks"] &= ~batch["present"][..., None]
    out = model(batch, 0)
    assert float(out["loss"].detach()) == 0 and float(masked_error(torch.zeros(0, 5), torch.zeros(0, 5), normalise=True)) == 0


@pytest.mark.parametrize("changes", [{}, {"normalise_targets": True, "decay_all": False}])
def test_the_contract_of_objectives(changes):
    settings = replace(named("bm_mae_tiny", "pretrain").objective, **DECODER, **changes)
    settings.check()
    model = settings.build(build(), (), None)
    assert len(check_objective(model, studies(ROWS))) == 8
    spared = [name for group in model.param_groups() if group["wd_mult"] == 0 for name, _ in group["params"]]
    assert ("backbone.cls_token" in spared and "backbone.norm.weight" in spared) == bool(changes)
    with pytest.raises(ValueError, match="BM-MAE encoder"):
        settings.build(create_model("elastic_vit_tiny"), (), None)


def test_synthesis():
    model, given = objective().eval(), volumes(2, size=(16, 11, 16))
    made = model.reconstruct({"t1c": given["t1ce"], "t2": given["t2"]})
    assert set(made) == {"t1", "flair"} and made["t1"].shape == given["t1"].shape
    (name, flair), *rest = model.reconstruct(given, synthesize=("t2f",)).items()
    assert name == "flair" and not rest
    assert torch.equal(flair, model.reconstruct({name: given[name] for name in NAMES[:3]})["flair"])
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]) > 0
    mixed = model.reconstruct(
        {**given, "t2": given["t2"] * torch.tensor([1, torch.nan])[:, None, None, None, None]}, present=present
    )
    assert set(mixed) == {"t2"} and torch.equal(mixed["t2"][0], given["t2"][0])
    close(mixed["t2"][1:], model.reconstruct({name: given[name][1:] for name in ("t1", "t1ce", "flair")})["t2"])
    hidden = torch.arange(8)[None].expand(2, -1) > 3
    partly = model.reconstruct(given, token_mask={"t1": hidden})["t1"]
    assert torch.equal(partly[:, :, :8], given["t1"][:, :, :8]) and not torch.isclose(partly, given["t1"])[:, :, 8:].all()
    for call in (
        lambda: model.reconstruct({"t1": given["t1"]}, synthesize=["t1"]),
        lambda: model.reconstruct(given, synthesize=NAMES),
    ):
        with pytest.raises(ValueError, match="nothing left"):
            call()
    with pytest.raises(ValueError, match="normalise_targets"):
        objective(normalise_targets=True).reconstruct(given)


def test_the_published_schedule():
    optim, steps = named("bm_mae", "pretrain").optim, 1000
    rate = learning_rate(optim, steps, 6)
    wanted = {0: 0.02, 1: 0.04, 48: 0.98, 49: 0.997369, 50: 0.997261, 500: 0.75, 999: 0.250907}
    assert {step: rate(step) / optim.lr for step in wanted} == pytest.approx(wanted, abs=1e-6)
    usual = learning_rate(Optim(lr=1.0, lr_end=0.0, lr_scaling="none", warmup=0.1), 100, 1)
    assert usual(0) == 0 and usual(9) == usual(10) == 1


# -- runs -------------------------------------------------------------------------------------------------------------------------


class Memory:
    """Random volumes of 4 mm, of which each second study lacks some."""

    name, classes, labels, digest = "memory", (), None, "0"

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict:
        affine = np.diag([-4.0, -4.0, 4.0, 1.0])
        scans = volumes(1, 16, [name for name, has in zip(NAMES, ROWS[index], strict=True) if has], seed=index)
        return {"id": str(index), **{name: Scan(scan[0, 0], affine) for name, scan in scans.items()}}


def tiny(**changes):
    small = {name: value for name, value in SMALL.items() if name not in ("spacing", "orientation")}
    changes = {"model_args": small, "steps": 4, "batch": 4, "workers": 0, "save_every": 2, "threads": 1, **changes}
    return verbs.override(
        named("bm_mae_tiny", "pretrain"), {**{f"objective.{key}": value for key, value in DECODER.items()}, **changes}
    )


def test_a_run_that_is_stopped_ends_as_one_that_was_not(tmp_path):
    def quiet(line: str) -> None: ...

    recipe = tiny(**{"objective.decoder_dropout": 0.1})
    whole = verbs.pretrain(recipe, data=Memory(), out=tmp_path / "whole", say=quiet)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(entry["loss"]) for entry in log) and set(NAMES) <= set(log[-1])

    class Killed(Exception): ...

    def stop(line: str) -> None:
        if line.startswith("step 3/"):
            raise Killed

    with pytest.raises(Killed):
        verbs.pretrain(verbs.override(recipe, {"log_every": 1}), data=Memory(), out=tmp_path / "parts", say=stop)
    said: list[str] = []
    verbs.pretrain(recipe, data=Memory(), out=tmp_path / "parts", say=said.append)
    assert any("resuming at step 2" in line for line in said)
    assert weights(whole) == weights(tmp_path / "parts")

    encoder, full = load(whole / "export-full"), load_objective(whole / "export-full")
    given = volumes(1)
    assert torch.equal(encoder(given).pooled, load(whole / "export")(given).pooled)
    assert torch.equal(encoder(given).pooled, full.backbone(given).pooled) and not full.training
    assert set(full.reconstruct({"t1": given["t1"]})) == set(NAMES[1:])
    with pytest.raises(CheckpointError, match="no decoder"):
        load_objective(whole / "export")


def test_the_packaged_studies_train(tmp_path):
    out = verbs.pretrain(
        tiny(model_args={**tiny().model_args, "size": 48, "patch_size": 16}, steps=1), out=tmp_path / "run", say=str
    )
    spec = load(out / "export").preprocess["t1"]
    assert (spec.spacing, spec.orientation, spec.size) == ((4.0, 4.0, 4.0), "LPS", (48, 48, 48))


# -- the published files ----------------------------------------------------------------------------------------------------------


def test_a_published_file_becomes_a_checkpoint(tmp_path, capsys):
    model = MaskedModalities(create_model("bm_mae", **{**SMALL, "heads": 12}), **{**DECODER, "decoder_heads": 12}).eval()
    published = to_official(model.state_dict())
    assert from_official(published).keys() == model.state_dict().keys()
    torch.save(published, tmp_path / "bmmae.pth")
    main(["zoo", "convert", str(tmp_path / "bmmae.pth"), "--family", "bm_mae", "--out", str(tmp_path / "converted")])
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert 'license: "cc-by-nc-4.0"' in (tmp_path / "converted" / "README.md").read_text()
    given = volumes(1)
    assert torch.equal(load(tmp_path / "converted")(given).pooled, model.backbone(given).pooled)
    full = load_objective(tmp_path / "converted")
    assert torch.equal(full.reconstruct({"t2": given["t2"]})["t1"], model.reconstruct({"t2": given["t2"]})["t1"])

    encoder, report = read_official(tmp_path / "bmmae.pth")
    assert torch.equal(encoder(given).pooled, model.backbone(given).pooled)
    assert set(report.skipped) == {name for name in published if name.startswith("decoder.")}


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_the_encoder_of_a_fine_tuned_file(kind, tmp_path):
    subset = ("t1ce", "flair")
    encoder = create_model("bm_mae", **{**SMALL, "heads": 12}, modalities=subset, class_token=kind == "classification").eval()
    tensors = to_official({f"backbone.{name}": tensor for name, tensor in encoder.state_dict().items()})
    extra = {"output_layer.0.weight": torch.zeros(2, 24)}
    if kind == "segmentation":
        tensors, extra = {f"vit.{name}": tensor for name, tensor in tensors.items()}, {"decoder5.x": torch.zeros(1)}
    torch.save({**tensors, **extra}, tmp_path / "tuned.pth")
    read, report = read_official(tmp_path / "tuned.pth", objective=MaskedModalities)
    given = volumes(2, names=subset)
    assert read.modalities == subset and torch.equal(read(given).pooled, encoder(given).pooled)
    assert set(report.skipped) == set(extra) and not report.missing
    assert read.arguments["dropout"] == (0.1 if kind == "classification" else 0.0)


def test_files_that_are_none(tmp_path):
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    torch.save({"blocks.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    published = to_official(MaskedModalities(create_model("bm_mae", **{**SMALL, "heads": 12}), **DECODER).state_dict())
    torch.save({**published, "stray": torch.zeros(1), "blocks.0.stray": torch.zeros(1)}, tmp_path / "stray.pth")
    for name, word in (
        ("none", "no such file"),
        ("torn", "not a file of weights"),
        ("other", "published"),
        ("stray", "unexpected"),
    ):
        with pytest.raises(ValueError, match=word):
            read_official(tmp_path / f"{name}.pth")


def test_the_catalogue_says_whose_weights_they_are():
    (info,) = list_models("bm_mae.*")
    assert info.licence == "cc-by-nc-4.0" and not info.weights and info not in list_models(licence="permissive")
    with pytest.raises(HubError, match="CC BY-NC 4.0.*zoo convert"):
        load("bm_mae.brats21")


def test_names_are_those_of_the_data():
    from okavango.data.studies import SEQUENCES

    assert {name: (name, *others) for name, others in ALIASES.items()} == SEQUENCES
