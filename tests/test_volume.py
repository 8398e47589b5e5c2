"""Volumes: what a spec does to scans, held against nibabel, torch and MONAI, and that the way back is one."""

from __future__ import annotations

import json
import pickle

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.models.preprocess import Normalise, Preprocess, PreprocessError, Resize, Volume
from okavango.models.volume import Geometry, Resample, Scan, Turn, carry, orientation, prepare, sizes, undo

torch.set_num_threads(1)
CODES = [
    a + b + c
    for letters in ("RAS", "RSA", "ARS", "ASR", "SRA", "SAR")
    for a in (letters[0], "LPI"["RAS".index(letters[0])])
    for b in (letters[1], "LPI"["RAS".index(letters[1])])
    for c in (letters[2], "LPI"["RAS".index(letters[2])])
]
NONE = Normalise(rule="none")


def affine_of(codes: str, shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0), tilt: float = 0.0) -> np.ndarray:
    """An affine of that orientation, tilted by a small angle about all axes, which puts the middle of the array somewhere."""
    matrix = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(tuple(codes)), shape)
    matrix = np.linalg.inv(matrix) @ np.diag([1, 1, 1, 1])
    matrix[:3, :3] = matrix[:3, :3] @ np.diag(spacing)
    c, s = np.cos(tilt), np.sin(tilt)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    matrix[:3, :3] = turn @ matrix[:3, :3]
    matrix[:3, 3] = (3.0, -7.0, 11.0)
    return matrix


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(5, 1, shape).astype(np.float32)


def plain(size=(8, 8, 8), rule: str = "crop", **more) -> Volume:
    resize = more.pop("resize", Resize(rule=rule, interpolation="bilinear"))
    return Volume(channels=("t1",), size=size, resize=resize, normalise=more.pop("normalise", NONE), **more)


def placed(spec: Volume, scan: Scan | np.ndarray) -> tuple[torch.Tensor, Geometry]:
    volumes, geometry = prepare(Preprocess(t1=spec), {"t1": scan})
    return volumes["t1"][0], geometry


# -- orientation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", CODES)
def test_orientation_names_axes_as_nibabel_does(codes):
    affine = affine_of(codes, tilt=0.3)
    assert orientation(affine) == codes == "".join(nibabel.aff2axcodes(affine))


@settings(max_examples=30, deadline=None)
@given(codes=st.sampled_from(CODES), wanted=st.sampled_from(CODES), tilt=st.floats(-0.3, 0.3))
def test_turning_equals_nibabels(codes, wanted, tilt):
    values = noise(5, 6, 7)
    affine = affine_of(codes, values.shape, (1, 2, 3), tilt)
    image = nibabel.Nifti1Image(values, affine)
    ornt = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(wanted))
    want = image.as_reoriented(ornt)
    got, geometry = placed(plain(rule="none", orientation=wanted), Scan(values, affine))
    np.testing.assert_array_equal(got, want.get_fdata())
    np.testing.assert_allclose(geometry.placed(), want.affine, atol=1e-9)
    np.testing.assert_array_equal(undo(geometry, got), values)


# -- the way back ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    codes=st.sampled_from(CODES),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    foreground=st.booleans(),
    channels=st.integers(1, 3),
)
def test_undo_gives_back_what_was_not_cut(codes, shape, size, foreground, channels):
    values = np.random.default_rng(sum(shape)).integers(0, 3, shape).astype(np.int16)
    values.flat[-1] = 1
    got, geometry = placed(plain(size, orientation="RAS", foreground=foreground), Scan(values, affine_of(codes, shape)))
    assert tuple(got.shape) == size == geometry.size
    inside = undo(geometry, carry(geometry, np.ones(shape, np.uint8), nearest=True), nearest=True).bool().numpy()
    back = undo(geometry, got, fill=-1).numpy()
    np.testing.assert_array_equal(back[inside], values[inside])
    assert (back[~inside] == -1).all()
    if not foreground:
        turned = next((step.after for step in geometry.steps if isinstance(step, Turn)), shape)
        assert inside.sum() == np.prod(np.minimum(turned, size))
    labels = np.stack([values + k for k in range(channels)])
    there = carry(geometry, labels, nearest=True)
    assert there.dtype == torch.int16 and tuple(there.shape) == (channels, *size)
    np.testing.assert_array_equal(undo(geometry, there, nearest=True).numpy()[:, inside], labels[:, inside])
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry == pickle.loads(pickle.dumps(geometry))


