"""Studies in NIfTI files: what is found, what is refused, and that preparation equals MONAI's and never depends on workers."""

from __future__ import annotations

import contextlib
import gzip
import pickle
import shutil

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from okavango import verbs
from okavango.data import studies
from okavango.data.loading import Batches, batch_loader
from okavango.data.sources import BadSample, ImageFolder, open_source
from okavango.data.studies import (
    Augment,
    Prepare,
    Prepared,
    Studies,
    StudyTransform,
    Unreadable,
    monai_transforms,
    read_scan,
    regions,
    write_scan,
)
from okavango.models.preprocess import Preprocess, PreprocessError, Resize, Volume
from okavango.models.volume import Scan, undo

torch.set_num_threads(1)
NAMES = ("t1", "t1ce", "t2", "flair")
AFFINE = np.array([[-1.0, 0, 0, 10], [0, -1, 0, 20], [0, 0, 1, -5], [0, 0, 0, 1]])
SHAPE = (24, 22, 20)


def brain_preprocess(**more) -> Preprocess:
    more = {"size": (16, 16, 16), "resize": Resize(rule="crop", interpolation="bilinear"), **more}
    return Preprocess({name: Volume(channels=(name,), **more) for name in NAMES})


def volume(seed: int, shape=SHAPE, kind=np.int16) -> np.ndarray:
    values = np.random.default_rng(seed).integers(1, 900, shape)
    values[:3], values[:, -4:] = 0, 0
    return values.astype(kind)


def save(path, values, affine=AFFINE, image=nibabel.Nifti1Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image(values, affine), path)


def labels(*numbers: int, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(7).choice((0, *numbers), shape).astype(np.uint8)


def brats(root, ids=("BraTS2021_00000", "BraTS2021_00002", "BraTS2021_00003"), **more) -> None:
    for number, id in enumerate(ids):
        for k, name in enumerate(NAMES):
            save(root / id / f"{id}_{name}.nii.gz", volume(10 * number + k, **more))
        save(root / id / f"{id}_seg.nii.gz", labels(1, 2, 4))


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("image", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_files_are_read_as_nibabel_reads_them(tmp_path, kind, ending, image):
    path = tmp_path / f"x{ending}"
    save(path, volume(0, kind=kind), image=image)
    got, want = read_scan(path), nibabel.load(path)
    np.testing.assert_array_equal(got.values, want.get_fdata())
    np.testing.assert_allclose(got.affine, want.affine)
    assert got.name == path.name and got.values.dtype == kind


def test_scaled_big_endian_and_joined_files(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(volume(0), AFFINE, header)
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "x.nii")
    want = nibabel.load(tmp_path / "x.nii").get_fdata()
    np.testing.assert_allclose(read_scan(tmp_path / "x.nii").values, want, rtol=1e-6)
    data = (tmp_path / "x.nii").read_bytes()
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + b"\0" * 512)
    np.testing.assert_allclose(read_scan(tmp_path / "y.nii.gz").values, want, rtol=1e-6)


def test_a_last_axis_of_one_is_dropped_and_others_are_refused(tmp_path):
    save(tmp_path / "one.nii.gz", volume(0)[..., None])
    assert read_scan(tmp_path / "one.nii.gz").values.shape == SHAPE
    save(tmp_path / "four.nii.gz", np.stack([volume(0), volume(1)], -1))
    with pytest.raises(ValueError, match="has 4 axes, 24x22x20x2; expected one three-dimensional volume"):
        read_scan(tmp_path / "four.nii.gz")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.99))
def test_torn_files_are_unreadable(tmp_path_factory, ending, share):
    folder = tmp_path_factory.mktemp("torn")
    save(folder / f"x{ending}", volume(0))
    data = (folder / f"x{ending}").read_bytes()
    (folder / f"y{ending}").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(Unreadable) as caught:
        read_scan(folder / f"y{ending}")
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=600), packed=st.booleans())
def test_noise_never_raises_anything_else(tmp_path_factory, data, packed):
    path = tmp_path_factory.mktemp("noise") / ("x.nii.gz" if packed else "x.nii")
    path.write_bytes(gzip.compress(data) if packed else data)
    with contextlib.suppress(ValueError):
        read_scan(path)


