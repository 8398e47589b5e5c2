from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.zoo.leaderboard.records import (
    Record,
    RecordError,
    RecordWarning,
    bootstrap,
    environment,
    paired_bootstrap,
    read_records,
    write_record,
)


def make(**changes) -> Record:
    fields = {"model": "m", "dataset": "d", "protocol": "knn/v1", "metric": "accuracy", "value": 0.5, "n": 10}
    return Record(**{**fields, **changes})


def test_a_record_survives_the_file(tmp_path):
    versions, hardware = environment()
    record = make(
        interval=(0.4, 0.6), parameters=7, latency_ms=1.5, settings={"k": 20, "grid": [1, 2]}, versions=versions, hardware=hardware,
        notes="naïve\nsecond line \u2028 end", subnet="w96_d6",
    )  # fmt: skip
    path = tmp_path / "new" / "records.jsonl"
    write_record(path, record)
    write_record(path, make(value=1))
    assert read_records(path) == [record, make(value=1, created=read_records(path)[1].created)]
    assert path.read_bytes().count(b"\n") == 2
    assert next(iter(json.loads(path.read_text().splitlines()[0]))) == "format_version"
    assert read_records([path, path]) == read_records(path) * 2


@settings(max_examples=30, deadline=None)
@given(name=st.text(min_size=1), value=st.floats(0, 1), notes=st.text())
def test_any_text_survives(tmp_path_factory, name, value, notes):
    path = tmp_path_factory.mktemp("r") / "r.jsonl"
    record = make(model=name, value=value, notes=notes)
    write_record(path, record)
    assert read_records(path) == [record]


def test_a_torn_line_is_reported_and_costs_nothing_else(tmp_path):
    path = tmp_path / "records.jsonl"
    first, second = make(model="first"), make(model="second")
    write_record(path, first)
    with path.open("ab") as file:
        file.write(json.dumps(second.to_json()).encode()[:40])
    with pytest.warns(RecordWarning, match=r"records\.jsonl:2: .*cut short"):
        assert read_records(path) == [first]
    write_record(path, second)  # closes the torn line, so that it does not swallow this one
    with pytest.warns(RecordWarning):
        assert read_records(path) == [first, second]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2.*upgrade"),
        ({"format_version": None}, "format_version None"),
        ({"latencyms": 1.0}, "unknown field 'latencyms'; did you mean 'latency_ms'"),
        ({"n": 0}, "n is 0"),
        ({"value": "0.5"}, "value is '0.5'"),
        ({"interval": [0.6, 0.4]}, "interval"),
        ({"model": ""}, "model is ''"),
    ],
)
def test_lines_that_are_whole_but_wrong_are_errors(tmp_path, change, message):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({**make().to_json(), **change}) + "\n")
    with pytest.raises(RecordError, match=f"records.jsonl:1: .*{message}"):
        read_records(path)


def test_a_missing_field_and_a_missing_file_are_errors(tmp_path):
    data = make().to_json()
    del data["metric"]
    with pytest.raises(RecordError, match="'metric' is missing"):
        Record.from_json(data)
    with pytest.raises(RecordError, match="JSON object"):
        Record.from_json([1])
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True])
def test_values_that_are_not_numbers_are_refused(value):
    with pytest.raises(RecordError, match="finite number"):
        make(value=value)


def test_settings_must_be_json(tmp_path):
    with pytest.raises(RecordError, match="plain JSON"):
        write_record(tmp_path / "r.jsonl", make(settings={"k": np.arange(3)}))
    assert not (tmp_path / "r.jsonl").exists()


def test_many_writers_do_not_mix_lines(tmp_path):
    path = tmp_path / "records.jsonl"

    def write(writer: int) -> None:
        for i in range(25):
            write_record(path, make(model=f"{writer}-{i}", notes="x" * 2000))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.model for record in read_records(path)) == sorted(f"{w}-{i}" for w in range(4) for i in range(25))


def test_the_bootstrap_interval_is_the_binomial_one():
    correct = np.arange(2000) % 10 < 8
    low, high = bootstrap(correct, seed=0, rounds=4000)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 2000)
    assert abs(low - (0.8 - half)) < 0.002 and abs(high - (0.8 + half)) < 0.002
    assert bootstrap(correct, seed=0) == bootstrap(correct, seed=0) != bootstrap(correct, seed=1)
    assert bootstrap(np.ones(5, bool), seed=0) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(np.zeros(0, bool), seed=0)


def test_pairs_tell_small_differences_that_single_intervals_do_not():
    rng = np.random.default_rng(0)
    a = rng.random(1000) < 0.7
    b = a.copy()
    b[np.flatnonzero(a)[:20]] = False
    difference, low, high = paired_bootstrap(a, b, seed=0)
    assert difference == pytest.approx(0.02) and 0 < low < 0.02 < high < 0.035
    assert bootstrap(a, 0)[0] < bootstrap(b, 0)[1]  # the single intervals overlap
    assert paired_bootstrap(a, a, seed=0) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same samples"):
        paired_bootstrap(a, b[:10], seed=0)


def test_records_and_pages_do_not_import_torch():
    code = (
        "import sys; from okavango.zoo.leaderboard import records, page; v, h = records.environment(); "
        "assert 'torch' not in sys.modules and v['python'] and v['torch'] and h['cpu'] and h['threads'] >= 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