@settings(max_examples=40, deadline=None)
@given(
    codes=st.sampled_from(CODES),
    shape=st.tuples(*[st.integers(3, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.7, 2.5)] * 3),
    size=st.tuples(*[st.integers(3, 12)] * 3),
    rule=st.sampled_from(["crop", "exact", "pad", "shortest"]),
    corners=st.sampled_from(["half_pixel", "aligned"]),
)
def test_every_voxel_stays_where_it_is_in_space(codes, shape, spacing, size, rule, corners):
    """Volumes of millimetre coordinates: what is read at a voxel is where the affine says that it is, there and back again."""
    affine = affine_of(codes, shape, spacing, tilt=0.1)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    world = np.einsum("ij,jabc->iabc", affine[:3, :3], index) + affine[:3, 3][:, None, None, None]
    resize = Resize(rule=rule, interpolation="bilinear", antialias=False, corners=corners)
    wanted = (1.0, 1.5, 1.2) if rule == "crop" else None  # one resampling: between two, the outermost voxels stand in
    spec = plain(size, resize=resize, orientation="RAS", spacing=wanted)
    _, geometry = placed(spec, Scan(np.ones(shape, np.float32), affine))
    assert orientation(geometry.placed()) == "RAS"
    moved = carry(geometry, world)
    weight = carry(geometry, np.ones(shape))  # 0 in padding
    new_index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).reshape(3, -1)
    old = geometry.matrix()[:3, :3] @ new_index + geometry.matrix()[:3, 3:]
    inside = ((old >= -1e-6) & (old <= np.array(shape)[:, None] - 1 + 1e-6)).all(0).reshape(size) & (weight.numpy() > 0.99)
    where = (geometry.placed()[:3, :3] @ new_index + geometry.placed()[:3, 3:]).reshape(3, *size)
    np.testing.assert_allclose(moved.numpy()[:, inside], where[:, inside], atol=2e-3)
    again = undo(geometry, moved)
    if not inside.any():
        return
    back = np.linalg.inv(geometry.matrix())
    new = (back[:3, :3] @ index.reshape(3, -1) + back[:3, 3:]).reshape(index.shape)
    corners_of = np.argwhere(inside)
    low, high = (edge[:, None, None, None] for edge in (corners_of.min(0) - 1e-6, corners_of.max(0) + 1e-6))
    known = ((new >= low) & (new <= high)).all(0)  # beyond, the outermost voxel stands in
    np.testing.assert_allclose(again.numpy()[:, known], world[:, known], atol=5e-3)


def test_volumes_of_other_grids_are_refused_on_the_way():
    got, geometry = placed(plain((4, 4, 4)), noise(5, 6, 7))
    with pytest.raises(PreprocessError, match="8x8x8 voxels does not stand on the network's grid of 4x4x4"):
        undo(geometry, noise(8, 8, 8))
    with pytest.raises(PreprocessError, match="stored grid of 5x6x7"):
        carry(geometry, got)


# -- resampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corners", ["half_pixel", "aligned"])
@pytest.mark.parametrize("size", [(5, 9, 12), (11, 6, 3), (7, 8, 9)])
def test_linear_scaling_equals_torchs(corners, size):
    values = noise(7, 8, 9)
    resize = Resize(rule="exact", interpolation="bilinear", antialias=False, corners=corners)
    got, _ = placed(plain(size, resize=resize), values)
    tensor = torch.from_numpy(values)[None, None]
    torch.testing.assert_close(got, F.interpolate(tensor, size, mode="trilinear", align_corners=corners == "aligned")[0, 0])


