"""Whole scenes: maps of vectors and classes, resumed after a kill; and folders of patches under the protocols of pictures."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from helpers import command, environ
from sklearn.decomposition import PCA

import okavango as ok
from okavango import cli, scenes, verbs
from okavango.data.sources import open_source
from okavango.downstream.classification.features import extract_features
from okavango.downstream.classification.head import Classifier
from okavango.downstream.classification.protocols import evaluate_features
from okavango.models.backbone import create_model
from okavango.models.preprocess import Normalise, Preprocess, PreprocessError, Raster, Resize
from okavango.pretrain.state import StateError, run_lock
from okavango.scenes import Cut
from okavango.zoo.checkpoint import save_checkpoint

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
NAMES = ("B02", "B03", "B04", "B08")
SPEC = Raster(
    channels=("B04", "B03", "B02", "B08"),
    sensor="sentinel-2",
    level="L2A",
    units="reflectance",
    scale=(1e-4,),
    size=(14, 14),
    resize=Resize(rule="exact", interpolation="bilinear"),
    normalise=Normalise(rule="standard", mean=(0.1, 0.1, 0.1, 0.2), std=(0.05, 0.05, 0.05, 0.1), origin="made up"),
)
SAID = {"sensor": "sentinel-2", "level": "L2A", "units": "dn", "baseline": "02.08"}
ORIGIN = (600_000, 5_700_000)


def network(channels=4):
    torch.manual_seed(0)
    sizes = {"patch_size": 7, "min_width": 8, "max_width": 16, "width_step": 8, "min_depth": 1, "max_depth": 2, "head_dim": 8}
    return create_model("elastic_vit", image_size=14, channels=channels, **sizes).eval()


@pytest.fixture(scope="module")
def model():
    made = network()
    made.preprocess = Preprocess(image=SPEC)
    return made


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save_checkpoint(model, folder)
    return folder


def write_scene(path, height, width, *, seed=0, names=NAMES, dtype="uint16", said=SAID, **profile):
    """A tiled, compressed scene without nodata but for a hole at its upper left."""
    values = np.random.default_rng(seed).integers(200, 3000, (len(names), height, width)).astype(dtype)
    values[:, :20, :20] = 0
    shape = {"count": len(names), "height": height, "width": width, "dtype": dtype, "nodata": 0, "crs": "EPSG:32632"}
    place = {"transform": Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1]), "tiled": True, "blockxsize": 32, "blockysize": 32}
    with rasterio.open(path, "w", driver="GTiff", compress="deflate", **shape, **place, **profile) as dataset:
        dataset.write(values)
        for index, name in enumerate(names, 1):
            dataset.set_band_description(index, name)
    (path.parent / "bands.json").write_text(json.dumps(said))
    return values


def read_map(path):
    with rasterio.open(path) as dataset:
        return dataset.read(), dataset.profile, dataset.tags(), dataset.tags(1), dataset.descriptions


def vectors(model, values, size, stride, rows, columns, order=(2, 1, 0, 3)):
    """What the network makes of each tile, by hand: (D, rows, columns)."""
    padded = np.zeros((len(values), rows * stride + size, columns * stride + size), np.float32)
    padded[:, : values.shape[1], : values.shape[2]] = values
    spec, out = SPEC.normalise, []
    for row in range(rows):
        for column in range(columns):
            tile = padded[list(order), row * stride : row * stride + size, column * stride : column * stride + size]
            measured = tile != 0
            tile = tile * 1e-4
            x = (tile - np.reshape(spec.mean, (-1, 1, 1))) / np.reshape(spec.std, (-1, 1, 1))
            x = torch.from_numpy(np.where(measured, x, 0)).float()[None]
            if size != 14:
                x = torch.nn.functional.interpolate(x, size=(14, 14), mode="bilinear")
            with torch.inference_mode():
                out.append(model(image=x).pooled[0].numpy())
    return np.reshape(out, (rows, columns, -1)).transpose(2, 0, 1)


def test_a_pixel_of_the_map_is_what_the_network_makes_of_a_tile(tmp_path, checkpoint, model):
    values = write_scene(tmp_path / "scene.tif", 56, 70)
    lines = []
    ok.embed(str(checkpoint), tmp_path / "scene.tif", tmp_path / "map.tif", batch=3, say=lines.append)
    got, profile, tags, _, names = read_map(tmp_path / "map.tif")
    want = vectors(model, values, 14, 14, 4, 5)
    assert got.shape == (16, 4, 5) and got.dtype == np.float32 and np.isnan(profile["nodata"])
    hole = np.isnan(got).any(0)
    assert hole.sum() == 1 and hole[0, 0] and np.isnan(got[:, 0, 0]).all()  # the other three tiles are measured by half or more
    full = (slice(None), slice(2, None), slice(2, None))
    np.testing.assert_allclose(got[full], want[full], atol=1e-5)
    assert profile["crs"].to_epsg() == 32632 and profile["transform"] == Affine(140, 0, ORIGIN[0], 0, -140, ORIGIN[1])
    assert profile["tiled"] and profile["compress"] == "deflate" and names[:2] == ("feature 0", "feature 1")
    assert json.loads(tags["okavango"])["tile"] == 14
    assert any("take B04, B03, B02, B08 from channels 2, 1, 0, 3 of 4" in line for line in lines)
    assert not (tmp_path / "map.tif.partial").exists()


def test_overlapping_tiles_of_another_size_and_a_ragged_border(tmp_path, model):
    values = write_scene(tmp_path / "scene.tif", 50, 61)
    scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "map.tif", cut=Cut(tile=20, overlap=10, measured=1.0))
    got, profile, *_ = read_map(tmp_path / "map.tif")
    assert got.shape == (16, 4, 6)
    want = vectors(model, values, 20, 10, 4, 6)
    inside = np.ones((4, 6), bool)
    inside[:2, :2] = inside[:, 5] = False  # the hole, and what reaches beyond the scene
    assert (np.isnan(got).all(0) == ~inside).all()
    np.testing.assert_allclose(got[:, inside], want[:, inside], atol=1e-5)
    # pixels of a stride; the centre of the first is that of the first tile, at 100 m, 100 m
    assert profile["transform"] == Affine(100, 0, ORIGIN[0] + 50, 0, -100, ORIGIN[1] - 50)


def test_a_run_that_was_killed_goes_on_and_ends_alike(tmp_path, checkpoint):
    write_scene(tmp_path / "scene.tif", 32 * 150, 64)
    whole, cut = tmp_path / "whole.tif", tmp_path / "cut.tif"
    arguments = [str(checkpoint), str(tmp_path / "scene.tif")]
    options = ["--tile", "32", "--batch", "8"]
    process = subprocess.Popen(command("embed", *arguments, "--out", cut, *options), env=environ(), stdout=subprocess.PIPE)
    partial = tmp_path / "cut.tif.partial"
    deadline = time.monotonic() + 60
    while len(list(partial.glob("strip-*.npy"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    done = sorted(partial.glob("strip-*.npy"))
    assert 3 <= len(done) < 150 and not cut.exists()
    times = [path.stat().st_mtime_ns for path in done]
    lines = []
    with pytest.raises(ValueError, match="holds a part of a run with tile 32, now 16; repeat that command"):
        ok.embed(*arguments, cut, cut=Cut(tile=16), batch=8)
    assert [path.stat().st_mtime_ns for path in done] == times
    ok.embed(*arguments, cut, cut=Cut(tile=32), batch=8, say=lines.append)
    assert any(f"; {len(done)} of 150 strips are done" in line for line in lines)
    ok.embed(*arguments, whole, cut=Cut(tile=32), batch=8)
    assert cut.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def interrupted(monkeypatch, after=1):
    """Let a map fail after so many strips, as if the disk were full."""
    write, count = scenes.write_whole, iter(range(100))

    def failing(path, *rest):
        if path.name.startswith("strip") and next(count) >= after:
            raise OSError("no space left")
        write(path, *rest)

    monkeypatch.setattr(scenes, "write_whole", failing)


def test_what_a_run_depends_on_must_be_the_same(tmp_path, model, monkeypatch):
    scene, out = tmp_path / "scene.tif", tmp_path / "map.tif"
    write_scene(scene, 56, 56)
    with monkeypatch.context() as patch:
        interrupted(patch)
        with pytest.raises(OSError, match="no space left"):
            scenes.embed_scene(model, scene, out)
    assert len(list((tmp_path / "map.tif.partial").glob("strip-*.npy"))) == 1
    for changes, what in (
        ({"batch": 3}, "batch 64, now 3"),
        ({"cut": Cut(overlap=7)}, "overlap 0, now 7"),
        ({"half": True}, "half False, now True"),
        ({"components": 2}, "components 0, now 2"),
        ({"allow": {"range": "a test"}}, "another allow"),
    ):
        with pytest.raises(ValueError, match=f"map.tif.partial: holds a part of a run with {what}"):
            scenes.embed_scene(model, scene, out, **changes)
    other = network()
    other.preprocess = model.preprocess.replace("image", normalise=Normalise())
    with pytest.raises(ValueError, match="another preprocess"):
        scenes.embed_scene(other, scene, out)
    other.preprocess = model.preprocess
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="another weights"):
        scenes.embed_scene(other, scene, out)
    kept = scene.read_bytes()
    write_scene(scene, 56, 56, seed=1)
    with pytest.raises(ValueError, match="another scene"):
        scenes.embed_scene(model, scene, out)
    scene.write_bytes(kept)
    with run_lock(tmp_path / "map.tif.partial"), pytest.raises(StateError, match="in use by process"):
        scenes.embed_scene(model, scene, out)
    scenes.embed_scene(model, scene, out)
    assert out.exists()


def test_a_run_that_made_nothing_binds_nobody(tmp_path, model, monkeypatch):
    write_scene(tmp_path / "scene.tif", 28, 28)
    with monkeypatch.context() as patch:
        interrupted(patch, after=0)
        with pytest.raises(OSError, match="no space left"):
            scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "map.tif")
    scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "map.tif", batch=2)


def test_components_are_the_principal_ones_and_halves_are_close(tmp_path, model):
    write_scene(tmp_path / "scene.tif", 84, 84)
    run = {"cut": Cut(measured=1.0)}
    scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "all.tif", **run)
    scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "three.tif", components=3, **run)
    scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "half.tif", half=True, **run)
    every, three = read_map(tmp_path / "all.tif")[0], read_map(tmp_path / "three.tif")[0]
    kept = ~np.isnan(every[0])
    want = PCA(3).fit_transform(every[:, kept].T.astype(np.float64)).T
    np.testing.assert_allclose(np.abs(three[:, kept]), np.abs(want), rtol=1e-3, atol=1e-4)
    assert read_map(tmp_path / "three.tif")[4] == ("component 0", "component 1", "component 2")
    half = read_map(tmp_path / "half.tif")[0]
    np.testing.assert_allclose(half, every, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "half.tif").stat().st_size < 0.75 * (tmp_path / "all.tif").stat().st_size
    with pytest.raises(ValueError, match="17 components of 32 tiles with 16 numbers each; ask for fewer"):
        scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "many.tif", components=17, **run)


def test_a_classifier_maps_the_classes(tmp_path, model, capsys):
    values = write_scene(tmp_path / "scene.tif", 56, 56)
    head = Classifier(model, ("water", "forest", "town"))
    with torch.no_grad():
        head.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_checkpoint(head, tmp_path / "classifier", kind="head", backbone_prefix="backbone.", head=head.head_config())
    assert cli.main(["predict", str(tmp_path / "classifier"), str(tmp_path / "scene.tif"), "--out", str(tmp_path / "map.tif")]) == 0
    got, profile, _, tags, names = read_map(tmp_path / "map.tif")
    assert got.shape == (1, 4, 4) and got.dtype == np.uint8 and profile["nodata"] == 255 and names == ("class",)
    assert got[0, 0, 0] == 255 and {tags[f"class_{number}"] for number in range(3)} == {"water", "forest", "town"}
    order = [2, 1, 0, 3]
    tile = torch.from_numpy(values[order, 28:42, 14:28].astype(np.float32) * 1e-4)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (SPEC.normalise.mean, SPEC.normalise.std))
    assert got[0, 2, 1] == head.eval().predict({"image": ((tile - mean) / std)[None]}).argmax()
    assert "the map is" in capsys.readouterr().out


def test_a_coloured_scene_goes_through_a_network_for_pictures(tmp_path):
    write_scene(tmp_path / "scene.tif", 28, 42, names=("red", "green", "blue"), dtype="uint8", said={"units": "u8"})
    model = network(3)
    scenes.embed_scene(model, tmp_path / "scene.tif", tmp_path / "map.tif", cut=Cut(measured=0.0))
    got = read_map(tmp_path / "map.tif")[0]
    with rasterio.open(tmp_path / "scene.tif") as dataset:
        tile = torch.from_numpy(dataset.read()[:, 14:28, 28:42])
    with torch.inference_mode():
        np.testing.assert_allclose(got[:, 1, 2], model(**model.preprocess(image=tile)).pooled[0], atol=1e-5)


def test_mistakes_are_named_before_anything_is_made(tmp_path, checkpoint, model, capsys):
    scene = tmp_path / "scene.tif"
    write_scene(scene, 28, 28)
    with pytest.raises(ValueError, match="expected a name that ends in .parquet, or in .tif for one scene"):
        ok.embed(model, scene, tmp_path / "map.png")
    with pytest.raises(ValueError, match="whose --out ends in .tif"):
        ok.embed(model, scene, tmp_path / "map.parquet", cut=Cut(tile=14))
    with pytest.raises(ValueError, match="the folder .* does not exist"):
        ok.embed(model, scene, tmp_path / "nowhere" / "map.tif")
    with pytest.raises(ValueError, match="cannot overlap by 14"):
        ok.embed(model, scene, tmp_path / "map.tif", cut=Cut(overlap=14))
    with pytest.raises(ValueError, match="measured 2: expected a share"):
        Cut(measured=2)
    write_scene(scene, 28, 28, names=("B02", "B03", "B04"))
    assert cli.main(["embed", str(checkpoint), str(scene), "--out", str(tmp_path / "map.tif")]) == 1
    assert "the data lack band B08 (nir)" in capsys.readouterr().err
    write_scene(scene, 28, 28, said={**SAID, "level": "L1C"})
    with pytest.raises(PreprocessError, match="the data are of level L1C, and this checkpoint was trained on L2A"):
        ok.embed(model, scene, tmp_path / "map.tif")
    assert not any(tmp_path.glob("map.tif*")) or not any((tmp_path / "map.tif.partial").glob("strip*"))
    arguments = ["embed", str(checkpoint), str(scene), "--out", str(tmp_path / "map.tif"), "--allow", "level=a test"]
    assert cli.main(arguments) == 0
    before = scene.read_bytes()
    with pytest.raises(ValueError, match="scene.tif: is a file of the scene itself; choose another name"):
        ok.embed(model, scene, scene, allow={"level": "a test"})
    assert scene.read_bytes() == before
    write_scene(tmp_path / "empty.tif", 20, 20)
    with pytest.raises(ValueError, match="no tile has a share of 0.5 of its pixels measured"):
        ok.embed(model, tmp_path / "empty.tif", tmp_path / "empty_map.tif")
    assert not (tmp_path / "empty_map.tif.partial").exists()


def test_a_torn_scene_stops_the_run_and_what_was_done_is_kept(tmp_path, model):
    scene = tmp_path / "scene.tif"
    write_scene(scene, 32 * 8, 32)
    whole = scene.read_bytes()
    scene.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="scene.tif: torn"):
        scenes.embed_scene(model, scene, tmp_path / "map.tif", cut=Cut(tile=32))


# -- patches under the protocols of pictures --------------------------------------------------------------------------------


@pytest.fixture
def patches(tmp_path):
    """Two classes that differ in their near infrared, in two parts."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 5)):
        for label, name in enumerate(("Forest", "River")):
            for number in range(count):
                values = rng.integers(500, 700, (4, 16, 16)).astype(np.uint16)
                values[3] += 2000 * (1 - label)
                path = tmp_path / part / name / f"{name}_{number}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                with rasterio.open(path, "w", driver="GTiff", width=16, height=16, count=4, dtype="uint16") as dataset:
                    dataset.write(values)
    (tmp_path / "bands.json").write_text(json.dumps({**SAID, "channels": NAMES}))
    return tmp_path


