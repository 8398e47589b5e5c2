"""Checkpoints: what is written, what is read back, and what happens when either goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from okavango.models.backbone import ARCHITECTURES, Backbone, FeatureInfo
from okavango.models.features import Features, Subnet, TextBatch
from okavango.models.preprocess import Image, Preprocess, Text
from okavango.zoo.checkpoint import (
    FILES,
    CheckpointError,
    load_checkpoint,
    probe_inputs,
    read_config,
    save_checkpoint,
    verify_checkpoint,
)
from okavango.zoo.loading import load_weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Toy(Backbone):
    """A convolution, a position embedding, and what is hard to load: a buffer that is not saved, a plain tensor, tied weights."""

    def __init__(self, width=8, side=4, tied=False, awkward=False, extra_widths=(1, 2)):
        super().__init__()
        assert isinstance(extra_widths, tuple)
        self.architecture, self.arguments = (
            "toy_for_tests",
            dict(width=width, side=side, tied=tied, awkward=awkward, extra_widths=extra_widths),
        )
        self.preprocess = Preprocess(image=Image(size=(2 * side, 2 * side)))
        self.feature_info = FeatureInfo(width, 0, (), ())
        self.conv = nn.Conv2d(3, width, 2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, width, side, side))
        self.first = nn.Linear(width, width)
        self.last = nn.Linear(width, width)
        if tied:
            self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        if awkward:
            self.register_buffer("scale", torch.full((width,), 3.0), persistent=False)
            self.shift = torch.ones(width)

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()):
        x = self.norm(self.last(self.first((self.conv(inputs["image"]) + self.pos_embed).flatten(2).mean(-1))))
        return Features(pooled=x * self.scale + self.shift if hasattr(self, "scale") else x)

    def resize_weights(self, name, tensor, shape):
        if name != "pos_embed" or tensor.ndim != 4 or tensor.shape[1] != shape[1]:
            return None
        return nn.functional.interpolate(tensor, shape[2:], mode="bilinear")


class Objective(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.teacher = nn.ModuleDict({"backbone": backbone, "projector": nn.Linear(8, 4)})


class Head(nn.Module):
    def __init__(self, backbone, arguments):
        super().__init__()
        self.backbone, self.classes = backbone, arguments["classes"]
        self.fc = nn.Linear(backbone.feature_info.channels, len(self.classes))


@pytest.fixture(autouse=True)
def _register_toy():
    ARCHITECTURES["toy_for_tests"] = Toy
    yield
    del ARCHITECTURES["toy_for_tests"]


@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = Toy()
    model.norm.running_mean.normal_()
    return model


def pooled(model, side=8):
    with torch.inference_mode():
        return model.eval()(image=torch.arange(3.0 * side * side).view(1, 3, side, side) / 100).pooled


# -- round trip ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"tied": True}, {"awkward": True}, {"extra_widths": (3, 4)}])
def test_round_trip_gives_the_same_outputs_bit_for_bit(tmp_path, arguments):
    model = Toy(**arguments)
    model.norm.running_mean.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = save_checkpoint(model, tmp_path / "a")
        loaded, report = load_checkpoint(folder)
    assert torch.equal(pooled(loaded), pooled(model))
    assert not loaded.training and loaded.load_report is report
    assert set(report.matched) == set(model.state_dict()) and not report.missing and not report.unexpected
    assert loaded.preprocess == model.preprocess and loaded.arguments == model.arguments
    assert all(not tensor.is_meta for tensor in loaded.state_dict().values())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    if arguments.get("tied"):
        assert loaded.first.weight is loaded.last.weight
    assert verify_checkpoint(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES) and len(list(tmp_path.iterdir())) == 1


def test_the_real_architecture_round_trips_also_as_an_extracted_subnet(tmp_path):
    from okavango.models.backbone import create_model

    supernet = create_model("elastic_vit_tiny", image_size=14, max_depth=2, max_width=64)
    small = supernet.extract(Subnet(64, 2))
    folder = save_checkpoint(small, tmp_path / "small", subnet=Subnet(64, 2), parent={"name": "supernet", "sha256": "0" * 64})
    images = torch.randn(2, 3, 14, 14)
    loaded, _ = load_checkpoint(folder)
    with torch.inference_mode():
        assert torch.equal(loaded(image=images).pooled, small(image=images).pooled)
    config = read_config(folder)
    assert (config["subnet"], config["parent"]["name"], config["architecture"]) == ("w64_d2", "supernet", "vit")


def test_equal_runs_write_equal_bytes(tmp_path, toy):
    first = save_checkpoint(toy, tmp_path / "a", card={"hours": 1})
    time.sleep(0.01)
    second = save_checkpoint(toy, tmp_path / "b", card={"hours": 2})
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    with safe_open(first / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_says_what_the_file_is(tmp_path, toy):
    folder = save_checkpoint(toy, tmp_path / "a", extra_config={"run": {"seed": 3}})
    config = json.loads((folder / "config.json").read_text())
    raw = (folder / "model.safetensors").read_bytes()
    assert config["weights"] == {
        "file": "model.safetensors",
        "sha256": hashlib.sha256(raw).hexdigest(),
        "bytes": len(raw),
        "dtype": "float32",
    }
    assert (config["format_version"], config["kind"], config["run"]) == (1, "backbone", {"seed": 3})
    output = toy.eval()(probe_inputs(config["probe"]["inputs"], config["probe"]["seed"])).pooled[0].detach()
    assert config["probe"]["output"]["head"] == pytest.approx(output[:8].tolist(), abs=1e-5)
    assert config["probe"]["output"]["norm"] == pytest.approx(float(output.norm()), rel=1e-5)


def test_dtype_in_the_file_and_in_the_model(tmp_path, toy):
    folder = save_checkpoint(toy, tmp_path / "a", dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert stored["conv.weight"].dtype == torch.bfloat16 and stored["norm.num_batches_tracked"].dtype == torch.int64
    loaded, _ = load_checkpoint(folder)
    assert loaded.conv.weight.dtype == torch.float32
    assert torch.equal(loaded.conv.weight, toy.conv.weight.bfloat16().float())
    assert load_checkpoint(folder, dtype=torch.float16)[0].conv.weight.dtype == torch.float16
    assert verify_checkpoint(folder) == []


def test_saving_and_loading_leave_the_caller_alone(tmp_path, toy):
    toy.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_checkpoint(save_checkpoint(toy, tmp_path / "a"))
    assert torch.equal(torch.rand(3), expected)
    tied = Toy(tied=True)
    torch.manual_seed(7)
    load_checkpoint(save_checkpoint(tied, tmp_path / "tied"))
    assert torch.equal(torch.rand(3), expected)
    assert toy.training


def test_loading_does_not_spend_time_on_random_weights(tmp_path, toy, monkeypatch):
    folder = save_checkpoint(toy, tmp_path / "a")
    built_on = []
    original = Toy.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        built_on.append(self.conv.weight.device.type)

    monkeypatch.setattr(Toy, "__init__", spy)
    load_checkpoint(folder)
    assert built_on == ["meta"]


# -- objectives and heads -----------------------------------------------------------------------------------------------------


def test_an_objective_gives_its_backbone_and_reloads_whole(tmp_path, toy):
    objective = Objective(toy)
    folder = save_checkpoint(objective, tmp_path / "full", kind="objective", backbone_prefix="teacher.backbone.")
    assert set(load_file(folder / "model.safetensors")) == set(objective.state_dict())
    backbone, report = load_checkpoint(folder)
    assert isinstance(backbone, Toy) and torch.equal(pooled(backbone), pooled(toy))
    assert report.skipped == dict.fromkeys(["teacher.projector.bias", "teacher.projector.weight"], "not part of the backbone")
    assert report.renamed["teacher.backbone.conv.weight"] == "conv.weight"
    again = Objective(Toy())
    _, report = load_checkpoint(folder, model=again)
    assert not report.skipped and not report.renamed
    assert torch.equal(again.teacher["projector"].weight, objective.teacher["projector"].weight)
    into = Toy()
    load_checkpoint(folder, model=into)
    assert torch.equal(into.conv.weight, toy.conv.weight)
    assert verify_checkpoint(folder) == []


def test_only_heads_of_the_allow_list_are_built(tmp_path, toy):
    head = Head(toy, {"classes": ("cat", "dog")})
    entry = {"entry": "tests:Head", "arguments": {"classes": ("cat", "dog")}}
    folder = save_checkpoint(head, tmp_path / "h", kind="head", head=entry, backbone_prefix="backbone.")
    loaded, report = load_checkpoint(folder, heads={"tests:Head": Head})
    assert isinstance(loaded, Head) and loaded.classes == ("cat", "dog") and torch.equal(loaded.fc.weight, head.fc.weight)
    assert not report.skipped
    with pytest.raises(CheckpointError, match="'tests:Head' is not allowed"):
        load_checkpoint(folder, heads={"os:system": print})
    backbone, report = load_checkpoint(folder)
    assert isinstance(backbone, Toy) and set(report.skipped) == {"fc.weight", "fc.bias"}


# -- load_weights -------------------------------------------------------------------------------------------------------------


def test_report_names_every_tensor(toy):
    tensors = dict(Toy(side=6).state_dict())
    tensors["stem.weight"] = tensors.pop("conv.weight")
    tensors["decoder.a"], tensors["stranger"] = torch.zeros(1), torch.zeros(1)
    del tensors["first.bias"]
    tensors["last.weight"] = torch.zeros(5, 5)
    kept = toy.last.weight.clone()
    rename, skip = {"stem.weight": "conv.weight"}, {"decoder.*": "not needed"}
    report = load_weights(toy, tensors, rename=rename, skip=skip, strict=False)
    assert report.renamed == rename
    assert report.resized == {"pos_embed": ((1, 8, 6, 6), (1, 8, 4, 4))}
    assert report.skipped == {"decoder.a": "not needed", "last.weight": "shape [5, 5] does not fit [8, 8]"}
    assert set(report.missing) == {"first.bias", "last.weight"} and report.unexpected == ("stranger",)
    assert torch.equal(toy.last.weight, kept) and torch.equal(toy.conv.weight, tensors["stem.weight"])
    wanted = nn.functional.interpolate(tensors["pos_embed"], (4, 4), mode="bilinear")
    assert torch.equal(toy.pos_embed, wanted)
    text = str(report)
    for word in ("stem.weight -> conv.weight", "pos_embed: [1, 8, 6, 6] -> [1, 8, 4, 4]", "not needed", "first.bias", "stranger"):
        assert word in text


def test_strict_raises_in_one_line_and_changes_nothing(toy):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in toy.state_dict().items()}
    tensors |= {f"extra{i}": torch.zeros(1) for i in range(9)}
    del tensors["conv.bias"]
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(toy, tensors)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    for word in ("Toy", "1 missing (conv.bias)", "9 unexpected (extra0, extra1, extra2", "strict=False"):
        assert word in message
    assert all(torch.equal(before[name], tensor) for name, tensor in toy.state_dict().items())
    with pytest.raises(CheckpointError, match="two tensors of the file go to 'weight'"):
        load_weights(nn.Linear(1, 1), {"weight": torch.ones(1, 1), "w": torch.ones(1, 1)}, rename={"w": "weight"}, strict=False)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(["weight", "bias", "a", "b", "c"])), st.sets(st.sampled_from(["a", "weight"])))
def test_every_name_stands_in_exactly_one_place(names, skipped):
    model = nn.Linear(2, 2)
    shapes = {"weight": (2, 2), "bias": (2,)}
    tensors = {name: torch.ones(shapes.get(name, (1,))) for name in sorted(names)}
    report = load_weights(model, tensors, skip=dict.fromkeys(skipped, "why"), strict=False)
    places = [*report.matched, *report.skipped, *report.unexpected]
    assert sorted(places) == sorted(names)
    assert set(report.matched) | set(report.missing) == {"weight", "bias"}


def test_non_strict_load_fills_what_is_missing_with_initial_values(tmp_path, toy):
    folder = save_checkpoint(toy, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    del tensors["conv.weight"]
    _reseal(folder, tensors)
    with pytest.raises(CheckpointError, match=r"a: weights do not fit Toy: 1 missing \(conv.weight\)"):
        load_checkpoint(folder)
    loaded, report = load_checkpoint(folder, strict=False)
    assert report.missing == ("conv.weight",) and loaded.conv.weight.std() > 0.01
    assert any("1 missing" in problem for problem in verify_checkpoint(folder))


# -- damage -------------------------------------------------------------------------------------------------------------------


def _reseal(folder, tensors):
    """Other weights under a config that agrees with them."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    raw = (folder / "model.safetensors").read_bytes()
    config["weights"] |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    (folder / "config.json").write_text(json.dumps(config))


