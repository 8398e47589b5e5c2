"""`ok.evaluate`, `ok.embed` and `ok.predict` for every family, and studies as vectors."""

from __future__ import annotations

import csv
import inspect

import numpy as np
import pytest
import torch
from pyarrow import parquet

import okavango as ok
from okavango import cli, dispatch, retrieval_verbs, verbs, volume_verbs
from okavango.data.sources import Arrays
from okavango.data.studies import Prepare, Studies, write_scan
from okavango.downstream.classification.head import Classifier
from okavango.downstream.classification.studies import StudyClassifier
from okavango.downstream.segmentation.head import Segmenter
from okavango.models.backbone import create_model
from okavango.models.features import Subnet
from okavango.zoo.checkpoint import file_sha256, save_checkpoint
from okavango.zoo.leaderboard.records import read_records

torch.set_num_threads(1)
VOLUMES = {"modalities": ("t1", "flair"), "size": 16, "patch_size": 8, "width": 24, "depth": 2, "heads": 2, "mlp": 32}
ELASTIC = {"image_size": 28, "patch_size": 14, "min_width": 8, "max_width": 16, "width_step": 8, "head_dim": 8, "min_depth": 1}


def quiet(line):
    pass


def brain_model():
    torch.manual_seed(0)
    return create_model("bm_mae_tiny", **VOLUMES, spacing=None, orientation=None).eval()


def picture_model():
    torch.manual_seed(0)
    return create_model("elastic_vit", **ELASTIC, max_depth=2).eval()


def save_head(head, folder):
    save_checkpoint(head, folder, kind="head", head=head.head_config(), backbone_prefix=head.backbone_prefix)


