"""Makes the files of this folder: a checkpoint, a state and a file of records of format version 1, curves, and the list of options.

    PYTHONPATH=. python tests/golden/make.py                      # all that is missing
    PYTHONPATH=. python tests/golden/make.py flags curves         # these again

The checkpoint, the state and the records are for ever: later versions must read them, so they are never made again after a release.
`curves` and `flags` are made again when a change of numbers or options is meant. Equal runs on one machine make equal files:
weights and pictures are a pure function of their names (SHAKE-128), and nothing here holds a time or a path.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent
STATE_STEP, STATE_STEPS = 2, 4  # the run of the state: saved after step 2 of 4
RATES = ("samples_per_second", "data_wait")  # what is logged of the clock
ARGUMENTS = {
    "image_size": 28,
    "patch_size": 7,
    "min_width": 8,
    "max_width": 16,
    "width_step": 8,
    "min_depth": 1,
    "max_depth": 2,
    "head_dim": 8,
}


def write(name: str, value: Any) -> None:
    """One JSON file of expectations."""
    path = GOLDEN / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def environment() -> dict[str, str]:
    """What floating-point sums depend on."""
    import torch

    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def hashes(folder: Path) -> dict[str, str]:
    """Path -> sha256 of all files below a folder (or of one file)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    return {path.relative_to(GOLDEN).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def picture():
    """A grey gradient with a bright corner, uint8 (3, 30, 40): what the checkpoint's preprocess is tried on."""
    import numpy as np
    import torch

    rows, columns = np.mgrid[0:30, 0:40]
    pixels = np.stack([rows * 8, columns * 6, (rows + columns) * 3]).astype(np.uint8)
    pixels[:, :8, :8] = 250
    return torch.from_numpy(pixels)


# -- checkpoint -------------------------------------------------------------------------------------------------------------


def build_checkpoint_model():
    """A very small elastic ViT whose weights follow from their names."""
    import torch

    from okavango.models.backbone import create_model
    from okavango.zoo.checkpoint import probe_inputs

    model = create_model("elastic_vit", **ARGUMENTS).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            values = probe_inputs({name: {"shape": [*tensor.shape]}}, seed=1)[name]
            scale_like = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            tensor.copy_(0.05 * values + (1.0 if scale_like else 0.0))
    return model


def observe_checkpoint(model) -> dict[str, Any]:
    """Everything about a loaded checkpoint that must stay as it is."""
    import torch

    from okavango.models.features import Subnet
    from okavango.zoo.checkpoint import probe_inputs, probe_shapes

    inputs = probe_inputs(probe_shapes(model.preprocess, 2))
    with torch.inference_mode():
        whole = model(inputs, layers=(0, 1))
        sliced = {str(subnet): model(inputs, subnet=subnet).pooled for subnet in model.list_subnets()}
        extracted = model.extract(Subnet(8, 1))(inputs).pooled
        prepared = model.preprocess(image=[picture()])["image"]
        pooled = model(image=prepared).pooled
    numbers = {
        "pooled": whole.pooled,
        "tokens": whole.tokens["image"][:, ::5],
        "layer 0": whole.layers[0].tokens["image"][:, ::5],
        "layer 1": whole.layers[1].tokens["image"][:, ::5],
        **{f"pooled of {name}": value for name, value in sliced.items()},
        "pooled of extracted w8_d1": extracted,
        "prepared picture": prepared[:, :, ::7, ::7],
        "pooled of the picture": pooled,
    }
    return {
        "architecture": model.architecture,
        "subnets": [str(subnet) for subnet in model.list_subnets()],
        "grid": list(whole.grid["image"]),
        "numbers": {name: value.tolist() for name, value in numbers.items()},
    }


def make_checkpoint() -> None:
    """`checkpoint/` and what it answers, `checkpoint.json`."""
    from okavango.zoo.checkpoint import save_checkpoint

    folder = GOLDEN / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    model = build_checkpoint_model()
    parent = {"name": "none", "sha256": "0" * 64}
    save_checkpoint(model, folder, parent=parent, card={"licence": "apache-2.0", "purpose": "read by all later versions"})
    config = json.loads((folder / "config.json").read_text())
    config["okavango"] = "0.1.0"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write("checkpoint", {"files": hashes(folder), **observe_checkpoint(model)})


# -- state ------------------------------------------------------------------------------------------------------------------


def revive(template: Any, stored: dict[str, Any]) -> Any:
    """A copy of a settings dataclass with the values that JSON holds."""
    from okavango.pretrain.settings import Run

    known = {field.name for field in fields(template)}
    changes = {}
    for name, value in stored.items():
        if name not in known:
            raise KeyError(f"{type(template).__name__} has lost the field {name!r}: states of version 1 need it")
        if is_dataclass(getattr(template, name)):
            value = revive(getattr(template, name), value)
        changes[name] = tuple(value) if isinstance(value, list) else value
    # What came later is off by default, whatever today's recipe says; of the loop, only what decides the result is stored.
    later = {field.name: field.default for field in fields(template) if field.name not in stored and field.default is not MISSING}
    if isinstance(template, Run):
        later = {}
    return replace(template, **later, **changes)


def state_recipe():
    """`poa_tiny`, smaller still: 10,000 parameters."""
    from okavango.recipes import named

    recipe = named("poa_tiny", "pretrain")
    objective = replace(recipe.objective, prototypes=(8, 12), head_hidden=8, head_bottleneck=8)
    run = replace(recipe.run, steps=STATE_STEPS, batch=4, save_every=STATE_STEP, keep=9, workers=0, threads=1)
    return replace(recipe, model="elastic_vit", model_args=dict(ARGUMENTS), objective=objective, run=run)


def read_log(out: Path) -> list[dict[str, float]]:
    """Lines of log.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in RATES} for line in lines]


def observe_tensors(tensors) -> dict[str, Any]:
    """Per tensor its shape, its dtype and its norm."""
    return {n: [list(t.shape), str(t.dtype).removeprefix("torch."), float(t.double().norm())] for n, t in sorted(tensors.items())}


def make_state() -> None:
    """`state/step-00000002/` and how its run ended, `state.json`."""
    from okavango import verbs
    from okavango.pretrain.state import State

    with tempfile.TemporaryDirectory() as folder:
        out = verbs.pretrain(state_recipe(), out=Path(folder) / "run", say=lambda line: None)
        name = f"step-{STATE_STEP:08d}"
        shutil.rmtree(GOLDEN / "state", ignore_errors=True)
        shutil.copytree(out / "state" / name, GOLDEN / "state" / name)
        log = read_log(out)
    folder = GOLDEN / "state" / name
    meta = json.loads((folder / "meta.json").read_text())
    state = State(folder, STATE_STEP, meta)
    parts = {part: observe_tensors(state.tensors(part)) for part in ("objective", "optimiser")}
    write("state", {"environment": environment(), "files": hashes(GOLDEN / "state"), "parts": parts, "log": log})


def make_endings() -> None:
    """How the run of the golden state ends today, in `state.json`; the state itself stays. For meant changes of the arithmetic."""
    from okavango import verbs
    from okavango.pretrain.state import latest_state

    stored = json.loads((GOLDEN / "state.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        shutil.copytree(GOLDEN / "state", out / "state")
        state, _ = latest_state(out / "state")
        assert state is not None
        verbs.pretrain(revive(state_recipe(), state.meta["recipe"]), out=out, say=lambda line: None)
        log = [*stored["log"][:STATE_STEP], *read_log(out)]
    write("state", {**stored, "environment": environment(), "log": log})


# -- records ----------------------------------------------------------------------------------------------------------------

RECORDS: list[dict[str, Any]] = [
    {
        "model": "elastic_vit_tiny.poa_fashion",
        "dataset": "fashion:test",
        "protocol": "knn/v1",
        "metric": "accuracy",
        "value": 0.8125,
        "n": 2000,
        "subnet": "w64_d2",
        "baseline": "shipped",
        "interval": (0.795, 0.829),
        "parameters": 104_320,
        "latency_ms": 0.75,
        "weights_sha256": "a" * 64,
        "train_manifest_sha256": "b" * 64,
        "test_manifest_sha256": "c" * 64,
        "seed": 3,
        "settings": {"k": 20, "temperature": 0.07, "accuracy_at_k": {"10": 0.81, "20": 0.8125}},
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
        "command": "okavango evaluate elastic_vit_tiny --data samples/fashion",
        "created": "2026-01-02T03:04:05Z",
        "label": "tiny",
        "notes": "über 80 %",
    },
    {
        "model": "raw-pixels",
        "dataset": "fashion:moved",
        "protocol": "logistic/v1",
        "metric": "accuracy",
        "value": 0.5,
        "n": 8,
        "baseline": "raw pixels",
        "created": "2026-01-02T03:04:06Z",
    },
]


def make_records() -> None:
    """`records.jsonl` and its content, `records.json`."""
    from okavango.zoo.leaderboard.records import Record, write_record

    path = GOLDEN / "records.jsonl"
    path.unlink(missing_ok=True)
    for values in RECORDS:
        write_record(path, Record(**values))
    expected = [Record(**values).to_json() for values in RECORDS]
    write("records", {"files": hashes(path), "records": expected})


# -- curves -----------------------------------------------------------------------------------------------------------------

CURVES: dict[str, dict[str, Any]] = {
    "poa_tiny": {"verb": "pretrain", "changes": {"batch": 16}},
    "dinov2_tiny": {"verb": "pretrain", "changes": {"batch": 16}},
    "poa_swin_tiny": {"verb": "pretrain", "changes": {"batch": 16}},
    "poa_resnet_tiny": {"verb": "pretrain", "changes": {"batch": 16}},
    "bm_mae_tiny": {"verb": "pretrain", "changes": {"batch": 2}},
    "segment_bm_mae_tiny": {
        "verb": "finetune",
        "changes": {"batch": 1, "model": "bm_mae_tiny", "data": "samples/brain", "seed": 1},
    },
    "classify": {
        "verb": "finetune",
        # A rate at which an untrained network of this size moves within 20 steps.
        "changes": {"batch": 16, "model": "elastic_vit", "model_args": ARGUMENTS, "data": "samples/fashion", "optim.lr": 0.05},
    },
}


def run_curve(name: str, out: Path) -> list[dict[str, float]]:
    """What 20 steps of a recipe log."""
    from okavango import verbs

    plan = CURVES[name]
    changes = {"steps": 20, "threads": 1, "workers": 0, "log_every": 1, "save_every": 20, "trackers": (), **plan["changes"]}
    getattr(verbs, plan["verb"])(name, out=out, say=lambda line: None, **changes)
    return read_log(out)


def make_curves() -> None:
    """`curves/NAME.json`: the log of 20 steps of each objective."""
    for name in CURVES:
        with tempfile.TemporaryDirectory() as folder:
            write(f"curves/{name}", {"environment": environment(), "log": run_curve(name, Path(folder) / "run")})


# -- options of the command line ----------------------------------------------------------------------------------------------

RECIPE_HELP = ("pretrain poa_fashion", "finetune classify")


def read_flags() -> dict[str, list[str]]:
    """Command -> names of its positional arguments, then its options as `--help` names them, sorted."""
    import contextlib
    import inspect
    import io
    import re

    from okavango import cli

    commands = {}
    for name, command in cli.COMMANDS.items():
        commands |= (
            {f"{name} {sub}": function for sub, function in command.items()} if isinstance(command, dict) else {name: command}
        )
    found = {}
    for command in [*commands, *RECIPE_HELP]:
        parameters = inspect.signature(commands[command]).parameters.values() if command in commands else ()
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            status = cli.main([*command.split(), "--help"])
        if status:
            raise RuntimeError(f"okavango {command} --help: exit status {status}")
        # An option is the first thing in its line, whatever frame is drawn around it.
        heads = re.findall(r"^\W*?((?:--?[\w.-]+)(?:, --?[\w.-]+)*)", text.getvalue(), re.MULTILINE)
        found[command] = [p.name.upper() for p in parameters if "Positional" in str(p.annotation)]
        found[command] += sorted(option for head in heads for option in head.split(", ") if re.match(r"--[a-z]", option))
    return found


def make_flags() -> None:
    """`flags.json`: every option of every command, and of one recipe for each verb."""
    write("flags", read_flags())


MAKERS = {
    "checkpoint": (make_checkpoint, "checkpoint.json"),
    "state": (make_state, "state.json"),
    "endings": (make_endings, "state.json"),
    "records": (make_records, "records.json"),
    "curves": (make_curves, "curves"),
    "flags": (make_flags, "flags.json"),
}


def main(names: list[str]) -> None:
    """Make what is named, or what is missing."""
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        raise SystemExit(f"unknown {unknown[0]!r}; known: {', '.join(MAKERS)}")
    for name, (make, product) in MAKERS.items():
        path = GOLDEN / product
        if name in names or (not names and not (path.is_file() or (path.is_dir() and any(path.iterdir())))):
            make()
            print(f"made {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