def test_evaluate_takes_patches_as_it_takes_pictures(patches, checkpoint, capsys):
    out = patches / "records.jsonl"
    assert cli.main(["evaluate", str(checkpoint), "--data", str(patches), "--protocol", "knn", "logistic", "--out", str(out)]) == 0
    records = verbs.read_records(out)
    assert [record.protocol.partition("/")[0] for record in records] == ["knn", "logistic"]
    bank, queries = (extract_features(ok.load(str(checkpoint)), open_source(patches / part)) for part in ("train", "test"))
    assert records[0].value == evaluate_features(bank, queries, "knn/v1").value and records[0].n == 10
    assert records[1].value == 1.0
    capsys.readouterr()
    shutil.copy(patches / "test/River/River_0.tif", patches / "test/River/River_9.tif")
    (patches / "test/River/River_9.tif").write_bytes(b"II*\0torn")
    assert cli.main(["evaluate", "raw-pixels", "--data", str(patches)]) == 1
    assert "raw-pixels measures pictures, and test holds rasters of bands" in capsys.readouterr().err


def test_features_of_patches_are_those_of_their_bands(patches, model):
    (patches / "test/Forest/Forest_1.tif").write_bytes(b"II*\0torn")
    source = open_source(patches / "test")
    found = extract_features(model, source, batch=4, workers=1)
    assert [name for _, name in found.bad] != [] and len(found) == 9 and found.bad[0][0] == 1
    with rasterio.open(patches / "test" / found.ids[-1]) as dataset:
        values = dataset.read()
    np.testing.assert_allclose(found.features[-1], vectors(model, values, 16, 16, 1, 1)[:, 0, 0], atol=1e-5)


