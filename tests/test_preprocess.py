"""Input specs: their JSON, and what applying them to pictures does, held against PIL, torchvision, timm and plain numpy."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from torchvision.transforms import v2

from okavango.models._apply import normalise
from okavango.models.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Image,
    Normalise,
    Preprocess,
    PreprocessError,
    Raster,
    Resize,
    Text,
    Volume,
)

torch.set_num_threads(1)

# -- strategies -----------------------------------------------------------------------------------------------------------

number = st.floats(-1e3, 1e3, width=32)
positive = st.floats(0.125, 1e3, width=32)
word = st.text("abcdefgh-0123", min_size=1, max_size=8)
resizes = st.builds(
    Resize,
    rule=st.sampled_from(["exact", "shortest", "pad", "crop", "short_side", "none"]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "area", "lanczos"]),
    antialias=st.booleans(),
    corners=st.sampled_from(["half_pixel", "aligned"]),
    crop_ratio=st.floats(0.25, 1.0),
    multiple_of=st.integers(1, 32),
    fill=number,
    on=st.sampled_from(["native", "normalised"]),
)


@st.composite
def normalises(draw, channels: int):
    rule = draw(st.sampled_from(["standard", "minmax", "stretch", "percentile", "zscore", "zscore_nonzero", "deviations", "none"]))
    each = st.tuples(*[number] * channels)
    values = {}
    if rule == "standard" or (rule in ("stretch", "percentile") and draw(st.booleans())):
        values |= {"mean": draw(each), "std": draw(st.tuples(*[positive] * channels))}
    if rule in ("minmax", "stretch"):
        low = draw(each)
        values |= {"low": low, "high": tuple(value + 1 for value in low)}
    if rule == "percentile":
        values["percentiles"] = draw(st.none() | st.tuples(st.floats(0, 49), st.floats(51, 100)))
    return Normalise(
        rule=rule,
        clip=draw(st.none() | st.tuples(st.floats(-5, 0), st.floats(0, 5))),
        quantise=draw(st.sampled_from([0, 256])),
        batch_dependent=draw(st.booleans()),
        origin=draw(word),
        **values,
    )


@st.composite
def specs(draw):
    kind = draw(st.sampled_from([Image, Raster, Volume, Text]))
    if kind is Text:
        return Text(
            tokenizer=draw(word),
            length=draw(st.integers(1, 512)),
            vocabulary=draw(st.integers(0, 60000)),
            begin=draw(st.none() | st.integers(0, 9)),
            lower=draw(st.booleans()),
        )
    channels = tuple(draw(st.lists(word, min_size=1, max_size=4, unique=True)))
    rule = draw(normalises(len(channels)))
    side = st.integers(1, 64)
    common = {"channels": channels, "resize": draw(resizes), "normalise": rule}
    if kind is Image:
        return Image(size=draw(st.tuples(side, side)), scale=draw(positive), offset=draw(number), **common)
    if kind is Volume:
        return Volume(
            size=draw(st.tuples(side, side, side)),
            aliases=tuple(draw(st.lists(st.tuples(word, word), max_size=2))),
            spacing=draw(st.none() | st.tuples(positive, positive, positive)),
            orientation=draw(st.none() | st.sampled_from(["RAS", "LPS"])),
            foreground=draw(st.booleans()),
            **common,
        )
    each = st.tuples(*[positive] * len(channels))
    return Raster(
        size=draw(st.tuples(side, side)),
        wavelengths=draw(st.just(()) | st.tuples(*[st.none() | positive] * len(channels))),
        scale=draw(st.tuples(positive) | each),
        valid=draw(st.none() | st.tuples(number, number)),
        nodata=draw(st.none() | number),
        absent=draw(st.none() | number),
        absent_on=draw(st.sampled_from(["normalised", "native"])),
        nearest_nm=draw(positive),
        adapted=draw(word),
        resolution=draw(st.none() | positive),
        **common,
    )


preprocesses = st.dictionaries(word, specs(), min_size=1, max_size=3).map(Preprocess)
pictures = st.builds(
    lambda h, w, c, seed: np.random.default_rng(seed).integers(0, 256, (h, w, c), np.uint8),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 3]),
    st.integers(0, 99),
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth RGB picture of full range, uint8 (H, W, 3)."""
    rough = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return np.asarray(Picture.fromarray(rough).resize((width, height), Picture.Resampling.BICUBIC))