def test_missing_files_say_so(tmp_path):
    with pytest.raises(Unreadable, match="No such file"):
        read_scan(tmp_path / "x.nii.gz")


def test_what_is_written_is_read_and_says_what_it_is(tmp_path):
    values = volume(0)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_scan(tmp_path / name, values, AFFINE, "semi-synthetic")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    image = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), values)
    np.testing.assert_allclose(image.affine, AFFINE)
    assert image.header["descrip"].item() == b"semi-synthetic" and image.get_data_dtype() == np.int16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]
    write_scan(tmp_path / "mask.nii", torch.from_numpy(values > 5), AFFINE)
    assert read_scan(tmp_path / "mask.nii").values.dtype == np.uint8


# -- what is found --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "brats2020": "BraTS20_Training_001/BraTS20_Training_001_{}.nii:t1 t1ce t2 flair seg",
    "brats2021": "BraTS2021_00000/BraTS2021_00000_{}.nii.gz:t1 t1ce t2 flair seg",
    "brats2023": "BraTS-GLI-00000-000/BraTS-GLI-00000-000-{}.nii.gz:t1n t1c t2w t2f seg",
    "upenn": "UPENN-GBM-00001_11/UPENN-GBM-00001_11_{}.nii.gz:T1 T1GD T2 FLAIR segm",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(tmp_path, layout):
    pattern, _, endings = LAYOUTS[layout].partition(":")
    *sequences, seg = endings.split()
    for k, ending in enumerate(sequences):
        save(tmp_path / pattern.format(ending), volume(k))
    save(tmp_path / pattern.format(seg), labels(1, 2))
    (tmp_path / "name_mapping.csv").write_text("not,for,us\n")
    source = open_source(str(tmp_path))
    assert isinstance(source, Studies) and source.modalities == NAMES and list(source.ids) == [pattern.split("/")[0]]
    sample = source[0]
    for k, name in enumerate(NAMES):
        np.testing.assert_array_equal(sample[name].values, volume(k))
    np.testing.assert_array_equal(sample["seg"].values, labels(1, 2))
    assert sample["present"] == NAMES and sample["id"] == source.ids[0] and "label" not in sample
    assert sample["codes"] == ("brats2023" if layout == "brats2023" else "brats")
    np.testing.assert_allclose(sample["affine"], AFFINE)


def test_upenns_folders_are_joined_and_the_corrected_segmentation_wins(tmp_path):
    id = "UPENN-GBM-00002_11"
    save(tmp_path / "images_structural" / id / f"{id}_T1.nii.gz", volume(0))
    save(tmp_path / "images_structural_unstripped" / id / f"{id}_T1_unstripped.nii.gz", volume(1))
    save(tmp_path / "automated_segm" / f"{id}_automated_approx_segm.nii.gz", labels(1, 2))
    assert Studies(tmp_path)[0]["seg"].name == f"{id}_automated_approx_segm.nii.gz"
    save(tmp_path / "images_segm" / f"{id}_segm.nii.gz", labels(1, 2, 4))
    source = Studies(tmp_path)
    assert len(source) == 1 and source.modalities == ("t1",) and source[0]["seg"].name == f"{id}_segm.nii.gz"


def test_a_segmentation_under_a_strange_name_joins_the_study_of_its_folder(tmp_path):
    save(tmp_path / "BraTS20_Training_355" / "BraTS20_Training_355_t1.nii", volume(0))
    save(tmp_path / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii", labels(1, 2, 4))
    source = Studies(tmp_path)
    assert list(source.ids) == ["BraTS20_Training_355"] and source[0]["seg"].name == "W39_1998.09.19_Segm.nii"


def test_two_files_for_one_sequence_are_refused(tmp_path):
    save(tmp_path / "a" / "x_t1.nii.gz", volume(0))
    save(tmp_path / "b" / "x_t1n.nii.gz", volume(0))
    with pytest.raises(ValueError, match="study x has two files for t1: .*x_t1.nii.gz and .*x_t1n.nii.gz"):
        Studies(tmp_path)


def test_nothing_there(tmp_path):
    save(tmp_path / "scan.nii.gz", volume(0))
    with pytest.raises(ValueError, match="no studies in .*; expected files such as ID_t1.nii.gz"):
        open_source(tmp_path)


def test_the_first_picture_or_scan_tells_what_a_folder_is(tmp_path):
    from PIL import Image

    (tmp_path / "cats").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "cats" / "a.png")
    save(tmp_path / "scans" / "x_t1.nii.gz", volume(0))
    assert isinstance(open_source(tmp_path / "cats"), ImageFolder)
    assert isinstance(open_source(tmp_path), ImageFolder)
    assert isinstance(open_source(tmp_path / "scans"), Studies)