@pytest.mark.parametrize("size", [(3, 20), (5, 9), (30, 4)])
def test_the_low_pass_filter_equals_torchs(size):
    values = torch.from_numpy(noise(1, 12, 20))
    got, _ = placed(plain((1, *size), resize=Resize(rule="exact", interpolation="bilinear")), values)
    torch.testing.assert_close(got[0], F.interpolate(values[None], size, mode="bilinear", antialias=True)[0, 0])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.7, 1.0), (0.9, 1.1, 3.3)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_spacing_equals_monais(spacing, mode):
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    values, affine = noise(9, 10, 11), affine_of("RAS", spacing=(1.3, 1.1, 2.3))
    want = Spacing(spacing, mode=mode)(MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(affine)))
    got, geometry = placed(plain(rule="none", spacing=spacing), Scan(values, affine))
    if mode == "nearest":
        got = carry(geometry, values, nearest=True)
    torch.testing.assert_close(got, want[0].as_tensor(), atol=2e-3, rtol=0)
    np.testing.assert_allclose(geometry.placed(), want.affine, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    have=st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 0.9, 1.1])] * 3),
    wanted=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 4.0, 1.3])] * 3),
)
def test_sides_after_spacing_equal_monais(shape, have, wanted):
    """Halves of a voxel too: 4 voxels of 1 mm are 2.5 of 2 mm."""
    from monai.data.utils import compute_shape_offset

    want, _ = compute_shape_offset(shape, np.diag([*have, 1.0]), np.diag([*wanted, 1.0]))
    _, geometry = placed(plain(rule="none", spacing=wanted), Scan(np.ones(shape, np.float32), np.diag([*have, 1.0])))
    assert geometry.size == tuple(want)


def test_an_array_without_filter_of_equal_spacing_is_left_alone():
    values = noise(4, 5, 6)
    got, geometry = placed(plain(rule="none", spacing=(1, 2, 3)), Scan(values, spacing=(1.0001, 2.0, 3.0)))
    assert not geometry.steps and geometry.placed() is None
    np.testing.assert_array_equal(got, values)


def test_interpolations_without_a_third_dimension_are_refused():
    with pytest.raises(PreprocessError, match="interpolation 'bicubic' of volumes; expected bilinear or nearest"):
        placed(plain(resize=Resize(rule="exact")), noise(3, 3, 3))


# -- sizes, foreground, normalisation -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 12)] * 3), size=st.tuples(*[st.integers(1, 12)] * 3), fill=st.sampled_from([0.0, 2.5]))
def test_crop_equals_monais(shape, size, fill):
    from monai.transforms import ResizeWithPadOrCrop

    values = noise(*shape)
    want = ResizeWithPadOrCrop(size, constant_values=fill)(torch.from_numpy(values)[None])
    got, _ = placed(plain(size, resize=Resize(rule="crop", fill=fill)), values)
    torch.testing.assert_close(got, want[0].as_tensor(), rtol=0, atol=0)


def test_pad_shows_all_and_shortest_fills_all():
    values = noise(8, 4, 4)
    padded, geometry = placed(plain((4, 4, 4), resize=Resize(rule="pad", interpolation="bilinear")), values)
    assert geometry.steps[0].after == (4, 2, 2) and not padded[:, 0].any() and padded[:, 1:3, 1:3].all()
    filled, geometry = placed(plain((4, 4, 4), resize=Resize(rule="shortest", interpolation="bilinear")), values)
    np.testing.assert_array_equal(filled, values[2:6])


def test_none_checks_multiples():
    spec = plain(resize=Resize(rule="none", multiple_of=4))
    assert placed(spec, noise(4, 8, 12))[0].shape == (4, 8, 12)
    with pytest.raises(PreprocessError, match="4x8x13 voxels: all sides must be multiples of 4"):
        placed(spec, noise(4, 8, 13))