def plain(**changes) -> Preprocess:
    """A spec that only scales to 0..1."""
    return Preprocess(image=Image(**{"normalise": Normalise(), "size": (16, 16), **changes}))


# -- JSON and pickle ------------------------------------------------------------------------------------------------------


@given(preprocesses)
@settings(deadline=None)
def test_json_and_pickle_round_trips(preprocess):
    text = json.dumps(preprocess.to_json(), allow_nan=False)
    for again in (Preprocess.from_json(json.loads(text)), pickle.loads(pickle.dumps(preprocess))):
        assert again == preprocess and hash(again) == hash(preprocess)
        assert list(again) == list(preprocess) and [type(spec) for spec in again.values()] == [
            type(spec) for spec in preprocess.values()
        ]


def test_every_kind_names_itself():
    kinds = Preprocess(
        a=Image(), b=Raster(channels=("B02", "B03")), c=Volume(channels=("t1",)), d=Text(tokenizer="hf/roberta-base")
    ).to_json()
    assert kinds["version"] == 1
    assert [entry["kind"] for entry in kinds["specs"].values()] == ["image", "raster", "volume", "text"]


def test_fields_that_are_left_out_take_their_defaults():
    read = Preprocess.from_json(
        {"version": 1, "specs": {"image": {"kind": "image", "size": [28, 28], "resize": {"rule": "exact"}}}}
    )
    assert read == Preprocess(image=Image(size=(28, 28), resize=Resize(rule="exact")))


@pytest.mark.parametrize(
    "data, message",
    [
        ({"version": 2, "specs": {}}, "format 2.*newer"),
        ({"specs": {}}, "format None"),
        ({"version": 1}, "'specs' is missing"),
        ({"version": 1, "specs": {"x": {"kind": "audio"}}}, "'x': unknown kind 'audio'; expected image, raster, volume, text"),
        ({"version": 1, "specs": {"x": 3}}, "unknown kind None"),
        ({"version": 1, "specs": {"x": {"kind": "image", "sise": [1, 1]}}}, "unknown field 'sise'"),
        ({"version": 1, "specs": {"x": {"kind": "image", "resize": {"rules": "exact"}}}}, "'x', resize: unknown field 'rules'"),
        ({"version": 1, "specs": {"x": {"kind": "image", "resize": "exact"}}}, "resize: expected a JSON object, got 'exact'"),
        (
            {"version": 1, "specs": {"x": {"kind": "image", "resize": {"rule": "longest"}}}},
            "rule 'longest'; expected one of 'exact'",
        ),
        ({"version": 1, "specs": {"x": {"kind": "image", "normalise": {"rule": "zscores"}}}}, "rule 'zscores'"),
        ({"version": 1, "specs": {"x": {"kind": "image", "scale": None}}}, "scale must not be null"),
        ({"version": 1, "specs": {"x": {"kind": "raster"}}}, "field 'channels' is missing"),
        ({"version": 1, "specs": {"x": {"kind": "text"}}}, "field 'tokenizer' is missing"),
    ],
)
def test_json_that_is_refused(data, message):
    with pytest.raises(PreprocessError, match=message):
        Preprocess.from_json(data)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Resize(rule="longest"), "rule 'longest'"),
        (lambda: Resize(interpolation="cubic"), "interpolation 'cubic'"),
        (lambda: Resize(on="stored"), "on 'stored'"),
        (lambda: Resize(crop_ratio=0), "crop_ratio 0"),
        (lambda: Normalise(rule="standard"), "needs mean"),
        (lambda: Normalise(rule="stretch", low=(0.0,)), "needs high"),
        (lambda: Normalise(rule="standard", mean=(0.0, 0.0), std=(1.0,)), "pairs"),
        (lambda: Normalise(rule="zscore", mean=(0.0,), std=(1.0,)), "takes no mean"),
        (lambda: Image(channels=("grey",)), "mean has 3 numbers for 1 channels: grey"),
        (lambda: Raster(channels=("a", "b", "c"), scale=(1.0, 2.0)), "scale has 2 numbers for 3"),
        (lambda: Raster(channels=("a", "b"), wavelengths=(490.0,)), "wavelengths has 1 numbers for 2"),
    ],
)
def test_specs_that_contradict_themselves(build, message):
    with pytest.raises(PreprocessError, match=message):
        build()