def pictures(count=12, seed=0):
    rng, labels = np.random.default_rng(seed), np.arange(count) % 2
    values = rng.integers(0, 90, (count, 28, 28, 3)) + 120 * labels[:, None, None, None]
    return Arrays(values.astype(np.uint8), labels)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Four studies in a table: one lacks FLAIR, one has nothing but a torn file, two belong to each class."""
    root, rows = tmp_path_factory.mktemp("studies"), []
    for index in range(4):
        rng, names = np.random.default_rng(index), {}
        for name in VOLUMES["modalities"]:
            names[name] = f"s{index}_{name}.nii.gz"
            write_scan(root / names[name], rng.uniform(1, 2, (16, 16, 16)).astype(np.float32), np.eye(4))
        if index == 1:
            names["flair"] = ""
        if index == 2:
            names["flair"] = ""
            (root / names["t1"]).write_bytes((root / names["t1"]).read_bytes()[:400])
        rows.append({"id": f"s{index}", **names, "label": "ab"[index // 2]})
    with open(root / "studies.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root / "studies.csv"


# -- one signature ------------------------------------------------------------------------------------------------------------


def test_what_the_families_share_has_one_order():
    shared = list(inspect.signature(dispatch.evaluate).parameters)[:-1]  # without the families' own
    for module in (verbs, retrieval_verbs, volume_verbs):
        own = list(inspect.signature(module.evaluate).parameters)
        common = [name for name in shared if name in own]
        assert own[: len(common)] == common and {"checkpoint", "data", "protocol", "out", "seed", "batch", "say"} <= set(common)
    for verb in ("embed", "predict"):
        asked, *others = (list(inspect.signature(getattr(m, verb)).parameters) for m in (dispatch, verbs, volume_verbs))
        assert all(own[:3] == asked[:3] and own[-1] == "say" for own in others)


# -- evaluate -----------------------------------------------------------------------------------------------------------------


def test_pictures_places_and_studies_by_one_function(studies, tmp_path):
    out = tmp_path / "r.jsonl"
    subnet = ok.evaluate(
        picture_model(),
        data=pictures(seed=1),
        train=pictures(),
        protocol=("knn-5", "linear-c1"),
        subnets="w8_d1",
        out=out,
        say=quiet,
    )
    assert [(r.protocol, r.subnet) for r in subnet] == [("knn-5/v1", "w8_d1"), ("linear-c1/v1", "w8_d1")]
    places = ok.evaluate("chance", data="samples/places", protocol="retrieval/utm25", top=5, out=out, say=quiet)
    assert {r.protocol for r in places} == {"retrieval/utm25"} and {"R@1", "mAP"} <= {r.metric for r in places}
    head = StudyClassifier(brain_model(), ("a", "b"), hidden=0).eval()
    scans = ok.evaluate(head, data=Studies(studies), protocol="studies/classification", modalities=("t1",), out=out, say=quiet)
    assert {r.n for r in scans} == {3} and all(r.settings["modalities"] == ["t1"] for r in scans)
    assert len(read_records(out)) == len(subnet) + len(places) + len(scans)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "retrieval/utm25", "train": "x"}, "train does not go with protocol retrieval/utm25"),
        ({"protocol": "knn", "rerank": "ransac"}, "rerank does not go with protocol knn"),
        ({"protocol": "studies/survival", "workers": 2}, "workers does not go with protocol studies/survival"),
        ({"protocol": ("knn", "segmentation/brats")}, "segmentation/brats: is measured alone, without knn"),
        ({"protocol": "knn", "overlap": 0.0}, "overlap does not go with"),
    ],
)
def test_options_of_another_family_are_refused(options, message):
    with pytest.raises(dispatch.OptionError, match=message):
        ok.evaluate("nowhere", data="nowhere", **options)


def test_data_may_be_left_out_only_where_parts_can_be_named():
    with pytest.raises(dispatch.OptionError, match="--data is needed"):
        ok.evaluate("nowhere")
    with pytest.raises(ValueError, match="retrieval needs a database and queries"):
        ok.evaluate("chance", protocol="retrieval/utm25")


def test_subnets_are_named_after_the_checkpoint():
    assert verbs.named_subnets("a/b@all") == ("a/b", ["all"])
    assert verbs.named_subnets("a@w64_d2,w64_d3-4-6-3") == ("a", ["w64_d2", "w64_d3-4-6-3"])
    assert verbs.named_subnets("hf://org/name@v1@w8_d1") == ("hf://org/name@v1", ["w8_d1"])
    for plain in ("a", "hf://org/name@v1", "me@home/model"):
        assert verbs.named_subnets(plain) == (plain, [])


# -- embed --------------------------------------------------------------------------------------------------------------------


def rows(path):
    table = parquet.read_table(path)
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    return {row["id"]: row for row in table.to_pylist()}, about


@pytest.mark.parametrize("batch", [1, 3])
def test_studies_as_vectors(studies, tmp_path, batch):
    model, lines = brain_model(), []
    save_checkpoint(model, tmp_path / "brain")
    with pytest.warns(UserWarning, match="s2_t1.nii.gz is cut off|s2_t1.nii.gz cannot be read"):
        out = ok.embed(str(tmp_path / "brain"), str(studies), tmp_path / "v.parquet", batch=batch, say=lines.append)
    found, about = rows(out)
    assert list(found) == ["s0", "s1", "s3"] and [row["label"] for row in found.values()] == [0, 0, 1]
    assert lines == ["left out s2: none of its sequences can be read", f"3 embeddings of 24 numbers are in {out}"]
    assert about["model"] == str(tmp_path / "brain") and about["modalities"] == "t1,flair" and len(about["source_sha256"]) == 64
    prepare = Prepare(model.preprocess)
    with torch.inference_mode():
        for index, id in ((0, "s0"), (1, "s1"), (3, "s3")):  # each by itself, with the sequences that it has
            sample = prepare(Studies(studies)[index])
            alone = model({name: sample[name][None] for name in ("t1", "flair") if name in sample}).pooled[0]
            np.testing.assert_allclose(found[id]["embedding"], alone.numpy(), atol=1e-5)


def test_a_subset_of_sequences(studies, tmp_path):
    save_checkpoint(brain_model(), tmp_path / "brain")
    vectors = {}
    for name in ("t1", "t2f"):
        out = tmp_path / f"{name}.parquet"
        assert cli.main(["embed", str(tmp_path / "brain"), str(studies), "--out", str(out), "--modalities", name]) == 0
        vectors[name], about = rows(out)
        assert about["modalities"] == {"t1": "t1", "t2f": "flair"}[name]
    assert list(vectors["t1"]) == ["s0", "s1", "s3"] and list(vectors["t2f"]) == ["s0", "s3"]
    assert not np.allclose(vectors["t1"]["s0"]["embedding"], vectors["t2f"]["s0"]["embedding"])


def test_studies_that_cannot_be_embedded(studies, tmp_path, capsys):
    save_checkpoint(brain_model(), tmp_path / "brain")
    arguments = ["embed", str(tmp_path / "brain"), str(studies), "--out", str(tmp_path / "v.parquet")]
    for more, status, message in (
        (["--modalities", "pet"], 1, "pet"),
        (["--subnet", "w8_d1"], 2, "subnet does not go with"),
        (["--components", "3"], 2, "components does not go with"),
    ):
        assert cli.main([*arguments, *more]) == status
        assert message in capsys.readouterr().err
    assert not (tmp_path / "v.parquet").exists()
    with pytest.raises(ValueError, match=r"\.parquet"):
        ok.embed(str(tmp_path / "brain"), str(studies), tmp_path / "v.csv")


def test_pictures_as_vectors(tmp_path):
    model, source = picture_model(), pictures(5)
    found, about = rows(ok.embed(model, source, tmp_path / "v.parquet", subnet="w8_d1", batch=2, say=quiet))
    assert len(found) == 5 and about["model"] == "elastic_vit" and about["subnet"] == "w8_d1"
    with torch.inference_mode():
        alone = model.extract(Subnet(8, 1))(**model.preprocess(image=source[3]["image"])).pooled[0]
    np.testing.assert_allclose(found[source[3]["id"]]["embedding"], alone.numpy(), atol=1e-5)


# -- predict ------------------------------------------------------------------------------------------------------------------


def test_the_head_says_what_is_predicted(studies, tmp_path, monkeypatch):
    classifier = Classifier(picture_model(), ("dark", "bright"))
    save_checkpoint(
        classifier, tmp_path / "run" / "export", kind="head", head=classifier.head_config(), backbone_prefix="backbone."
    )
    head = StudyClassifier(brain_model(), ("a", "b"), hidden=0)
    save_checkpoint(head, tmp_path / "head", kind="head", head=head.head_config(), backbone_prefix="backbone.")
    read = []
    monkeypatch.setattr(verbs, "load", lambda where, **more: read.append(where) or ok.load(where, **more))
    for where in ("run", "run/export"):  # the run folder stands for what it exported
        found = ok.predict(str(tmp_path / where), pictures(3), top=2, say=quiet)
        assert len(found) == 3 and {name for name, _ in found[0][1]} == {"dark", "bright"}
    scans = dict(ok.predict(str(tmp_path / "head"), Studies(studies), modalities="t1", say=quiet))
    assert set(scans) == {"s0", "s1", "s3"} and [name for name, _ in scans["s0"]] == ["a", "b"]
    assert read == [str(tmp_path / "run" / "export")] * 2 + [str(tmp_path / "head")]  # each is opened once
    with pytest.raises(dispatch.OptionError, match="top does not go with .*, which holds a head for studies"):
        ok.predict(str(tmp_path / "head"), Studies(studies), top=2, say=quiet)
    with pytest.raises(dispatch.OptionError, match="codes does not go with .*, which holds no head for studies"):
        ok.predict(classifier, pictures(3), codes="brats", say=quiet)
    with pytest.raises(ValueError, match="elastic_vit holds no classifier"):
        verbs.predict(verbs.Opened(picture_model(), "elastic_vit"), pictures(3))


def test_segmentations_name_the_checkpoint(studies, tmp_path):
    save_head(Segmenter(brain_model(), feature_size=4), tmp_path / "head")
    opened = verbs.open_head(str(tmp_path / "head"))
    assert opened.name == str(tmp_path / "head") and isinstance(opened.model, Segmenter)
    assert opened.sha256 == file_sha256(tmp_path / "head" / "model.safetensors") == verbs.open_head(opened).sha256
    with pytest.raises(ValueError, match="give --out FOLDER"):
        ok.predict(str(tmp_path / "head"), Studies(studies))