def test_foreground_is_the_box_of_all_sequences_together():
    a, b = np.zeros((2, 9, 9, 9), np.int16)
    a[2, 3, 4], b[6, 5, 4] = 7, -7
    specs = {name: Volume(channels=(name,), foreground=True, resize=Resize(rule="none"), normalise=NONE) for name in ("t1", "t2")}
    volumes, geometry = prepare(Preprocess(specs), {"t1": a, "t2": torch.from_numpy(b)})
    assert geometry.steps[0].start == (2, 3, 4) and geometry.size == (5, 3, 1)
    assert volumes["t1"][0, 0, 0, 0] == 7 and volumes["t2"][0, -1, -1, -1] == -7


def test_units_and_zscore_come_after_the_crop():
    values = np.zeros((8, 8, 8), np.int16)
    values[2:6, 2:6, 2:6] = np.arange(64).reshape(4, 4, 4)
    values[0, 0, 0] = 30_000  # cut off, so it does not count
    got, _ = placed(plain((6, 6, 6), normalise=Normalise(rule="zscore_nonzero"), scale=0.5), values)
    want = values[1:7, 1:7, 1:7] * 0.5
    inside = want[want != 0]
    np.testing.assert_allclose(got, np.where(want != 0, (want - inside.mean()) / inside.std(), 0), atol=1e-5)
    late, _ = placed(
        plain((6, 6, 6), normalise=Normalise(rule="zscore_nonzero"), resize=Resize(rule="crop", on="normalised")), values
    )
    assert late.max() < 1 < got.max()


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float64, ">i2", ">f4", bool])
def test_number_types_and_orders_make_no_difference(kind):
    values = np.random.default_rng(0).integers(0, 2, (5, 6, 7)).astype(kind)
    want = torch.from_numpy(values.astype(np.float32))
    for given_ in (values, np.asfortranarray(values), values[::-1][::-1]):
        before = given_.copy()
        assert torch.equal(placed(plain(rule="none"), given_)[0], want)
        np.testing.assert_array_equal(given_, before)


def test_the_callers_values_stay():
    values = torch.from_numpy(noise(6, 6, 6))
    before = values.clone()
    got, _ = placed(plain((6, 6, 6), normalise=Normalise(rule="zscore")), values)
    got.mul_(3)
    assert torch.equal(values, before)


# -- names and batches ----------------------------------------------------------------------------------------------------

BRAIN = Preprocess(
    {
        "t1": plain((4, 4, 4), aliases=(("t1n", "t1"), ("T1w", "t1"))),
        "flair": Volume(channels=("flair",), aliases=(("t2f", "flair"),), size=(4, 4, 4), normalise=NONE),
    }
)


def test_aliases_in_any_case_and_order():
    a, b = noise(4, 4, 4), noise(4, 4, 4, seed=1)
    want = BRAIN(t1=a, flair=b)
    assert set(want) == {"t1", "flair"} and want["t1"].shape == (1, 1, 4, 4, 4)
    for inputs in ({"T2F": b, "t1n": a}, {"t1W": Scan(a), "FLAIR": b}):
        got = BRAIN(**inputs)
        assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def test_unknown_and_doubled_names():
    with pytest.raises(
        PreprocessError, match=r"unknown modality 'pet': this checkpoint takes t1, flair \(also known as t1n, t1w, t2f"
    ):
        BRAIN(pet=noise(4, 4, 4))
    with pytest.raises(PreprocessError, match="modality 't1' was given twice, once as 't1n'"):
        BRAIN(t1=noise(4, 4, 4), t1n=noise(4, 4, 4))
    with pytest.raises(PreprocessError, match="modality 't1' was given twice"):
        prepare(BRAIN, {"t1": noise(4, 4, 4), "t1n": noise(4, 4, 4)})
    with pytest.raises(PreprocessError, match="the study has no sequence"):
        prepare(BRAIN, {})