def test_patches_are_cropped_and_mirrored_for_training(patches, model):
    source, head = open_source(patches / "train"), Classifier(model, ("Forest", "River"), crop_scale=(1.0, 1.0), flip=1.0)
    sample = source[0]
    made = head.transform(model.preprocess)(sample, seed=0)
    mirrored = replace(sample["image"], values=sample["image"].values[..., ::-1])
    torch.testing.assert_close(made["image"], model.preprocess(image=mirrored)["image"][0])
    part = Classifier(model, ("Forest", "River"), crop_scale=(0.3, 0.5), flip=0.0).transform(model.preprocess)(sample, seed=1)
    assert part["image"].shape == (4, 14, 14) and not torch.equal(part["image"], made["image"].flip(-1))
    with pytest.raises(ValueError, match="RandAugment is made for pictures"):
        Classifier(model, ("Forest", "River"), randaugment="rand-m5-n1").transform(model.preprocess)(sample, seed=0)


def test_embed_writes_patches_to_parquet_too(patches, checkpoint):
    from pyarrow import parquet

    ok.embed(str(checkpoint), str(patches / "test"), patches / "rows.parquet", batch=4)
    table = parquet.read_table(patches / "rows.parquet")
    assert table.num_rows == 10 and table.column("id")[0].as_py() == "Forest/Forest_0.tif"
