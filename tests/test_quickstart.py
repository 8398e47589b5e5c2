"""The quickstart, shortened, and what the published records say of the checkpoint that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from okavango.recipes import quickstart
from okavango.zoo.checkpoint import file_sha256, read_config, verify_checkpoint
from okavango.zoo.hub import load, resolve
from okavango.zoo.leaderboard.records import read_records

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "leaderboard" / "poa_fashion.jsonl"


def test_quickstart_does_the_whole_job(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "BANK", 250)
    monkeypatch.setattr(quickstart, "QUERIES", 50)
    lines: list[str] = []
    records = quickstart.quickstart(tmp_path / "out", steps=2, say=lines.append)
    assert {record.baseline for record in records} == {"raw pixels", "this run", "untrained", "shipped"}
    for baseline in ("this run", "untrained", "shipped"):
        assert len({record.subnet for record in records if record.baseline == baseline}) == 5
    assert read_records(tmp_path / "out" / "records.jsonl") == records
    page = (tmp_path / "out" / "index.html").read_text()
    assert "data:image/png;base64," in page and "raw pixels" in page
    text = "\n".join(lines)
    assert "step 2/2" in text and "wins" in text and str(tmp_path / "out" / "index.html") in text


def test_shipped_checkpoint_is_in_order():
    folder = resolve(quickstart.SHIPPED)
    assert verify_checkpoint(folder) == []
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 * 2**20
    assert load(quickstart.SHIPPED).architecture == "elastic_vit_tiny"
    card = (folder / "README.md").read_text()
    for said in ("hours", "seed", "okavango pretrain poa_fashion", "Fashion-MNIST", "license"):
        assert said in card


def test_published_records_belong_to_the_shipped_weights():
    sha256 = file_sha256(resolve(quickstart.SHIPPED) / "model.safetensors")
    assert sha256 == read_config(resolve(quickstart.SHIPPED))["weights"]["sha256"]
    shipped = [record for record in read_records(PUBLISHED) if record.baseline == "shipped"]
    assert shipped and {record.weights_sha256 for record in shipped} == {sha256}
    assert {record.subnet for record in shipped} == set(map(str, load(quickstart.SHIPPED).list_subnets()))


@pytest.mark.parametrize("protocol", ["knn/v1", "logistic/v1", "linear/v1"])
@pytest.mark.parametrize("dataset", ["fashion-test", "fashion-test-moved0"])
def test_shipped_checkpoint_beats_untrained_networks_at_every_size(protocol, dataset):
    rows = [record for record in read_records(PUBLISHED) if (record.protocol, record.dataset) == (protocol, dataset)]
    shipped, untrained = ({r.subnet: r for r in rows if r.baseline == name} for name in ("shipped", "untrained"))
    assert len(shipped) == 15 and shipped.keys() == untrained.keys()
    assert any(record.baseline == "raw pixels" for record in rows)
    for subnet, record in shipped.items():
        assert record.interval[0] > untrained[subnet].interval[1], f"{subnet}: {record.value} against {untrained[subnet].value}"


def test_repeated_measurement_gives_the_published_number():
    from okavango import verbs

    (again,) = verbs.evaluate(quickstart.SHIPPED, data="samples/fashion", subnets=["w64_d2"], say=lambda line: None)
    (published,) = (
        record
        for record in read_records(PUBLISHED)
        if (record.baseline, record.subnet, record.dataset, record.protocol) == ("shipped", "w64_d2", "fashion-test", "knn/v1")
    )
    assert again.value == pytest.approx(published.value, abs=0.002)
