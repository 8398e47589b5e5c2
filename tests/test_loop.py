"""The loop's smaller promises: accumulation, averages, NaN, full disk, bad samples, precision, curves, evaluation during a run."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, command, environ, run, weights
from PIL import Image
from safetensors.torch import load_file

from okavango import verbs
from okavango.data.sources import Arrays, BadSample
from okavango.models.backbone import create_model
from okavango.pretrain import loop, state
from okavango.recipes import named


def tiny(**changes):
    """`poa_tiny`, smaller still and without worker processes."""
    return verbs.override(named("poa_tiny", "pretrain"), {"steps": 4, "batch": 8, "workers": 0, "save_every": 2, **changes})


def pictures(count: int = 40, size: int = 28) -> Arrays:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size), generator=draw, dtype=torch.uint8).numpy()
    return Arrays(images, [i % 4 for i in range(count)])


def quiet(line: str) -> None:
    """Nothing is printed."""


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_run_folder_has_what_is_promised(tmp_path):
    out = verbs.pretrain(tiny(trackers=("tensorboard",)), data=pictures(), out=tmp_path / "run", say=quiet)
    assert {path.name for path in out.iterdir()} >= {"recipe.json", "log.jsonl", "state", "export", "export-full", "curves.png"}
    assert Image.open(out / "curves.png").size[0] > 300
    assert list(out.rglob("events.out.tfevents*"))
    assert not list(out.rglob("*.pkl")) and not list(out.rglob("*.pt"))
    assert [path.name for path in state.states(out / "state")] == ["step-00000002", "step-00000004"]
    assert [entry["step"] for entry in log_of(out)] == [0, 1, 2, 3]


def test_equal_runs_are_equal_and_other_seeds_are_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        verbs.pretrain(tiny(seed=seed), data=pictures(), out=tmp_path / name, say=quiet)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_accumulation_sees_every_sample_once(tmp_path):
    recipe = tiny(accumulate=2, steps=2)
    verbs.pretrain(recipe, data=pictures(), out=tmp_path / "run", say=quiet)
    assert len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"activation_checkpointing": True}, {"objective.centering": "softmax"}])
def test_switches_train(tmp_path, changes):
    out = verbs.pretrain(tiny(**changes), data=pictures(), out=tmp_path / "run", say=quiet)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log_of(out))


@pytest.mark.parametrize(
    "text, emulated",
    [
        ("model name\t: x\nflags\t\t: fpu avx2 avx512f avx512bw\n\nflags\t\t: fpu avx2\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("flags\t\t: fpu avx512_bf16x\n", True),
        ("BogoMIPS\t: 50\nFeatures\t: fp asimd sve\n", True),
        ("BogoMIPS\t: 50\nFeatures\t: fp asimd i8mm bf16\n", False),
        ("cpu\t: POWER9\n", None),
        ("", None),
    ],
)
def test_processors_that_emulate_bf16_are_told_by_their_abilities(tmp_path, text, emulated):
    (tmp_path / "cpuinfo").write_text(text)
    assert loop.emulates_bf16(tmp_path / "cpuinfo") is emulated


def test_nothing_is_claimed_where_the_system_lists_no_abilities(tmp_path):
    assert loop.emulates_bf16(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "precision, emulated, warned", [("bf16", True, 1), ("bf16", False, 0), ("bf16", None, 0), ("fp32", True, 0)]
)
def test_a_run_says_first_that_bf16_is_emulated(tmp_path, monkeypatch, precision, emulated, warned):
    monkeypatch.setattr(loop, "emulates_bf16", lambda: emulated)
    said = []
    verbs.pretrain(tiny(precision=precision, steps=1), data=pictures(), out=tmp_path / "run", say=said.append)
    assert [line for line in said if "emulates" in line] == [line for line in said[:1] if warned]
    assert not warned or "--precision fp32" in said[0]


def test_activation_checkpointing_changes_nothing(tmp_path):
    recipe = tiny(model_args={**tiny().model_args, "drop_path": 0.2})
    verbs.pretrain(recipe, data=pictures(), out=tmp_path / "a", say=quiet)
    verbs.pretrain(verbs.override(recipe, {"activation_checkpointing": True}), data=pictures(), out=tmp_path / "b", say=quiet)
    a, b = (load_file(tmp_path / name / "export" / "model.safetensors") for name in "ab")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_average_of_weights_is_what_is_exported(tmp_path):
    start = verbs.pretrain(tiny(), data=pictures(), out=tmp_path / "run", say=quiet) / "export"
    recipe = named("classify", "finetune")
    changes = {"start": str(start), "steps": 6, "batch": 8, "workers": 0, "trackers": (), "optim.ema": 0.9}
    out = verbs.finetune(recipe, data=pictures(), out=tmp_path / "ft", say=quiet, **changes)
    exported = load_file(out / "export" / "model.safetensors")
    average = load_file(out / "state" / "step-00000006" / "ema.safetensors")
    trained = load_file(out / "state" / "step-00000006" / "objective.safetensors")
    assert all(torch.equal(exported[name], average[name]) for name in average)
    assert any(not torch.equal(trained[name], average[name]) for name in average)
    predicted = verbs.predict(str(out / "export"), pictures(), say=quiet)
    assert len(predicted) == 40
    _, best = verbs.predict(str(out / "export"), pictures(), top=4, say=quiet)[0]
    assert sum(probability for _, probability in best) == pytest.approx(1)
    lines: list[str] = []
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "torn.jpg").write_bytes(b"\xff\xd8 and no more")
    with pytest.raises(ValueError, match="none of the 1 pictures of mixed"):
        verbs.predict(str(out / "export"), str(tmp_path / "mixed"), say=lines.append)
    Image.fromarray(pictures()[0]["image"].permute(1, 2, 0).numpy().squeeze()).save(tmp_path / "mixed" / "whole.png")
    assert [id for id, _ in verbs.predict(str(out / "export"), str(tmp_path / "mixed"), batch=1, say=lines.append)] == ["whole.png"]
    assert lines[0] == lines[1] and lines[0].startswith("left out torn.jpg: ") and ".cpp" not in lines[0]
    verbs.finetune(recipe, data=pictures(), out=tmp_path / "ft", say=lines.append, **changes)
    assert lines[-2:] == ["all 6 steps are made already", f"exported: {tmp_path / 'ft' / 'export'}"]


def test_run_starts_from_either_export(tmp_path):
    first = verbs.pretrain(tiny(), data=pictures(), out=tmp_path / "run", say=quiet)
    for kind in ("export", "export-full"):
        backbone = verbs.starting_backbone(tiny(start=str(first / kind)))
        expected = load_file(first / "export" / "model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())


def test_an_uncaught_mistake_ends_the_program(tmp_path):
    """A traceback keeps the loop's frames alive, and with them the workers; the interpreter must not wait for them at its end."""
    script = tmp_path / "fails.py"
    script.write_text(
        "from okavango import verbs\n"
        "from okavango.pretrain.objectives.poa import POA\n"
        "def fail(self, step):\n"
        "    raise KeyError('as planned')\n"
        "POA.after_step = fail\n"
        f"verbs.pretrain('poa_tiny', out={str(tmp_path / 'run')!r}, workers=2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], env=environ(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "as planned" in done.stderr


def test_not_finite_is_caught_saved_and_replayed(tmp_path, monkeypatch):
    from okavango.pretrain.objectives.poa import POA

    forward = POA.forward

    def poisoned(self, batch, step):
        losses = forward(self, batch, step)
        return {**losses, "loss": losses["loss"] * (float("nan") if step == 2 else 1.0)}

    monkeypatch.setattr(POA, "forward", poisoned)
    with pytest.raises(loop.RunError, match="step 2: not finite: loss"):
        verbs.pretrain(tiny(), data=pictures(), out=tmp_path / "run", say=quiet)
    (folder,) = (tmp_path / "run").glob("not-finite-*")
    recipe = tiny()
    objective = recipe.objective.build(create_model(recipe.model, **recipe.model_args), (), recipe.run)
    assert torch.isnan(loop.replay(objective, folder)["loss"])
    monkeypatch.undo()
    healed = loop.replay(objective, folder)
    out = verbs.pretrain(tiny(), data=pictures(), out=tmp_path / "other", say=quiet)
    assert float(healed["loss"].detach()) == pytest.approx(log_of(out)[2]["loss"], rel=1e-6)


class Torn:
    """A source in which some pictures cannot be read."""

    def __init__(self, source, bad):
        self.source, self.bad = source, set(bad)
        self.name, self.classes, self.labels, self.digest = "torn", source.classes, source.labels, source.digest

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"picture {index}", "torn")
        return self.source[index]