def _edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("where", [0, 9, -1])
def test_one_flipped_bit_is_noticed(tmp_path, toy, where):
    folder = save_checkpoint(toy, tmp_path / "a")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[where] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="sha256 .* config.json says"):
        load_checkpoint(folder)
    assert any("sha256" in problem for problem in verify_checkpoint(folder))


def test_damage_is_told_in_one_line(tmp_path, toy):
    folder = save_checkpoint(toy, tmp_path / "a")
    good = (folder / "config.json").read_text()
    cases = [
        ({"format_version": 2}, "format_version 2"),
        ({"kind": "soup"}, "kind 'soup'"),
        ({"architecture": 3}, "'architecture' is 3"),
        ({"architecture": "toy_for_test"}, "did you mean 'toy_for_tests'"),
        ({"architecture": "timm/resnet10t", "arguments": {"pretrained": "evil.pth"}}, "arguments name 'pretrained'"),
        ({"arguments": {"wide": 3}}, "'toy_for_tests' refuses the stored arguments"),
        ({"weights": {"file": "../model.safetensors", "sha256": "0" * 64, "bytes": 1}}, "expected file 'model.safetensors'"),
        ({"preprocess": {"version": 1, "specs": {"image": {"kind": "hologram"}}}}, "unknown kind 'hologram'"),
    ]
    for changes, message in cases:
        _edit(folder, **changes)
        problems = verify_checkpoint(folder)
        assert len(problems) == 1 and message in problems[0] and "\n" not in problems[0], (changes, problems)
        (folder / "config.json").write_text(good)
    for text in ("", "{", "[]", "null"):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError):
            read_config(folder)
        assert verify_checkpoint(folder)
    (folder / "config.json").write_text(good)
    assert verify_checkpoint(folder) == []


