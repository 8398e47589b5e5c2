"""The benchmark of POA's parts, at a size of seconds: what differs between runs, going on, and the numbers of its tables."""

from __future__ import annotations

import importlib
import json
import shutil

import numpy as np
import pytest
from helpers import ROOT, weights

from okavango import verbs
from okavango.data.sources import Part, cached, open_source
from okavango.pretrain import loop
from okavango.zoo.leaderboard.records import Record, read_records


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("poa_ablations")


def some_pictures():
    train, test, moved = (open_source(f"samples/fashion:{part}") for part in ("train", "test", "moved"))
    return cached(Part(train, range(60))), [cached(Part(part, range(20))) for part in (test, moved)]


def flat(settings: dict, prefix: str = "") -> dict:
    """Dotted names -> values."""
    pairs = {}
    for name, value in settings.items():
        pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return pairs


def test_all_of_it(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "RECIPE", "poa_tiny")
    train, tests = some_pictures()
    monkeypatch.setattr(script, "pictures", lambda: (train, tests))
    monkeypatch.setattr(verbs, "training_part", lambda data: train)
    monkeypatch.setattr(loop, "learning_curves", lambda *_: None)  # would be most of the time
    page, before = tmp_path / "docs" / "poa.md", f"# Title\n\n{script.START}\nold\n{script.END}\n\nend {script.END}\n"
    page.parent.mkdir()
    page.write_text(before)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    runs = tmp_path / "runs"
    command = ["--steps", "2", "--seeds", "3", "--out", str(runs)]
    folders = {name: runs / f"{name}-steps2-seed3" for name in script.ABLATIONS}

    script.main([*command, "--only", "full"])
    assert [folder.name for folder in runs.iterdir()] == ["full-steps2-seed3"] and page.read_text() == before
    script.main(command)

    recipes = {name: flat(json.loads((folder / "recipe.json").read_text())) for name, folder in folders.items()}
    changed = {name: {key for key in found if found[key] != recipes["full"].get(key)} for name, found in recipes.items()}
    assert changed == {
        "full": set(),
        "no-elastic": {"objective.elastic"},
        "no-same-view": {"objective.same_view"},
        "no-rescale": {"model_args.rescale"},
        "scale-1": {"objective.sampling_scale"},
    }
    configs = {name: json.loads((folder / "export" / "config.json").read_text()) for name, folder in folders.items()}
    assert {name: config["arguments"].get("rescale") for name, config in configs.items()} == dict.fromkeys(folders) | {
        "no-rescale": False
    }
    assert len({config["weights"]["sha256"] for config in configs.values()}) == 5

    out = tmp_path / "leaderboard" / "poa_ablations.jsonl"
    records = read_records(out)
    assert len(records) == 5 * 4 * 2 and {record.seed for record in records} == {3}
    for record in records:
        assert record.weights_sha256 == configs[record.baseline]["weights"]["sha256"] and record.latency_ms is None
        answers = np.load(folders[record.baseline] / "subnets.npz")[f"{record.dataset} {record.subnet}"]
        assert answers.shape == (20,) and answers.mean() == record.value
    assert "no-same-view" in out.with_suffix(".html").read_text()
    head, _, rest = page.read_text().partition(script.START)
    tables, _, end = rest.partition(script.END)
    assert (head, end) == ("# Title\n\n", f"\n\nend {script.END}\n")
    assert tables.count("| `no-rescale` |") == 4 and "old" not in tables and "smallest 2 | middle 1 | largest 1 | intact" in tables

    # Again: nothing is run or measured. After a stop between the two exports, and one while measuring: the rest, to the same end.
    kept, exported = (out.read_bytes(), page.read_text()), weights(folders["full"])
    with monkeypatch.context() as patch:
        patch.setattr(verbs, "pretrain", None)
        patch.setattr(verbs, "outcomes", None)
        script.main(command)
    assert (out.read_bytes(), page.read_text()) == kept
    shutil.rmtree(folders["full"] / "export-full")
    (folders["full"] / "subnets.jsonl").rename(folders["full"] / "subnets.part")
    script.main(command)
    assert weights(folders["full"]) == exported and page.read_text() == kept[1]
    again = read_records(out)
    assert [(r.baseline, r.subnet, r.dataset, r.value) for r in again] == [
        (r.baseline, r.subnet, r.dataset, r.value) for r in records
    ]


def test_a_run_that_was_stopped_is_not_measured(script, tmp_path, monkeypatch):
    monkeypatch.setattr(verbs, "pretrain", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="full-steps2-seed0: stopped"):
        script.train("full", 2, 0, 1, tmp_path)


def test_numbers_of_the_tables(script):
    subnets = {f"w{width}_d1": width for width in (3, 1, 2, 5, 4)}

    def run(seed: int, share: dict[str, float]) -> object:
        facts = {"model": "m", "dataset": "d", "protocol": "knn/v1", "metric": "accuracy", "n": 8, "seed": seed}
        records = [Record(**facts, value=share[name], subnet=name, parameters=subnets[name]) for name in subnets]
        return script.Measured(records, {("d", name): np.arange(8) < 8 * share[name] for name in subnets})

    def sized(small: float, middle: float, large: float) -> dict[str, float]:
        return {"w1_d1": small, "w2_d1": small, "w3_d1": middle, "w4_d1": middle, "w5_d1": large}

    results = {
        "full": [run(0, sized(1.0, 0.5, 1.0)), run(1, sized(0.5, 0.5, 1.0))],
        "scale-1": [run(0, sized(0.0, 0.5, 1.0)), run(1, sized(0.25, 0.5, 0.0))],
    }
    lines = script.block(results, 7).splitlines()
    assert lines[0] == script.START and lines[-1] == script.END and "7 steps, seeds 0, 1;" in lines[1]
    assert [line for line in lines if line.startswith("| d | `full`")] == [
        "| d | `full` | 0.750 (0.500..1.000) | 0.500 (0.500..0.500) | 1.000 (1.000..1.000) | 1.000 (1.000..1.000) |"
    ]
    accuracy, difference = [line for line in lines if line.startswith("| d | `scale-1`")]
    assert (
        accuracy == "| d | `scale-1` | 0.125 (0.000..0.250) | 0.500 (0.500..0.500) | 0.500 (0.000..1.000) | 0.500 (0.000..1.000) |"
    )
    cells = [cell.strip() for cell in difference.split("|")[3:7]]
    assert cells[0].startswith("-0.625 (-0.") and cells[1:] == ["+0.000 (+0.000..+0.000)", *2 * ["-0.500 (-0.500..-0.500)"]]