def test_digest_follows_content_not_place(tmp_path):
    brats(tmp_path / "a", ids=["x", "y"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = Studies(tmp_path / "a"), Studies(tmp_path / "b")
    assert a.digest == b.digest == pickle.loads(pickle.dumps(a)).digest
    (tmp_path / "b" / "x" / "x_t2.nii.gz").unlink()
    assert Studies(tmp_path / "b").digest != a.digest


# -- tables ---------------------------------------------------------------------------------------------------------------


def table(folder, text: str):
    for name in ("a1", "a2", "b1", "b2"):
        save(folder / "scans" / f"{name}.nii.gz", volume(ord(name[0]) + int(name[1])))
    save(folder / "scans" / "seg.nii.gz", labels(1, 2))
    path = folder / "studies.csv"
    path.write_text(text)
    return path


def test_a_table_of_paths(tmp_path):
    path = table(
        tmp_path,
        "\ufeffid,T1Gd,t2f,PET,Seg,age,label,time,event,split\n"
        "one,scans/a1.nii.gz,scans/a2.nii.gz,,scans/seg.nii.gz,50,wild,1.5,1,train\n"
        "two,scans/b1.nii.gz,,scans/b2.nii.gz,,60,mutant,2,0,train\n"
        "three,scans/b1.nii.gz,,,,70,wild,,,test\n",
    )
    source = open_source(f"{path}:train")
    assert source.modalities == ("t1ce", "flair", "pet") and list(source.ids) == ["one", "two"] and source.name == "studies-train"
    assert source.classes == ("mutant", "wild") and source.labels.tolist() == [1, 0]
    one, two = source[0], source[1]
    np.testing.assert_array_equal(one["flair"].values, volume(ord("a") + 2))
    np.testing.assert_array_equal(two["pet"].values, volume(ord("b") + 2))
    assert (one["present"], one["label"], one["time"], one["event"]) == (("t1ce", "flair"), 1, 1.5, True)
    assert two["present"] == ("t1ce", "pet") and "seg" in one and "seg" not in two and two["event"] is False
    assert "time" not in open_source(f"{path}:test")[0]
    with pytest.raises(ValueError, match=r"holds the splits test, train; name one of them: studies.csv:test"):
        open_source(str(path))
    with pytest.raises(ValueError, match="holds the splits"):
        open_source(f"{path}:val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,age\n1,2\n", "no column of NIfTI paths; expected t1, t1ce"),
        ("", "no column of NIfTI paths"),
        ("t1,t1n\nscans/a1.nii.gz,scans/a2.nii.gz\n", "columns 't1' and 't1n' both mean t1"),
        ("id,t1\nx,scans/a1.nii.gz\nx,scans/a2.nii.gz\n", "two rows have the id 'x'"),
        ("t1,label\nscans/a1.nii.gz,x\nscans/a2.nii.gz,\n", "study 2 has no label, others have"),
        ("t1,time\nscans/a1.nii.gz,soon\n", "row 1: time is 'soon'; expected a number"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Studies(table(tmp_path, text))


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere.csv: No such file"):
        open_source(tmp_path / "nowhere.csv")


# -- missing and bad ------------------------------------------------------------------------------------------------------


def test_missing_and_torn_sequences_are_absent_or_bad_as_the_user_says(tmp_path):
    brats(tmp_path, ids=["x", "y", "z"])
    (tmp_path / "x" / "x_t2.nii.gz").unlink()
    torn = tmp_path / "y" / "y_flair.nii.gz"
    torn.write_bytes(torn.read_bytes()[:3000])
    absent, bad = Studies(tmp_path), Studies(tmp_path, missing="bad")
    assert absent[0]["present"] == ("t1", "t1ce", "flair") and "t2" not in absent[0]
    with pytest.warns(
        UserWarning, match=r"study y: y_flair.nii.gz cannot be read \(the gzip stream is cut off\); the sequence is left"
    ):
        assert absent[1]["present"] == ("t1", "t1ce", "t2")
    with pytest.raises(BadSample, match="x: lacks t2"):
        bad[0]
    with pytest.raises(BadSample, match="y: y_flair.nii.gz cannot be read"):
        bad[1]
    assert bad[2]["present"] == NAMES
    assert absent[0]["absent"] == ["t2 is missing"] and "absent" not in absent[2]
    with pytest.raises(ValueError, match="missing 'maybe'"):
        Studies(tmp_path, missing="maybe")


@pytest.mark.filterwarnings("ignore:study")
def test_a_study_without_any_sequence_and_torn_labels_are_bad(tmp_path):
    brats(tmp_path, ids=["x", "y"])
    for name in NAMES:
        (tmp_path / "x" / f"x_{name}.nii.gz").write_bytes(b"")
    (tmp_path / "y" / "y_seg.nii.gz").write_bytes(b"")
    with pytest.raises(BadSample, match="x: none of its sequences can be read"):
        Studies(tmp_path)[0]
    with pytest.raises(BadSample, match="y: y_seg.nii.gz cannot be read"):
        Studies(tmp_path)[1]


SPOILS = {
    "another grid": (
        "t2",
        volume(0, (24, 22, 21)),
        AFFINE,
        "x_t2.nii.gz has 24x22x21 voxels of 1x1x1 mm, x_t1.nii.gz has 24x22x20",
    ),
    "another place": ("t2", volume(0), AFFINE + np.eye(4, k=3) * 6, "x_t2.nii.gz stands up to 6.0 mm away from x_t1.nii.gz"),
    "another orientation": ("t2", volume(0), np.diag([1, 1, 1, 1]), "x_t2.nii.gz is stored as RAS and x_t1.nii.gz as LPS"),
    "4D": (
        "t2",
        np.stack([volume(0)] * 3, -1),
        AFFINE,
        "x_t2.nii.gz has 4 axes, 24x22x20x3; expected one three-dimensional volume",
    ),
    "zeros": ("t2", np.zeros(SHAPE, np.int16), AFFINE, "x_t2.nii.gz: all voxels are zero"),
    "NaN": ("t2", np.full(SHAPE, np.nan, np.float32), AFFINE, "x_t2.nii.gz: has values that are not finite"),
    "unknown label": (
        "seg",
        labels(1, 2, 3),
        AFFINE,
        "x_seg.nii.gz: label 3 is unknown to 'brats', which has [0, 1, 2, 4]; codes='brats2023'",
    ),
    "labels between": ("seg", labels(1).astype(np.float32) / 2, AFFINE, "x_seg.nii.gz: labels are not whole numbers"),
    "labels on another grid": ("seg", labels(1, shape=(12, 11, 10)), AFFINE, "x_seg.nii.gz has 12x11x10 voxels"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_bad_studies_name_the_file(tmp_path, spoil):
    name, values, affine, message = SPOILS[spoil]
    brats(tmp_path, ids=["x"])
    save(tmp_path / "x" / f"x_{name}.nii.gz", values, np.asarray(affine, float))
    prepared = Prepared(Studies(tmp_path), Prepare(brain_preprocess(), "regions"))
    with pytest.raises(BadSample) as caught:
        prepared[0]
    assert caught.value.id == "x" and message in caught.value.reason and "\n" not in str(caught.value)


def test_other_orientations_are_turned_where_the_spec_wants_one(tmp_path):
    brats(tmp_path, ids=["x"])
    want = Prepared(Studies(tmp_path), Prepare(brain_preprocess(orientation="RAS"), "regions"))[0]
    image = nibabel.as_closest_canonical(nibabel.load(tmp_path / "x" / "x_t2.nii.gz"))
    seg = nibabel.as_closest_canonical(nibabel.load(tmp_path / "x" / "x_seg.nii.gz"))
    save(tmp_path / "x" / "x_t2.nii.gz", np.asarray(image.dataobj), image.affine)
    save(tmp_path / "x" / "x_seg.nii.gz", np.asarray(seg.dataobj), seg.affine)
    got = Prepared(Studies(tmp_path), Prepare(brain_preprocess(orientation="RAS"), "regions"))[0]
    assert all(torch.equal(got[name], want[name]) for name in (*NAMES, "seg"))


# -- labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes", "enhancing"), [("brats", 4), ("brats2023", 3), ("brats2024", 3)])
def test_regions_equal_monais(codes, enhancing):
    from monai.transforms import ConvertToMultiChannelBasedOnBratsClasses

    values = labels(1, 2, enhancing)
    want = ConvertToMultiChannelBasedOnBratsClasses(et_label=enhancing)(torch.from_numpy(values))
    assert torch.equal(regions(values, codes), want.bool())


def test_the_cavity_of_2024_is_no_tumour():
    values = np.array([[[0, 1, 2, 3, 4]]])
    assert regions(values, "brats2024")[:, 0, 0].int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 0]]
    with pytest.raises(PreprocessError, match="label 4 is unknown to 'brats2023'.*codes='brats2024'"):
        regions(values, "brats2023", "x-seg.nii.gz")


def test_labels_keep_their_numbers_when_wanted_and_their_place(tmp_path):
    """At 2 mm the reference program loses the label's affine; here label and picture agree after resampling and on the way back."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    seg = np.zeros((12, 12, 12), np.uint8)
    seg[3:7, 4:9, 5:8] = 2
    for name in NAMES:
        save(tmp_path / f"x_{name}.nii.gz", (seg * 100 + 7).astype(np.int16), affine)
    save(tmp_path / "x_seg.nii.gz", seg, affine)
    spec = brain_preprocess(spacing=(1.0, 1.0, 1.0), size=(20, 20, 20))
    got = Prepared(Studies(tmp_path), Prepare(spec, "labels"))[0]
    assert got["seg"].dtype == torch.int64 and got["seg"].shape == (1, 20, 20, 20)
    bright = got["t1"][0] > 0.5 * got["t1"].max()
    overlap = (bright & (got["seg"][0] == 2)).sum() / (bright | (got["seg"][0] == 2)).sum()
    assert overlap > 0.65  # it is 0 where the label stays at 2 mm
    back = undo(got["geometry"], got["seg"], nearest=True)[0]
    inside = undo(got["geometry"], torch.ones(20, 20, 20), nearest=True).bool()
    np.testing.assert_array_equal(back[inside], torch.from_numpy(seg)[inside])
    assert "seg" not in Prepared(Studies(tmp_path), Prepare(spec))[0]


# -- preparation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"orientation": "RAS"},
        {"spacing": (1.0, 1.0, 1.0), "size": (32, 24, 20)},
        {"spacing": (2.0, 1.5, 1.0), "orientation": "PIR", "size": (12, 20, 16)},
    ],
    ids=str,
)
def test_preparation_equals_monais_pipeline(tmp_path, spec):
    affine = np.diag([-1.2, -0.9, 1.7, 1.0])
    for k, name in enumerate(NAMES):
        save(tmp_path / f"x_{name}.nii.gz", volume(k), affine)
    preprocess = brain_preprocess(**spec)
    source = Studies(tmp_path)
    got = Prepared(source, Prepare(preprocess))[0]
    want = monai_transforms(preprocess, NAMES)({name: str(path) for name, path in source.files[0].items()})
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name].as_tensor(), atol=5e-3, rtol=0)
        np.testing.assert_allclose(got["geometry"].placed(), want[name].affine, atol=1e-6)


def test_what_monai_has_no_transform_for():
    with pytest.raises(ValueError, match="MONAI has no transforms for foreground True"):
        monai_transforms(brain_preprocess(foreground=True), NAMES)


def test_sequences_that_the_network_does_not_know_are_left_out(tmp_path):
    brats(tmp_path, ids=["x"])
    for name in ("t1", "flair"):
        (tmp_path / "x" / f"x_{name}.nii.gz").write_bytes(b"never read")
    preprocess = Preprocess(t1gd=Volume(channels=("t1gd",), aliases=(("t1ce", "t1gd"),), size=(8, 8, 8)))
    prepared = Prepared(Studies(tmp_path, missing="bad"), Prepare(preprocess))
    assert prepared[0]["t1gd"].shape == (1, 8, 8, 8) and "flair" not in prepared[0]
    with pytest.raises(ValueError, match="has the sequences t1, t1ce, t2, flair, and the network takes pet; nothing fits"):
        Prepared(Studies(tmp_path), Prepare(Preprocess(pet=Volume(channels=("pet",)))))


def test_arrays_from_other_sources_are_prepared_too():
    prepare = Prepare(brain_preprocess(), "labels")
    sample = {"t1": volume(0), "T2W": torch.from_numpy(volume(1)), "seg": labels(5), "id": "x", "label": 3}
    with pytest.raises(BadSample, match="has none of the sequences"):
        prepare({"id": "x"})
    preprocess = Preprocess({n: Volume(channels=(n,), aliases=((n + "w", n),), size=(16, 16, 16)) for n in NAMES})
    got = Prepare(preprocess, "labels")(sample)
    assert set(got) == {"t1", "t2", "seg", "id", "label", "geometry"}
    assert Prepare(preprocess)(got).keys() == got.keys()  # once prepared, it stays


# -- the cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_gives_the_same_and_reads_no_scan(tmp_path, monkeypatch):
    brats(tmp_path / "data")
    (tmp_path / "data" / "BraTS2021_00002" / "BraTS2021_00002_t2.nii.gz").unlink()
    source, prepare = Studies(tmp_path / "data"), Prepare(brain_preprocess(), "regions")
    plain, kept = Prepared(source, prepare), Prepared(source, prepare, tmp_path / "cache")
    first = [kept[index] for index in range(3)]
    monkeypatch.setattr(studies, "read_scan", lambda path: pytest.fail("a scan was read"))
    again = [kept[index] for index in range(3)]
    monkeypatch.undo()
    for got, other, want in zip(first, again, (plain[index] for index in range(3)), strict=True):
        assert set(got) == set(other) == set(want)
        for name, value in want.items():
            for have in (got[name], other[name]):
                if isinstance(value, torch.Tensor):
                    assert torch.equal(have, value) and have.dtype == value.dtype
                elif isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(have, value)
                else:
                    assert have == value
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_the_cache_never_gives_what_is_stale_or_torn(tmp_path):
    brats(tmp_path / "data", ids=["x"])

    def prepared(**spec):
        return Prepared(Studies(tmp_path / "data"), Prepare(brain_preprocess(**spec)), tmp_path / "cache")[0]

    first = prepared()
    assert prepared(size=(12, 12, 12))["t1"].shape == (1, 12, 12, 12)
    save(tmp_path / "data" / "x" / "x_t1.nii.gz", volume(99))
    second = prepared()
    assert not torch.equal(first["t1"], second["t1"]) and torch.equal(first["t2"], second["t2"])
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    assert torch.equal(prepared()["t1"], second["t1"]) and torch.equal(prepared()["t1"], second["t1"])
    with pytest.raises(ValueError, match="only studies from files can be cached"):
        Prepared(open_source("samples/brain"), Prepare(brain_preprocess()), tmp_path / "cache")


# -- augmentation ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path):
    brats(tmp_path, ids=["x"])
    return Prepared(Studies(tmp_path), Prepare(brain_preprocess(orientation="RAS"), "regions"))[0]


def test_augmentation_is_shared_by_all_sequences_and_follows_from_the_seed(sample):
    before = {name: sample[name].clone() for name in (*NAMES, "seg")}
    seen = set()
    for seed in range(16):
        got, again = Augment()(sample, seed), Augment()(sample, seed)
        assert all(torch.equal(got[name], again[name]) for name in (*NAMES, "seg"))
        turned = {name: undo(got["geometry"], got[name]) for name in NAMES}
        still = {name: undo(sample["geometry"], sample[name]) for name in NAMES}
        inside = undo(sample["geometry"], torch.ones(16, 16, 16)) > 0
        fits = [np.polyfit(still[name][0][inside], turned[name][0][inside], 1) for name in NAMES]
        np.testing.assert_allclose(fits, np.broadcast_to(fits[0], (4, 2)), atol=1e-4)
        factor, offset = fits[0]
        assert 0.9 <= factor <= 1.1 and -0.1 <= offset <= 0.1
        back = undo(got["geometry"], got["seg"], nearest=True)
        assert torch.equal(back, undo(sample["geometry"], sample["seg"], nearest=True)) and got["seg"].dtype == torch.bool
        seen.add((round(float(factor), 4), got["geometry"].steps))
    assert len({factor for factor, _ in seen}) == 16 and len({steps for _, steps in seen}) > 3
    assert all(torch.equal(sample[name], before[name]) for name in before)


def test_augmentation_can_be_left_off(sample):
    for quiet in (
        StudyTransform(Prepare(brain_preprocess()), None),
        StudyTransform(Prepare(brain_preprocess()), Augment(flip=0, scale=0, shift=0)),
    ):
        got = quiet(sample, 3)
        assert all(torch.equal(got[name], sample[name]) for name in NAMES)


def test_flips_alone_equal_torchs(sample):
    got = Augment(flip=1, scale=0, shift=0)(sample, 0)
    assert all(torch.equal(got[name], sample[name].flip(-1, -2, -3)) for name in (*NAMES, "seg"))


def stack(samples: list, seed: int) -> dict:
    return {name: torch.stack([each[name] for each in samples]) for name in ("t1", "flair")}


def test_batches_do_not_depend_on_workers(tmp_path):
    brats(tmp_path, ids=["x", "y", "z"])
    (tmp_path / "y" / "y_t1.nii.gz").write_bytes(b"torn")
    source = Studies(tmp_path, missing="bad")
    transform = StudyTransform(Prepare(brain_preprocess()))
    batches = Batches(source, transform, stack, batch=2, seed=0)
    runs = [[batch for _, _, batch in batch_loader(batches, 0, 4, workers=workers)] for workers in (0, 2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a["t1"], b["t1"]) and torch.equal(a["flair"], b["flair"]) and a["bad"] == b["bad"]
    bad = {entry for batch in runs[0] for entry in batch["bad"]}
    assert {id for id, _ in bad} == {"y"} and all("y_t1.nii.gz" in reason for _, reason in bad)
    later = [batch for _, _, batch in batch_loader(batches, 2, 4)]
    assert torch.equal(later[0]["t1"], runs[0][2]["t1"])  # resumed in the middle


def test_a_scan_in_a_sample_goes_to_the_preprocess_as_it_is(tmp_path):
    brats(tmp_path, ids=["x"])
    sample, preprocess = Studies(tmp_path)[0], brain_preprocess(spacing=(1.0, 1.0, 1.0))
    got = preprocess(**{name: sample[name] for name in sample["present"]})
    want = Prepare(preprocess)(sample)
    assert isinstance(sample["t1"], Scan) and all(torch.equal(got[name][0], want[name]) for name in NAMES)


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_on_studies_resumes_exactly_whatever_the_workers_and_the_cache(tmp_path):
    """Five steps at once, and the last three of them again from the state after two: the same weights, bit for bit."""
    brats(tmp_path / "data" / "train", ids=["u", "v", "w", "x"])
    (tmp_path / "data" / "train" / "u" / "u_t2.nii.gz").unlink()
    args = {"size": (16, 16, 16), "patch_size": 8, "width": 24, "depth": 1, "heads": 2, "mlp": 24, "orientation": "RAS"}
    small = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp": 24}
    changes = {f"objective.{name}": value for name, value in small.items()} | {"model_args": args, "steps": 5, "batch": 2}
    changes |= {"save_every": 2, "keep": 9, "trackers": (), "say": lambda line: None, "data": str(tmp_path / "data")}
    whole = verbs.pretrain("bm_mae_tiny", out=tmp_path / "whole", workers=0, **changes)
    shutil.copytree(whole / "state" / "step-00000002", tmp_path / "part" / "state" / "step-00000002")
    part = verbs.pretrain("bm_mae_tiny", out=tmp_path / "part", workers=2, **changes)
    weights = [load_file(run / "export" / "model.safetensors") for run in (whole, part)]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    kept = verbs.pretrain(
        "bm_mae_tiny", out=tmp_path / "kept", workers=1, **changes, **{"objective.cache": str(tmp_path / "cache")}
    )
    assert len(list((tmp_path / "cache").iterdir())) == 4
    cached = load_file(kept / "export" / "model.safetensors")
    assert all(torch.equal(weights[0][name], cached[name]) for name in cached)