def test_verify_finds_missing_files_and_another_answer_to_the_probe(tmp_path, toy):
    folder = save_checkpoint(toy, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    _reseal(folder, {**tensors, "last.weight": tensors["last.weight"] * 1.01})
    (problem,) = verify_checkpoint(folder)
    assert "probe: the output differs by" in problem
    _reseal(folder, {**tensors, "last.weight": tensors["last.weight"] * (1 + 1e-6)})
    assert verify_checkpoint(folder) == []
    _reseal(folder, {**tensors, "last.weight": tensors["last.weight"] * float("nan")})
    assert "probe" in verify_checkpoint(folder)[0]
    for name in FILES:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert any(f"{name}: the file is missing" in problem for problem in verify_checkpoint(folder))
        (folder / name).write_bytes(content)
    assert "no such folder" in verify_checkpoint(tmp_path / "none")[0]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, toy):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(CheckpointError, match="holds files but no checkpoint"):
        save_checkpoint(toy, tmp_path / "photos")
    with pytest.raises(CheckpointError, match="not a Backbone"):
        save_checkpoint(Objective(toy), tmp_path / "a", kind="objective")
    with pytest.raises(CheckpointError, match="no submodule 'student'"):
        save_checkpoint(Objective(toy), tmp_path / "a", kind="objective", backbone_prefix="student.")
    with pytest.raises(CheckpointError, match="kind 'pickle'"):
        save_checkpoint(toy, tmp_path / "a", kind="pickle")
    with pytest.raises(CheckpointError, match="'weights' is a field of its own"):
        save_checkpoint(toy, tmp_path / "a", extra_config={"weights": 1})
    toy.arguments["width"] = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="not plain JSON"):
        save_checkpoint(toy, tmp_path / "a")
    toy.arguments["width"], toy.architecture = 8, "nobody_registered_this"
    with pytest.raises(ValueError, match="unknown architecture"):
        save_checkpoint(toy, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_an_older_checkpoint_is_replaced(tmp_path, toy):
    save_checkpoint(toy, tmp_path / "a")
    with torch.no_grad():
        toy.conv.weight.add_(1)
    save_checkpoint(toy, tmp_path / "a")
    assert torch.equal(load_checkpoint(tmp_path / "a")[0].conv.weight, toy.conv.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="notes.txt"):
        save_checkpoint(toy, tmp_path / "a")


def _run(code: str, *arguments):
    """Run code in a process of its own, with this module as `t`."""
    script = f"import sys; sys.path[:0] = [{ROOT!r}, {os.path.dirname(__file__)!r}]\nimport torch; torch.set_num_threads(1)\n"
    script += "import test_checkpoint as t\nt.ARCHITECTURES['toy_for_tests'] = t.Toy\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_killed_while_saving_leaves_a_whole_checkpoint_or_none(tmp_path, toy):
    code = """
        import os, signal, time
        from okavango.zoo import checkpoint

        folder, first = sys.argv[1:]
        for delay in (0.0, 0.004, 0.011, 0.02, 0.03, 0.04, 0.05):
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                model = t.Toy(width=400)
                while True:
                    model.conv.weight.data.add_(1)
                    t.save_checkpoint(model, folder)
                    os.write(writer, b"x")
            os.read(reader, 1)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            print("gap" if not os.path.exists(folder) else "; ".join(t.verify_checkpoint(folder)) or "sound")
        child = os.fork()
        if not child:
            checkpoint.replace_folder = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            t.save_checkpoint(t.Toy(), first)
        print("killed" if os.waitpid(child, 0)[1] == 9 else "not killed")
    """
    done = _run(code, tmp_path / "a", tmp_path / "first")
    *rounds, last = done.stdout.split("\n")[:-1]
    assert len(rounds) == 7 and last == "killed", done.stderr
    # a gap is a kill between the two renames of a replacement, when both versions lie beside
    assert set(rounds) <= {"sound", "gap"} and "sound" in rounds, rounds
    assert not (tmp_path / "first").exists() and list(tmp_path.glob(".first.saving-*"))
    save_checkpoint(toy, tmp_path / "first")
    assert not list(tmp_path.glob(".first.saving-*"))  # the next save sweeps up


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            t.save_checkpoint(t.Toy(width=400), sys.argv[1])
        except t.CheckpointError as error:
            print(error)
    """
    done = _run(code, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "cannot be written" in done.stdout and "free some space" in done.stdout
    assert list(tmp_path.iterdir()) == []


# -- card and probe -----------------------------------------------------------------------------------------------------------


def test_the_card_has_front_matter_that_hubs_read(tmp_path, toy):
    card = {
        "title": "Toy: a name with a colon",
        "licence": "apache-2.0",
        "tags": ["test", "it's"],
        "recipe": "poa|tiny",
        "seed": 0,
        "results": {"knn": 0.81},
        "limitations": "Very many words. " * 10,
        "data": ["one", "two"],
    }
    folder = save_checkpoint(toy, tmp_path / "a", card=card)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "apache-2.0" and front["library_name"] == "okavango"
    assert front["tags"] == ["okavango", "backbone", "image", "test", "it's"]
    for line in ("# Toy: a name with a colon", "| recipe | poa\\|tiny |", "| seed | 0 |", "## Results", "| knn | 0.81 |", "- two"):
        assert line in body.splitlines()
    assert read_config(folder)["weights"]["sha256"] in body
    (folder / "README.md").write_text("no front matter")
    assert "front matter" in verify_checkpoint(folder)[0]


def test_probe_inputs_are_the_same_everywhere():
    shapes = {"image": {"shape": [1, 2, 2, 2]}, "text": {"shape": [2, 5], "vocabulary": 7}}
    first, again, other = probe_inputs(shapes), probe_inputs(shapes), probe_inputs(shapes, seed=1)
    raw = hashlib.shake_128(b"0:image").digest(32)
    wanted = [int.from_bytes(raw[i : i + 4], "little") / 2**30 - 2 for i in range(0, 32, 4)]
    assert first["image"].flatten().tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], other["image"])
    assert isinstance(first["text"], TextBatch) and first["text"].ids.max() < 7 and first["text"].mask.all()


def test_texts_can_be_probed(tmp_path):
    class Words(Backbone):
        def __init__(self):
            super().__init__()
            self.architecture, self.arguments = "words_for_tests", {}
            self.preprocess = Preprocess(text=Text(tokenizer="hf/none", vocabulary=11, length=4))
            self.feature_info = FeatureInfo(3, 0, (), ())
            self.table = nn.Embedding(11, 3)

        def forward(self, inputs, **_):
            return Features(tokens={"text": self.table(inputs["text"].ids)})

    ARCHITECTURES["words_for_tests"] = Words
    try:
        folder = save_checkpoint(Words(), tmp_path / "words")
        assert verify_checkpoint(folder) == [] and read_config(folder)["probe"]["output"]["size"] == 3
    finally:
        del ARCHITECTURES["words_for_tests"]