def test_a_batch_in_which_studies_lack_sequences():
    a, b, c = (noise(4, 5, 6, seed=seed) for seed in range(3))
    got = BRAIN(flair=[a, None], t1=[b, c])
    assert got["present"].tolist() == [[True, True], [True, False]]
    assert not got["flair"][1].any()
    assert torch.equal(got["flair"][:1], BRAIN(flair=a)["flair"]) and torch.equal(got["t1"][1:], BRAIN(t1=c)["t1"])
    assert "present" not in BRAIN(t1=[b, c], flair=[a, a])
    with pytest.raises(PreprocessError, match="study 1 of the batch has no sequence"):
        BRAIN(flair=[a, None], t1=[b, None])
    with pytest.raises(PreprocessError, match="modality 'flair': all studies lack it"):
        BRAIN(flair=[None, None], t1=[b, c])
    with pytest.raises(PreprocessError, match=r"studies per modality: \{'flair': 1, 't1': 2\}"):
        BRAIN(flair=a, t1=[b, c])


def test_arrays_with_a_leading_axis_are_batches():
    values = noise(3, 4, 4, 4)
    want = torch.cat([BRAIN(t1=each)["t1"] for each in values])
    assert torch.equal(BRAIN(t1=values)["t1"], want)
    assert torch.equal(BRAIN(t1=torch.from_numpy(values)[:, None])["t1"], want)


def test_several_channels_are_put_in_order_by_name():
    spec = Volume(channels=("t1c", "t1", "t2"), aliases=(("t1ce", "t1c"),), size=(4, 4, 4), normalise=NONE)
    preprocess, (a, b, c) = Preprocess(scan=spec), noise(3, 4, 4, 4)
    want = torch.from_numpy(np.stack([a, b, c]))[None]
    assert torch.equal(preprocess(scan={"t1": b, "t2": Scan(c), "T1CE": a})["scan"], want)
    assert torch.equal(preprocess(scan=np.stack([a, b, c]))["scan"], want)
    assert torch.equal(preprocess(scan=[np.stack([a, b, c])] * 2)["scan"], want.expand(2, -1, -1, -1, -1))
    for value in ({"t1": b, "t2": c}, {"t1": b, "t2": c, "flair": a}):
        with pytest.raises(PreprocessError, match="expected one each of t1c, t1, t2"):
            preprocess(scan=value)
    with pytest.raises(PreprocessError, match=r"expected a Scan or an array \(3, D, H, W\)"):
        preprocess(scan=np.stack([a, b]))
    with pytest.raises(PreprocessError, match="one volume, but this checkpoint expects 3"):
        preprocess(scan=Scan(a))


def test_modalities_of_other_grids_are_prepared_apart():
    preprocess = Preprocess(t1=plain((4, 4, 4)), pet=plain((2, 2, 2)))
    got = preprocess(t1=noise(6, 6, 6), pet=noise(3, 3, 3))
    assert got["t1"].shape[-3:] == (4, 4, 4) and got["pet"].shape[-3:] == (2, 2, 2)
    with pytest.raises(PreprocessError, match="'t1' and 'pet' go to different grids"):
        prepare(preprocess, {"t1": noise(6, 6, 6), "pet": noise(6, 6, 6)})


# -- bad input ------------------------------------------------------------------------------------------------------------

