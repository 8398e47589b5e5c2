"""Multi-crop: each operation against torchvision's of the same parameters, crop boxes and colours against its distribution."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from okavango.data import multicrop
from okavango.data.multicrop import MultiCrop, crop_box

PLAIN = {"jitter": (0, 0, 0, 0, 0), "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0, "flip": 0.0, "mean": (), "std": ()}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(channels: int = 3, size: int = 13) -> np.ndarray:
    values = np.random.default_rng(7).integers(0, 256, (size, size, channels), dtype=np.uint8)
    values[:3] = values[:3, :, :1]  # grey: hue is undefined
    values[3:6] = values[3:6] // 64 * 85  # many ties between channels, pure black and white
    return values


def levels(values: np.ndarray, function, *parameters) -> np.ndarray:
    """What torchvision's function makes of pixels (H, W, C), in grey levels that are not rounded."""
    return function(torch.from_numpy(values).permute(2, 0, 1) / 255, *parameters).permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize(
    ("ours", "theirs", "parameters", "off"),
    [
        # rounding is half a level; of luma by |1 - factor| / 2 more
        (multicrop.adjust_brightness, TF.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 3.0], 0.51),
        (multicrop.adjust_contrast, TF.adjust_contrast, [0.0, 0.6, 1.0, 1.4], 0.7),
        (multicrop.adjust_saturation, TF.adjust_saturation, [0.0, 0.8, 1.0, 1.2], 0.75),
        (multicrop.gaussian_blur, lambda x, sigma: TF.gaussian_blur(x, [9, 9], [sigma, sigma]), [0.1, 0.5, 1.0, 1.7, 2.0], 0.51),
    ],
    ids=["brightness", "contrast", "saturation", "blur"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_are_torchvisions_to_rounding(ours, theirs, parameters, off, channels):
    values = pixels(channels)
    for parameter in parameters:
        got = ours(values.copy(), parameter)
        assert got.dtype == np.uint8
        np.testing.assert_allclose(got.reshape(values.shape), levels(values, theirs, parameter), atol=off, rtol=0)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.1, 0.5])
def test_hue_is_torchvisions_to_its_steps_and_closer_than_pils(turn):
    values = np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    want = levels(values, TF.adjust_hue, turn)
    off = np.abs(multicrop.adjust_hue(values.copy(), turn) - want)
    pil = np.abs(np.asarray(TF.adjust_hue(TF.to_pil_image(values), turn)) - want)
    assert off.max() <= 12 and off.mean() < 1 and off.mean() < pil.mean() * 1.05


@settings(deadline=None, max_examples=100)
@given(colour=st.tuples(*[st.integers(0, 255)] * 3), turn=st.floats(-0.5, 0.5, width=32))
def test_hue_of_any_colour(colour, turn):
    values = np.array(colour, np.uint8).reshape(1, 1, 3)
    got, want = multicrop.adjust_hue(values.copy(), turn), levels(values, TF.adjust_hue, turn)
    # hue moves in steps of 1/256, of which half a step is lost before and half after: 6 / 256 of the chroma, and rounding
    assert np.abs(got - want).max() <= 6 / 256 * (max(colour) - min(colour)) + 6
    assert got.max() == max(colour)


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_luma_and_normalise_are_torchvisions(channels):
    values = pixels(channels)
    image = torch.from_numpy(values).permute(2, 0, 1)
    np.testing.assert_array_equal(multicrop.solarize(values), TF.solarize(image, 128).permute(1, 2, 0).numpy())
    grey = levels(values, TF.rgb_to_grayscale)[..., 0] if channels == 3 else values[..., 0]
    np.testing.assert_allclose(multicrop.luma(values), grey, atol=0.55, rtol=0)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    tables = multicrop.normalised(mean, std, channels)
    for channel in range(channels):
        got = torch.from_numpy(tables[channel][values[..., channel]])
        torch.testing.assert_close(got, TF.normalize(image / 255, list(mean), list(std))[channel])