def test_a_preprocess_is_a_mapping_and_replace_copies():
    preprocess = Preprocess({"image": Image()}, text=Text(tokenizer="x/y"))
    assert list(preprocess) == ["image", "text"] and len(preprocess) == 2 and "audio" not in preprocess
    smaller = preprocess.replace("image", size=(8, 8))
    assert smaller["image"].size == (8, 8) and preprocess["image"].size == (224, 224) and smaller["text"] == preprocess["text"]
    with pytest.raises(KeyError):
        preprocess["audio"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        preprocess["image"].size = (1, 1)


# -- inputs ---------------------------------------------------------------------------------------------------------------


@given(st.lists(pictures, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_one_at_a_time_equals_a_batch(samples):
    preprocess = Preprocess(image=Image(size=(12, 10)))
    batch = preprocess(image=samples)["image"]
    assert batch.shape == (len(samples), 3, 12, 10) and batch.dtype == torch.float32
    for one, row in zip(samples, batch, strict=True):
        assert torch.equal(preprocess(image=one)["image"][0], row)


@given(pictures, st.sampled_from([np.uint8, np.float32, np.float64]))
@settings(max_examples=50, deadline=None)
def test_pil_numpy_and_tensors_agree(array, dtype):
    preprocess = Preprocess(image=Image(size=(12, 10)))
    typed = array.astype(dtype)
    tensor = torch.from_numpy(typed).permute(2, 0, 1)
    if dtype != np.uint8 and 0 < typed.max() <= 1:
        return  # refused, see below
    expected = preprocess(image=tensor)["image"]
    assert torch.equal(preprocess(image=typed)["image"], expected)
    assert torch.equal(preprocess(image=np.ascontiguousarray(typed[::-1])[::-1])["image"], expected)
    if array.shape[2] == 1:
        assert torch.equal(preprocess(image=typed[..., 0])["image"], expected)
        assert torch.equal(preprocess(image=tensor[0])["image"], expected)
    if dtype == np.uint8:
        assert torch.equal(
            preprocess(image=Picture.fromarray(array.squeeze(2) if array.shape[2] == 1 else array))["image"], expected
        )


def test_a_batch_array_is_a_batch():
    preprocess = Preprocess(image=Image(size=(12, 10)))
    stack = np.stack([picture(20, 16, seed) for seed in range(3)])
    expected = preprocess(image=list(stack))["image"]
    assert torch.equal(preprocess(image=stack)["image"], expected)
    assert torch.equal(preprocess(image=torch.from_numpy(stack).permute(0, 3, 1, 2))["image"], expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("rule", ["exact", "shortest", "pad", "crop", "none"])
def test_the_callers_values_stay(dtype, rule):
    given_ = torch.from_numpy(picture(16, 16).copy()).permute(2, 0, 1).to(dtype)
    before = given_.clone()
    out = plain(resize=Resize(rule=rule), scale=1.0)(image=given_)["image"]
    out.add_(1)
    assert torch.equal(given_, before)


def test_read_only_pictures_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain()(image=Picture.new("L", (20, 20), 7))


def test_grey_becomes_rgb_and_rgb_grey():
    grey = picture(16, 16)[..., 0]
    rgb = plain()(image=grey)["image"]
    assert torch.allclose(rgb, torch.from_numpy(grey / np.float32(255))[None, None].expand(1, 3, -1, -1))
    one = plain(channels=("grey",))(image=picture(16, 16))["image"]
    weights = torch.tensor([0.2989, 0.587, 0.114])
    expected = (torch.from_numpy(picture(16, 16).copy()).float() @ weights) / 255
    assert one.shape == (1, 1, 16, 16) and float((one[0, 0] - expected).abs().max()) <= 1.01 / 255


def test_alpha_is_dropped():
    array = picture(16, 16)
    alpha = np.full((16, 16, 1), 9, np.uint8)
    expected = plain()(image=array)["image"]
    with_alpha = np.concatenate([array, alpha], 2)
    assert torch.equal(plain()(image=with_alpha)["image"], expected)
    assert torch.equal(plain()(image=Picture.fromarray(with_alpha))["image"], expected)
    grey = plain(channels=("grey",))
    assert torch.equal(grey(image=with_alpha)["image"], grey(image=array)["image"])
    two = np.concatenate([array[..., :1], alpha], 2)
    assert torch.equal(plain()(image=two)["image"], plain()(image=array[..., 0])["image"])
    assert torch.equal(plain()(image=Picture.fromarray(two, "LA"))["image"], plain()(image=array[..., 0])["image"])


def test_palettes_and_other_modes_are_converted():
    array = picture(16, 16)
    image = Picture.fromarray(array)
    for mode in ("P", "CMYK", "1"):
        other = image.convert(mode)
        assert torch.equal(plain()(image=other)["image"], plain()(image=other.convert("RGB"))["image"])


def test_channels_are_put_into_the_networks_order_by_name():
    array = picture(16, 16)
    rgb = plain()(image=array)["image"]
    assert torch.equal(plain(channels=("blue", "green", "red"))(image=array)["image"], rgb.flip(1))
    assert torch.equal(plain(channels=("nir", "swir", "pan"))(image=array)["image"], rgb)


GOOD = picture(16, 16)


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "empty"),
        ("a.jpg", r"expected \(H, W\) or"),
        (np.zeros(5, np.uint8), r"got uint8 \(5,\)"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "got uint8"),
        (torch.zeros(5), "expected"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (GOOD.astype(np.int64), "torch.int64; expected uint8"),
        (GOOD.astype(np.uint16), "uint16"),
        (np.zeros((8, 8, 5), np.uint8), "5 channels, but this checkpoint expects 3: red, green, blue"),
        ((GOOD.astype(np.float32) - 128) / 60, "normalised already"),
        (GOOD.astype(np.float32) / 255, "scaled or normalised already; expected 0..255"),
        (Picture.fromarray(GOOD[..., 0].astype(np.uint16) * 200), "mode 'I;16'.*convert"),
        (Picture.fromarray(GOOD[..., 0].astype(np.float32)), "mode 'F'"),
    ],
)
def test_pictures_that_are_refused(value, message):
    with pytest.raises(PreprocessError, match=message):
        plain()(image=value)


def test_black_floats_and_other_scales_are_not_suspected():
    assert not plain()(image=np.zeros((16, 16, 3), np.float32))["image"].any()
    scaled = plain(scale=1.0)(image=GOOD.astype(np.float32) / 255)["image"]
    assert torch.allclose(scaled, plain()(image=GOOD)["image"], atol=1e-6)


def test_unknown_modality_and_kinds_without_a_reader():
    with pytest.raises(PreprocessError, match="unknown modality 'picture': this checkpoint takes image"):
        plain()(picture=GOOD)
    preprocess = Preprocess(v=Volume(channels=("t1",)), t=Text(tokenizer="x/y"))
    for name, kind in (("v", "Volume"), ("t", "Text")):
        with pytest.raises(PreprocessError, match=f"'{name}': no reader for {kind}"):
            preprocess(**{name: GOOD})


# -- resizing -------------------------------------------------------------------------------------------------------------


@given(
    st.integers(20, 90),
    st.integers(20, 90),
    st.sampled_from([(32, 36), (28, 32), (24, 24)]),
    st.sampled_from(["bilinear", "bicubic"]),
)
@settings(max_examples=40, deadline=None)
def test_shortest_equals_torchvisions_usual_evaluation(height, width, sizes, interpolation):
    crop, resize = sizes
    tensor = torch.from_numpy(picture(height, width).copy()).permute(2, 0, 1)
    usual = v2.Compose(
        [
            v2.Resize(resize, v2.InterpolationMode[interpolation.upper()], antialias=True),
            v2.CenterCrop(crop),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    spec = Image(size=(crop, crop), resize=Resize(interpolation=interpolation, crop_ratio=crop / resize))
    assert torch.allclose(Preprocess(image=spec)(image=tensor)["image"][0], usual(tensor), atol=1e-5)


@pytest.mark.parametrize("crop_pct", [0.8, 0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("height, width", [(60, 47), (31, 70), (36, 36)])
def test_shortest_equals_timms_evaluation_but_for_rounding(crop_pct, height, width):
    """timm resizes by PIL, which rounds to 8 bits between the two directions."""
    import timm.data

    theirs = timm.data.create_transform(32, interpolation="bicubic", crop_pct=crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = Picture.fromarray(picture(height, width))
    ours = plain(size=(32, 32), resize=Resize(crop_ratio=crop_pct))(image=image)["image"][0]
    assert float((ours - theirs(image)).abs().max()) <= 2.01 / 255


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(13, 30), (50, 20)])
def test_exact_equals_pil_but_for_rounding(interpolation, size):
    array = picture(24, 32)
    image = Picture.fromarray(array)
    ours = plain(size=size, resize=Resize(rule="exact", interpolation=interpolation))(image=image)["image"][0] * 255
    if interpolation == "nearest":  # torch takes the cell floor(i * scale)
        rows, columns = (np.arange(n) * old // n for n, old in zip(size, array.shape[:2], strict=True))
        expected = array[rows][:, columns]
    else:
        expected = np.asarray(image.resize(size[::-1], Picture.Resampling[interpolation.upper()]))
    worst = np.abs(ours.permute(1, 2, 0).numpy() - expected).max()
    assert worst <= (0.01 if interpolation in ("nearest", "lanczos") else 2.01)


def test_lanczos_takes_floats_and_any_number_of_channels():
    array = picture(24, 32)
    spec = plain(resize=Resize(rule="exact", interpolation="lanczos"))
    eight, floats = spec(image=array)["image"], spec(image=array.astype(np.float64))["image"]
    assert float(floats.max()) > 1  # floats overshoot, 8 bits are rounded twice and cut at their ends
    assert float((eight - floats.clamp(0, 1)).abs().max()) <= 2.01 / 255
    five = plain(channels=tuple("abcde"), resize=Resize(rule="exact", interpolation="lanczos"))
    stack = np.concatenate([array, array[..., :2]], 2)
    assert torch.equal(five(image=stack)["image"][:, 3:], five(image=stack)["image"][:, :2])


def test_antialias_can_be_left_out():
    tensor = torch.from_numpy(picture(60, 60).copy()).permute(2, 0, 1).float()
    out = plain(resize=Resize(rule="exact", interpolation="bilinear", antialias=False))(image=tensor)["image"]
    expected = F.interpolate(tensor[None], (16, 16), mode="bilinear", align_corners=False) / 255
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_aligned_corners(interpolation, antialias):
    tensor = torch.from_numpy(picture(40, 24).copy()).permute(2, 0, 1)
    resize = Resize(rule="exact", interpolation=interpolation, corners="aligned", antialias=antialias)
    expected = F.interpolate(tensor[None].float(), (16, 20), mode=interpolation, align_corners=True, antialias=antialias)
    spec = plain(size=(16, 20), resize=resize)
    assert torch.allclose(spec(image=tensor.float())["image"] * 255, expected, atol=1e-3)
    assert torch.allclose(spec(image=tensor)["image"] * 255, expected.round().clamp(0, 255), atol=1e-3)
    if not antialias and interpolation == "bilinear":  # the corners themselves are kept
        corners = spec(image=tensor.float())["image"][0][:, [0, 0, -1, -1], [0, -1, 0, -1]] * 255
        assert torch.allclose(corners, tensor.float()[:, [0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-3)


def test_area_is_the_mean_of_cells():
    tensor = torch.from_numpy(picture(32, 48).copy()).permute(2, 0, 1).float()
    out = plain(size=(16, 16), resize=Resize(rule="exact", interpolation="area"))(image=tensor)["image"][0] * 255
    expected = tensor.unflatten(1, (16, 2)).unflatten(3, (16, 3)).mean((2, 4))
    assert torch.allclose(out, expected, atol=1e-3)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(4, 20), st.integers(4, 20))
@settings(max_examples=60, deadline=None)
def test_pad_shows_the_whole_picture_in_the_middle(height, width, rows, columns):
    white = torch.full((3, height, width), 255, dtype=torch.uint8)
    out = plain(size=(rows, columns), resize=Resize(rule="pad", fill=51))(image=white)["image"][0, 0]
    factor = min(rows / height, columns / width)
    tall, wide = max(1, round(height * factor)), max(1, round(width * factor))
    inside = (out - 1).abs() < 1e-4
    assert int(inside.sum()) == tall * wide and torch.allclose(out[~inside], torch.tensor(0.2))
    where = inside.nonzero()
    assert where.min(0).values.tolist() == [(rows - tall) // 2, (columns - wide) // 2]
    assert (tall == rows or wide == columns) and tall <= rows and wide <= columns


@pytest.mark.parametrize("on, expected", [("native", (5 / 255 - 0.5) / 0.25), ("normalised", 5.0)])
def test_fill_is_in_the_units_of_what_is_resized(on, expected):
    rule = Normalise(rule="standard", mean=(0.5,) * 3, std=(0.25,) * 3)
    out = plain(size=(8, 8), resize=Resize(rule="crop", fill=5.0, on=on), normalise=rule)(image=GOOD[:4, :4])["image"]
    assert float(out[0, 0, 0, 0]) == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_crop_keeps_the_native_scale(height, width):
    array = picture(height, width)
    out = plain(size=(12, 12), resize=Resize(rule="crop"))(image=array)["image"][0] * 255
    expected = torch.from_numpy(array.copy()).permute(2, 0, 1)
    pad = [max(0, 12 - side) for side in (height, width)]
    expected = F.pad(expected, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
    expected = v2.functional.center_crop(expected, [12, 12])
    assert torch.allclose(out, expected.float(), atol=1e-3)


def test_none_keeps_sizes_and_checks_multiples():
    free = plain(resize=Resize(rule="none"))
    assert free(image=picture(10, 14))["image"].shape == (1, 3, 10, 14)
    with pytest.raises(PreprocessError, match=r"sizes \[\(10, 14\), \(12, 14\)\].*'none'"):
        free(image=[picture(10, 14), picture(12, 14)])
    strict = plain(resize=Resize(rule="none", multiple_of=7))
    assert strict(image=picture(21, 14))["image"].shape[-2:] == (21, 14)
    with pytest.raises(PreprocessError, match="20x14 pixels: both sides must be multiples of 7"):
        strict(image=picture(20, 14))


@pytest.mark.parametrize("rule", ["exact", "shortest"])
def test_resizing_after_normalisation(rule):
    tensor = torch.from_numpy(picture(40, 24).copy()).permute(2, 0, 1)
    spec = Image(size=(16, 16), resize=Resize(rule=rule, interpolation="bilinear", on="normalised"))
    values = (tensor.float() / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    size = [16, 16] if rule == "exact" else 16
    expected = v2.functional.center_crop(v2.functional.resize(values, size, antialias=True), [16, 16])
    assert torch.allclose(Preprocess(image=spec)(image=tensor)["image"][0], expected, atol=1e-5)


# -- normalisation --------------------------------------------------------------------------------------------------------

VALUES = torch.from_numpy(np.random.default_rng(0).normal(3, 2, (2, 9, 7)).astype(np.float32))


@given(st.integers(0, 99), st.floats(0, 0.9), st.sampled_from([(5,), (4, 6), (2, 3, 4)]))
@settings(max_examples=40, deadline=None)
def test_zscores_against_numpy(seed, zeros, shape):
    rng = np.random.default_rng(seed)
    values = rng.normal(100, 30, (3, *shape)).astype(np.float32)
    whole = normalise(torch.from_numpy(values), Normalise(rule="zscore")).numpy()
    axes = tuple(range(1, values.ndim))
    expected = (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True)
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    values[rng.random(values.shape) < zeros] = 0
    nonzero = normalise(torch.from_numpy(values), Normalise(rule="zscore_nonzero")).numpy()
    assert (nonzero[values == 0] == 0).all() and np.isfinite(nonzero).all()
    for channel, found in zip(values, nonzero, strict=True):
        present = channel[channel != 0]
        if len(present) > 1:
            np.testing.assert_allclose(found[channel != 0], (present - present.mean()) / present.std(), atol=1e-3)


@pytest.mark.parametrize("rule", ["zscore", "zscore_nonzero", "percentile"])
@pytest.mark.parametrize("value", [0.0, 0.1, 137.3, -5.7])
def test_a_constant_channel_becomes_zero(rule, value):
    assert not normalise(torch.full((2, 11, 13), value), Normalise(rule=rule)).any()
    assert not normalise(torch.full((2, 1, 1), value), Normalise(rule=rule)).any()


@pytest.mark.parametrize("percentiles", [None, (0.0, 100.0), (10.0, 75.0)])
def test_percentile_against_numpy(percentiles):
    found = normalise(VALUES, Normalise(rule="percentile", percentiles=percentiles))
    for channel, ours in zip(VALUES.numpy(), found.numpy(), strict=True):
        low, high = np.percentile(channel, percentiles or (2, 98))
        np.testing.assert_allclose(ours, np.clip((channel - low) / (high - low), 0, 1), atol=1e-5)


def test_minmax_stretch_quantise_and_clip():
    low, high = (0.0, 1.0), (4.0, 7.0)
    shares = (VALUES - torch.tensor(low)[:, None, None]) / torch.tensor([4.0, 6.0])[:, None, None]
    assert torch.allclose(normalise(VALUES, Normalise(rule="minmax", low=low, high=high)), shares)
    assert torch.allclose(normalise(VALUES, Normalise(rule="stretch", low=low, high=high)), shares.clamp(0, 1))
    coarse = normalise(VALUES, Normalise(rule="stretch", low=low, high=high, quantise=256))
    assert torch.equal((coarse * 255).round(), (shares.clamp(0, 1) * 255).floor())
    after = normalise(VALUES, Normalise(rule="stretch", low=low, high=high, mean=(0.5, 0.4), std=(0.2, 0.1)))
    assert torch.allclose(after[1], (shares[1].clamp(0, 1) - 0.4) / 0.1, atol=1e-5)
    clipped = normalise(VALUES, Normalise(rule="zscore", clip=(-1.0, 0.5)))
    assert float(clipped.min()) == -1.0 and float(clipped.max()) == 0.5
    assert torch.equal(normalise(VALUES, Normalise()), VALUES)


@pytest.mark.parametrize("on", ["native", "normalised"])
def test_statistics_of_the_whole_batch(on):
    samples = [picture(16, 16, seed) // (seed + 1) for seed in range(3)]
    rule = Normalise(rule="zscore", batch_dependent=True)
    together = plain(normalise=rule, resize=Resize(on=on))(image=samples)["image"]
    assert torch.allclose(together.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(together.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    alone = plain(normalise=dataclasses.replace(rule, batch_dependent=False))(image=samples)["image"]
    assert torch.allclose(alone.mean((2, 3)), torch.zeros(3, 3), atol=1e-5) and not torch.allclose(alone, together, atol=0.1)
