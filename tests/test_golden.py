"""Files of format version 1 that were written once: every later version reads them and computes the same from them."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


def _make():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_make"] = module
    spec.loader.exec_module(module)
    return module


make = _make()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_the_files_are_those_that_were_written_first():
    for name, product in (("checkpoint", "checkpoint"), ("state", "state"), ("records", "records.jsonl")):
        assert make.hashes(GOLDEN / product) == expected(name)["files"], (
            f"golden {name} was changed; old files must stay as they are"
        )
    assert sum(path.stat().st_size for path in (GOLDEN / "checkpoint").iterdir()) < 100_000
    assert sum(path.stat().st_size for path in (GOLDEN / "state").rglob("*") if path.is_file()) < 300_000


# -- checkpoint ---------------------------------------------------------------------------------------------------------------


def test_checkpoint_of_version_1_loads_and_answers_as_it_did():
    import okavango as ok
    from okavango.zoo.checkpoint import read_config, verify_checkpoint

    folder = GOLDEN / "checkpoint"
    assert verify_checkpoint(folder) == []
    config = read_config(folder)
    assert config["format_version"] == 1 and config["arguments"]["max_width"] == 16
    for place in (folder, folder / "model.safetensors"):
        model = ok.load(str(place))
        assert not model.training and not model.load_report.missing and not model.load_report.unexpected
    stored, found = expected("checkpoint"), make.observe_checkpoint(model)
    assert {k: found[k] for k in ("architecture", "subnets", "grid")} == {k: stored[k] for k in ("architecture", "subnets", "grid")}
    assert set(found["numbers"]) == set(stored["numbers"])
    for name, numbers in stored["numbers"].items():
        torch.testing.assert_close(torch.tensor(found["numbers"][name]), torch.tensor(numbers), rtol=1e-5, atol=1e-5, msg=name)
    # Untrained weights would pass a comparison of shapes only: these numbers are far from constant.
    assert torch.tensor(stored["numbers"]["pooled"]).std() > 0.1


def test_checkpoint_weights_are_the_ones_that_make_py_describes():
    model = make.build_checkpoint_model()
    stored = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    own = model.state_dict()
    assert set(own) == set(stored) and all(torch.equal(own[name], tensor) for name, tensor in stored.items())


def test_checkpoint_saved_again_holds_the_same_bytes(tmp_path):
    import okavango as ok

    model = ok.load(str(GOLDEN / "checkpoint"))
    ok.save(model, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (GOLDEN / "checkpoint" / "model.safetensors").read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN / "checkpoint", tmp_path / "again"))
    for name in ("format_version", "kind", "architecture", "arguments", "preprocess", "weights"):
        assert new[name] == old[name], name


# -- state --------------------------------------------------------------------------------------------------------------------


def test_state_of_version_1_is_read():
    from okavango.pretrain.state import latest_state

    stored = expected("state")
    found, problems = latest_state(GOLDEN / "state")
    assert problems == [] and found.step == 2 and found.meta["format_version"] == 1
    for part, tensors in stored["parts"].items():
        seen = make.observe_tensors(found.tensors(part))
        assert set(seen) == set(tensors)
        for name, (shape, dtype, norm) in tensors.items():
            assert seen[name][:2] == [shape, dtype] and math.isclose(seen[name][2], norm, rel_tol=1e-9), name


def test_run_goes_on_from_a_state_of_version_1(tmp_path):
    from okavango import verbs
    from okavango.pretrain.state import latest_state

    out, said = tmp_path / "run", []
    shutil.copytree(GOLDEN / "state", out / "state")
    stored = expected("state")
    state, _ = latest_state(out / "state")
    recipe = make.revive(make.state_recipe(), state.meta["recipe"])
    verbs.pretrain(recipe, out=out, say=said.append)
    assert "resuming at step 2 of 4" in said
    log = make.read_log(out)
    assert [line["step"] for line in log] == [2, 3]
    compare(log, stored["log"][2:], stored["environment"])


# -- records ------------------------------------------------------------------------------------------------------------------


def test_records_of_version_1_are_read_whole_and_drawn():
    from okavango.zoo.leaderboard.page import table
    from okavango.zoo.leaderboard.records import read_records

    records = read_records(GOLDEN / "records.jsonl")
    assert json.loads(json.dumps([record.to_json() for record in records])) == expected("records")["records"]
    text = table(records)
    assert "tiny" in text and "81.2" in text and "raw pixels" in text


# -- curves -------------------------------------------------------------------------------------------------------------------


def compare(log: list[dict], stored: list[dict], environment: dict[str, str]) -> None:
    """Every logged number: to 1e-6 where torch and the CPU are those of the recording, otherwise to 1e-3."""
    here = make.environment()
    tolerance = 1e-6 if here == environment else 1e-3
    assert len(log) == len(stored)
    for found, line in zip(log, stored, strict=True):
        assert set(found) == set(line), f"step {line['step']}: other quantities are logged than when the curve was recorded"
        for name, value in line.items():
            assert math.isclose(found[name], value, rel_tol=tolerance, abs_tol=1e-12), (
                f"step {line['step']}: {name} is {found[name]!r}, recorded {value!r}; allowed is a relative difference of "
                f"{tolerance:g} (recorded with {environment}, this is {here}; 1e-6 where they agree, else 1e-3). "
                "If the change is meant, record again: python tests/golden/make.py curves"
            )