def test_neutral_factors_change_no_bit():
    values = pixels()
    for operation in (multicrop.adjust_brightness, multicrop.adjust_contrast, multicrop.adjust_saturation):
        assert np.array_equal(operation(values.copy(), 1.0), values)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blur_of_pictures_smaller_than_the_kernel(size):
    flat = np.full((size, size, 3), 77, np.uint8)
    assert (multicrop.gaussian_blur(flat, 0.1) == flat).all() and (multicrop.gaussian_blur(flat, 2.0) == flat).all()


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(480, 640, (0.32, 1.0)), (480, 640, (0.05, 0.32)), (28, 28, (0.32, 1.0)), (40, 200, (0.3, 1.0))]
)
def test_boxes_have_torchvisions_distribution(height, width, scale):
    ratio, count = (3 / 4, 4 / 3), 4000
    draws = torch.rand(count, 10, 4, generator=generator(1), dtype=torch.float64).tolist()
    ours = np.array([crop_box(height, width, scale, ratio, draw) for draw in draws])
    transform, image = v2.RandomResizedCrop(8, scale=scale, ratio=ratio), torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        params = [transform.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, name
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and (ours >= 0).all()


@settings(deadline=None, max_examples=200)
@given(height=st.integers(1, 400), width=st.integers(1, 400), low=st.floats(0.01, 1), seed=st.integers(0, 1000))
def test_boxes_lie_inside_any_picture(height, width, low, seed):
    draws = torch.rand(10, 4, generator=generator(seed), dtype=torch.float64).tolist()
    top, left, h, w = crop_box(height, width, (low, 1.0), (3 / 4, 4 / 3), draws)
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0


def test_crop_is_resized_crop_of_the_drawn_box_and_flips():
    image = (torch.rand(3, 50, 70, generator=generator()) * 255).to(torch.uint8)
    settings = {"global_size": 24, "local_size": 10, "locals": 3}
    still, flipped = MultiCrop(**settings, flip=0.0), MultiCrop(**settings, flip=1.0)
    got, mirror = still.crop(image, generator(5)), flipped.crop(image, generator(5))
    draws = torch.rand(5, 10, 4, generator=generator(5), dtype=torch.float64).tolist()
    for i in range(5):
        scale, crop, size = ((0.32, 1.0), got["global"], 24) if i < 2 else ((0.05, 0.32), got["local"], 10)
        box = crop_box(50, 70, scale, (3 / 4, 4 / 3), draws[i])
        want = TF.resized_crop(image, *box, [size, size], v2.InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(crop[i if i < 2 else i - 2].permute(2, 0, 1), want)
    assert all(torch.equal(got[key].flip(2), mirror[key]) for key in got)
    planar, whole = still.crop(image.contiguous(), generator(5)), image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert all(torch.equal(planar[key], value) for key, value in still.crop(whole, generator(5)).items()), "whatever the layout"
    again = still.crop(image, generator(5))
    other = still.crop(image, generator(6))
    assert all(torch.equal(got[key], again[key]) and not torch.equal(got[key], other[key]) for key in got)


def test_zoomed_out_crops_show_the_picture_whole_on_black():
    """Crops of a whole canvas, up to twice the size of a white picture: a white rectangle of a quarter to all of the area."""
    image = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    settings = {**PLAIN, "global_size": 32, "locals": 0, "global_scale": (1.0, 1.0), "ratio": (1.0, 1.0), "channels": 1}
    augment = MultiCrop(**settings, zoom_out=(1.0, 2.0))
    shares, places = [], set()
    for seed in range(60):
        for crop in augment.crop(image, generator(seed))["global"][..., 0]:
            rows, columns = (crop > 127).any(1).nonzero()[:, 0], (crop > 127).any(0).nonzero()[:, 0]
            assert (crop[rows[0] + 1 : rows[-1], columns[0] + 1 : columns[-1]] > 200).all(), "one whole rectangle"
            shares.append(len(rows) * len(columns) / crop.numel())
            places.add((int(rows[0]), int(columns[0])))
    assert 0.22 < min(shares) < 0.4 and 0.85 < max(shares) <= 1 and len(places) > 40
    never = MultiCrop(**settings, zoom_out=(0.0, 2.0)).crop(image, generator())["global"]
    assert (never == 255).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 9), (3, 7, 2), (1, 28, 28)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_channels(shape, channels):
    crop = MultiCrop(global_size=16, local_size=8, locals=2, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    got = crop.crop(torch.full(shape, 90, dtype=torch.uint8), generator())
    assert got["global"].shape == (2, 16, 16, channels) and got["local"].shape == (2, 8, 8, channels)
    assert all(
        value.dtype == torch.uint8 and value.is_contiguous() and (value.int() - 90).abs().max() <= 1 for value in got.values()
    )
    a, b = crop.photometric(got["global"][:, None], got["local"][:, None], generator())
    assert (
        a.shape == (2, channels, 16, 16) and b.shape == (2, channels, 8, 8) and torch.isfinite(a).all() and torch.isfinite(b).all()
    )


def test_no_local_crops():
    crop = MultiCrop(global_size=8, locals=0)
    got = crop.crop(torch.zeros(3, 9, 9, dtype=torch.uint8), generator())
    a, b = crop.photometric(got["global"][:, None], got["local"][:, None], generator())
    assert a.shape == (2, 3, 8, 8) and b.shape == (0, 3, 96, 96)


@pytest.mark.parametrize(
    "image", [torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)]
)
def test_other_pictures_are_refused(image):
    with pytest.raises(ValueError, match="takes uint8"):
        MultiCrop().crop(image, generator())


@pytest.mark.parametrize(
    "changes",
    [
        {"global_scale": (0.5, 0.2)},
        {"local_scale": (0.0, 0.2)},
        {"flip": 1.5},
        {"zoom_out": (0.5, 0.9)},
        {"channels": 4},
        {"mean": (0.5,)},
        {"blur_sigma": (0.0, 1.0)},
        {"jitter": (0.8, 0.4, 0.4, 0.2, 0.7)},
        {"locals": -1},
        {"ratio": (2.0, 1.0)},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError):
        MultiCrop(**changes)


def batch(count: int = 40, channels: int = 3, locals: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    random = generator(3)
    return (
        torch.randint(0, 256, (2, count, 12, 12, channels), generator=random, dtype=torch.uint8),
        torch.randint(0, 256, (locals, count, 10, 10, channels), generator=random, dtype=torch.uint8),
    )


def flat(crops: torch.Tensor) -> torch.Tensor:
    """(n, B, S, S, C) uint8 -> (nB, C, S, S) in 0..1."""
    return crops.flatten(0, 1).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("channels", [1, 3])
def test_photometric_is_crop_major_and_exact_without_operations(channels):
    globals_, locals_ = batch(channels=channels)
    a, b = MultiCrop(**PLAIN, channels=channels).photometric(globals_, locals_, generator())
    torch.testing.assert_close(a, flat(globals_))
    torch.testing.assert_close(b, flat(locals_))
    assert a.is_contiguous() and b.is_contiguous()
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.3, 0.1][:channels]
    crop = MultiCrop(**{**PLAIN, "mean": tuple(mean), "std": tuple(std)}, channels=channels)
    torch.testing.assert_close(crop.photometric(globals_, locals_, generator())[0], TF.normalize(a, mean, std))


@pytest.mark.parametrize("channels", [1, 3])
def test_photometric_follows_its_generator_alone(channels):
    globals_, locals_ = batch(channels=channels)
    crop = MultiCrop(recolour=0.3, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    state, before = torch.get_rng_state(), globals_.clone()
    first, again, other = (crop.photometric(globals_, locals_, generator(seed)) for seed in (1, 1, 2))
    for x, y, z in zip(first, again, other, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z) and torch.isfinite(x).all()
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(globals_, before), "what was given stays"


def test_every_crop_has_an_order_of_its_own(monkeypatch):
    called: list[str] = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(multicrop, f"adjust_{name}", lambda pixels, parameter, name=name: called.append(name) or pixels)
    globals_, locals_ = batch(300)
    MultiCrop(**{**PLAIN, "jitter": (1.0, 0.4, 0.4, 0.2, 0.1)}).photometric(globals_, locals_[:0], generator())
    orders = Counter(tuple(called[i : i + 4]) for i in range(0, len(called), 4))
    assert len(called) == 4 * 600 and orders.keys() == set(permutations(("brightness", "contrast", "saturation", "hue")))
    assert chisquare(list(orders.values())).pvalue > 1e-3


@pytest.mark.parametrize("what", ["saturation", "detail"])
def test_colours_have_the_distribution_of_pil_pictures(what):
    """The whole chain with torchvision's transforms on PIL pictures, as in DINOv2: 40 batches, so that no batch has its own way."""
    rough = torch.rand(160, 3, 6, 6, generator=generator(2))
    crops = (TF.resize(rough, [24, 24], v2.InterpolationMode.BICUBIC).clamp(0, 1) * 255).to(torch.uint8)
    crop = MultiCrop(mean=(), std=(), blur=(0.5, 0.5, 0.5))
    layout = crops.permute(0, 2, 3, 1).reshape(40, 1, 4, 24, 24, 3)
    nothing = torch.empty(2, 0, 24, 24, 3, dtype=torch.uint8)
    ours = torch.cat([crop.photometric(nothing, part.repeat(2, 1, 1, 1, 1), generator(i))[1] for i, part in enumerate(layout)])
    published = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5),
            v2.PILToTensor(),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        theirs = torch.stack([published(TF.to_pil_image(one)) for one in crops for _ in range(2)]) / 255

    def statistic(values: torch.Tensor) -> np.ndarray:
        if what == "saturation":
            return (values.amax(1) - values.amin(1)).mean((1, 2)).numpy()
        grey = values.mean(1)
        return (grey.diff(n=2, dim=2).abs().mean((1, 2)) / grey.std((1, 2)).clamp_min(1e-3)).numpy()

    assert ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


def changed(count: int, **settings) -> tuple[float, float, float]:
    """Share of pictures that the settings changed: first globals, second globals, locals."""
    globals_, locals_ = batch(count)
    crop = MultiCrop(**{**PLAIN, **settings})
    a, b = crop.photometric(globals_, locals_, generator(11))
    one, two = (a - flat(globals_)).abs().amax((1, 2, 3)).split(count)
    three = (b - flat(locals_)).abs().amax((1, 2, 3))
    return tuple(float((part > 1e-4).float().mean()) for part in (one, two, three))


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"jitter": (0.8, 0.4, 0.4, 0.2, 0.1)}, (0.8, 0.8, 0.8)),
        ({"jitter": (0.8, 0, 0, 0, 0.1)}, (0.8, 0.8, 0.8)),
        ({"grayscale": 0.2}, (0.2, 0.2, 0.2)),
        ({"blur": (1.0, 0.1, 0.5), "blur_sigma": (0.5, 2.0)}, (1.0, 0.1, 0.5)),
        ({"solarize": 0.2}, (0.0, 0.2, 0.0)),
        ({"recolour": 0.3}, (0.3, 0.3, 0.3)),
    ],
)
def test_probabilities(settings, want):
    for got, expected in zip(changed(600, **settings), want, strict=True):
        assert abs(got - expected) <= 4 * (expected * (1 - expected) / 600) ** 0.5