def test_bad_samples_are_named_replaced_and_limited(tmp_path):
    lines: list[str] = []
    source = Torn(pictures(), [3])
    out = verbs.pretrain(tiny(steps=10, bad_share=0.5), data=source, out=tmp_path / "run", say=lines.append)
    named_lines = [line for line in lines if "bad sample picture 3" in line]
    assert named_lines and log_of(out)[-1]["bad_samples"] == len(named_lines)
    again = verbs.pretrain(tiny(steps=10, bad_share=0.5), data=source, out=tmp_path / "again", say=quiet)
    assert weights(out) == weights(again)
    with pytest.raises(loop.RunError, match="could not be read"):
        verbs.pretrain(tiny(steps=40), data=Torn(pictures(), [3, 5]), out=tmp_path / "stopped", say=quiet)


def test_full_disk_is_one_line_and_old_states_stay(tmp_path):
    """A real limit on the size of files, set in the process that runs."""
    program = (
        "import resource, sys; from okavango.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY)); import signal; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.exit(main(sys.argv[2:]))"
    )
    arguments = [*TINY, "--workers", "0", "--out", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-c", program, "300000", *map(str, arguments)], env=environ(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not write the state of step 3" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "run" / "state").iterdir())
    run(*arguments)
    assert (tmp_path / "run" / "export" / "config.json").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_preflight_names_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(loop.RunError, match="preflight failed:\n.* MiB free"):
        verbs.pretrain(tiny(), data=pictures(), out=tmp_path / "run", say=quiet)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_first_step_that_fills_memory_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_total_memory", lambda: 2**20)
    with pytest.raises(loop.RunError, match=r"the first step took .* GiB of 0\.0 GiB of memory; lower --batch"):
        verbs.pretrain(tiny(save_every=1), data=pictures(), out=tmp_path / "run", say=quiet)
    assert not list((tmp_path / "run").glob("state/step-*")) and not (tmp_path / "run" / "export").exists()