BAD = [
    (noise(4, 4, 4, 2, 2), "expected a Scan or an array"),
    (Scan(noise(4, 4, 4, 2), name="perfusion.nii"), "perfusion.nii: got 4x4x4x2; expected one three-dimensional volume"),
    (Scan(np.zeros((4, 4, 4), np.int16), name="empty.nii"), "empty.nii: all voxels are zero"),
    (Scan(np.full((4, 4, 4), np.nan), name="hole.nii"), "hole.nii: has values that are not finite"),
    (np.zeros((0, 4, 4)), "'t1': the volume is empty, its shape is 0x4x4"),
    (np.full((4, 4, 4), "x"), "'t1': values are <U1; expected real numbers"),
    (np.ones((4, 4, 4), np.complex64), "'t1': values are complex64"),
    ("t1.nii", "'t1': got str; expected a Scan or an array"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[message for _, message in BAD])
def test_volumes_that_are_refused(value, message):
    with pytest.raises(PreprocessError) as caught:
        prepare(BRAIN, {"t1": value})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_zero_sums_and_negative_values_are_no_empty_volumes():
    values = np.zeros((4, 4, 4), np.float32)
    values[0, 0, 0], values[1, 1, 1] = 1, -1
    assert torch.equal(placed(plain((4, 4, 4)), values)[0], torch.from_numpy(values))


def test_sequences_on_different_grids_are_named():
    here, there = affine_of("RAS"), affine_of("RAS")
    there[0, 3] += 5
    first = Scan(noise(4, 4, 4), here, name="a_t1.nii.gz")
    with pytest.raises(PreprocessError, match="a_flair.nii.gz has 4x4x5 voxels of 1x1x1 mm, a_t1.nii.gz has 4x4x4 of 1x1x1 mm"):
        prepare(BRAIN, {"t1": first, "flair": Scan(noise(4, 4, 5), here, name="a_flair.nii.gz")})
    with pytest.raises(PreprocessError, match="a_flair.nii.gz stands up to 5.0 mm away from a_t1.nii.gz; register"):
        prepare(BRAIN, {"t1": first, "flair": Scan(noise(4, 4, 4), there, name="a_flair.nii.gz")})
    lps = Scan(noise(4, 4, 4), affine_of("LPS", (4, 4, 4)), name="a_flair.nii.gz")
    with pytest.raises(PreprocessError, match="a_flair.nii.gz is stored as LPS and a_t1.nii.gz as RAS"):
        prepare(BRAIN, {"t1": first, "flair": lps})


def test_other_orientations_are_turned_where_the_spec_says_so():
    values = noise(4, 4, 4)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    lps = Scan(values, affine, name="lps")
    ras_affine = affine @ np.array([[-1, 0, 0, 3], [0, -1, 0, 3], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    ras = Scan(np.ascontiguousarray(values[::-1, ::-1]), ras_affine, name="ras")
    specs = {n: Volume(channels=(n,), size=(4, 4, 4), orientation="RAS", normalise=NONE) for n in ("t1", "flair")}
    volumes, geometry = prepare(Preprocess(specs), {"t1": lps, "flair": ras})
    assert torch.equal(volumes["t1"], volumes["flair"])
    np.testing.assert_array_equal(undo(geometry, volumes["flair"])[0], values)  # the first sequence's own grid


def test_descriptions_that_are_needed_and_not_there():
    with pytest.raises(PreprocessError, match=r"scan: this checkpoint wants RAS orientation, .* pass Scan\(values, affine\)"):
        placed(plain(orientation="RAS"), noise(4, 4, 4))
    with pytest.raises(
        PreprocessError, match="x.nii: this checkpoint wants voxels of 1x1x2.5 mm, and an array alone tells no size"
    ):
        placed(plain(spacing=(1, 1, 2.5)), Scan(noise(4, 4, 4), name="x.nii"))
    with pytest.raises(PreprocessError, match="orientation 'RAX': expected three letters"):
        placed(plain(orientation="RAX"), noise(4, 4, 4))
    with pytest.raises(PreprocessError, match="x.nii: its affine places it nowhere"):
        Scan(noise(4, 4, 4), np.zeros((4, 4)), name="x.nii")


def test_steps_know_their_sizes():
    assert sizes((240, 240, 155)) == "240x240x155"
    step = Resample((4, 4, 4), (2, 4, 8), (2.0, 1.0, 0.5), (0.5, 0.0, -0.25))
    assert step.back().after == (4, 4, 4) and step.back().back() == step