def test_jitter_factors_are_uniform():
    globals_ = torch.full((2, 2000, 1, 1, 3), 180, dtype=torch.uint8)
    crop = MultiCrop(**{**PLAIN, "jitter": (1.0, 0.4, 0, 0, 0)})
    a, _ = crop.photometric(globals_, globals_[:0], generator(4))
    factors = a[:, 0, 0, 0].numpy() * 255 / 180
    assert factors.min() >= 0.6 and factors.max() <= 1.4 + 1e-6
    assert ks_2samp(factors, np.rint(np.linspace(0.6, 1.4, 4001) * 180) / 180).pvalue > 1e-3


def test_first_global_equals_torchvision_step_by_step():
    """The whole chain on one picture, with the draws made a second time and handed to torchvision's functions."""
    rough = torch.rand(3, 4, 4, generator=generator(3))
    image = (TF.resize(rough, [12, 12], v2.InterpolationMode.BICUBIC).clamp(0, 1) * 255).to(torch.uint8)
    globals_ = image.permute(1, 2, 0).expand(2, 1, 12, 12, 3).contiguous()
    crop = MultiCrop(jitter=(1.0, 0.4, 0.4, 0.2, 0.1), grayscale=0.0, blur=(1.0, 1.0, 1.0), mean=(), std=())
    for seed in range(8):
        got = crop.photometric(globals_, globals_[:0], generator(seed))[0][0]
        random = generator(seed)
        torch.rand(1, generator=random)
        torch.rand(1, 2, 3, generator=random)
        torch.rand(1, generator=random)
        order = torch.rand(1, 4, generator=random).argsort()[0].tolist()
        u = [torch.rand(1, generator=random).item() for _ in range(4)]
        torch.rand(1, generator=random)
        torch.rand(1, generator=random)
        sigma = 0.1 + 1.9 * torch.rand(1, generator=random).item()
        steps = [
            (TF.adjust_brightness, 0.6 + 0.8 * u[0]),
            (TF.adjust_contrast, 0.6 + 0.8 * u[1]),
            (TF.adjust_saturation, 0.8 + 0.4 * u[2]),
            (TF.adjust_hue, -0.1 + 0.2 * u[3]),
        ]
        want = image / 255
        for i in order:
            want = steps[i][0](want, steps[i][1])
        want = TF.gaussian_blur(want, [9, 9], [sigma, sigma])
        torch.testing.assert_close(got, want, atol=8 / 255, rtol=0)  # the greatest share is hue's, see above
        assert (got - want).abs().mean() < 1.5 / 255


def test_recolour_maps_black_and_white_to_two_colours():
    globals_ = torch.zeros(2, 30, 4, 4, 3, dtype=torch.uint8)
    globals_[..., :2, :] = 255
    a, _ = MultiCrop(**{**PLAIN, "recolour": 1.0}).photometric(globals_, globals_[:0], generator())
    front, back = a[..., 0, 0], a[..., 0, 3]
    assert (a[..., :2] == front[..., None, None]).all() and (a[..., 2:] == back[..., None, None]).all()
    assert abs(float(front.mean()) - 0.5) < 0.1 and 0.2 < float(back.std()) < 0.4 and 0 <= a.min() <= a.max() <= 1