def test_evaluation_during_a_run_does_not_change_it(tmp_path):
    verbs.pretrain(tiny(eval_every=1), data=pictures(), out=tmp_path / "a", say=quiet)
    verbs.pretrain(tiny(), data=pictures(), out=tmp_path / "b", say=quiet)
    assert any("backbone_knn_accuracy" in entry for entry in log_of(tmp_path / "a"))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_folder_of_any_pictures(tmp_path):
    """Nested and flat, grey and colour, large and small."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    kinds = [("RGB", (90, 40)), ("L", (20, 33)), ("RGBA", (15, 15)), ("P", (300, 200)), ("RGB", (28, 28))]
    for number, (mode, size) in enumerate(kinds):
        where = [folder, folder / "deep", folder / "deep" / "er"][number % 3]
        Image.new("RGB", size, (40 * number, 90, 200)).convert(mode).save(where / f"{number}.png")
    done = run(*TINY, "--steps", "2", "--workers", "0", "--data", folder, "--out", tmp_path / "run")
    assert "5 samples" in done.stdout


def test_override_names_the_nearest_setting():
    with pytest.raises(ValueError, match="unknown setting 'lern'"):
        verbs.override(tiny(), {"optim.lern": 1.0})
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        verbs.override(tiny(), {"stps": 1})
    assert verbs.override(tiny(), {"objective.crops.locals": 3}).objective.crops.locals == 3
    assert replace(tiny(), name="x").name == "x"


def test_settings_that_an_older_state_does_not_know():
    recipe = named("poa_tiny", "pretrain")
    stored = json.loads(json.dumps(loop._essence(recipe)))
    assert loop._differences(stored, recipe) == []
    del stored["objective"]["crops"]["zoom_out"]  # it was written before there was such a thing
    assert loop._differences(stored, recipe) == ["objective.crops.zoom_out"]
    plain = verbs.override(recipe, {"objective.crops.zoom_out": (0.0, 1.0), "save_every": 3})
    assert loop._differences(stored, plain) == []
    assert loop._differences({**stored, "moon": 1}, verbs.override(plain, {"steps": 7, "optim.lr": 1.0})) == [
        "moon",
        "optim.lr",
        "run.steps",
    ]


def test_interrupt_is_one_line(tmp_path):
    import signal

    process = subprocess.Popen(
        command(*TINY, "--steps", "500", "--out", tmp_path / "run"),
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "okavango: interrupted" in errors.splitlines()  # a loader that dies may have a word after it


@pytest.mark.slow
def test_compiled_blocks_train_the_same(tmp_path):
    """Needs a C++ compiler."""
    recipe = verbs.override(named("dinov2_tiny", "pretrain"), {"steps": 3, "batch": 8, "workers": 0})
    verbs.pretrain(recipe, data=pictures(), out=tmp_path / "plain", say=quiet)
    verbs.pretrain(recipe, data=pictures(), out=tmp_path / "compiled", say=quiet, compile=True)
    plain, compiled = ([entry["loss"] for entry in log_of(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_another_architecture_drops_the_arguments_of_the_first(tmp_path):
    recipe = named("poa_tiny", "pretrain")
    assert recipe.model_args
    assert verbs.override(recipe, {"model": "elastic_vit_small"}).model_args == {}
    assert verbs.override(recipe, {"model": "elastic_vit_small", "model_args": {"max_depth": 7}}).model_args == {"max_depth": 7}
    done = run("pretrain", "poa_tiny", "--model", "vit", "--steps", "1", "--out", tmp_path / "run", check=False)
    assert done.returncode == 1 and "vit is not elastic" in done.stderr, "built, without min_width and the like"
