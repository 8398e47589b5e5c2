"""Multi-crop: each operation against torchvision's of the same parameters, crop boxes against its distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
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


def pictures(count: int = 5, channels: int = 3, size: int = 13) -> torch.Tensor:
    values = torch.rand(count, channels, size, size, generator=generator(7))
    values[0] = values[0, :1]  # grey: hue is undefined
    values[1] = (values[1] * 2).round() / 2  # many ties between channels, pure black and white
    return values


@pytest.mark.parametrize(
    ("ours", "theirs", "parameters"),
    [
        (multicrop.adjust_brightness, TF.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 3.0]),
        (multicrop.adjust_contrast, TF.adjust_contrast, [0.0, 0.6, 1.0, 1.4, 3.0]),
        (multicrop.adjust_saturation, TF.adjust_saturation, [0.0, 0.8, 1.0, 1.2, 3.0]),
        (multicrop.adjust_hue, TF.adjust_hue, [-0.5, -0.1, 0.0, 0.07, 0.5]),
        (multicrop.solarize, TF.solarize, [0.0, 0.25, 0.5, 128 / 255, 1.0]),
        (multicrop.gaussian_blur, lambda x, s: TF.gaussian_blur(x, [9, 9], [s, s]), [0.1, 0.5, 1.0, 1.7, 2.0]),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "solarize", "blur"],
)
def test_operations_are_torchvisions_with_one_parameter_per_picture(ours, theirs, parameters):
    values = pictures()
    got = ours(values.clone(), torch.tensor(parameters))
    want = torch.stack([theirs(picture, parameter) for picture, parameter in zip(values, parameters, strict=True)])
    torch.testing.assert_close(got, want, atol=3e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(colours=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=6), turn=st.floats(-0.5, 0.5, width=32))
def test_hue_of_any_colour(colours, turn):
    values = torch.tensor(colours).float().div(255).T.reshape(1, 3, 1, -1)
    got = multicrop.adjust_hue(values, torch.tensor([turn]))
    torch.testing.assert_close(got, TF.adjust_hue(values, turn), atol=1e-5, rtol=0)


def test_luma_and_normalise_are_torchvisions():
    values = pictures()
    torch.testing.assert_close(multicrop.luma(values), TF.rgb_to_grayscale(values), atol=1e-6, rtol=0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(multicrop.normalise(values.clone(), mean, std), TF.normalize(values, list(mean), list(std)))


def test_neutral_factors_change_no_bit():
    values = pictures()
    for operation in (multicrop.adjust_brightness, multicrop.adjust_contrast, multicrop.adjust_saturation):
        assert torch.equal(operation(values.clone(), torch.ones(len(values))), values)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blur_of_pictures_smaller_than_the_kernel(size):
    flat = torch.full((2, 3, size, size), 0.3)
    torch.testing.assert_close(multicrop.gaussian_blur(flat, torch.tensor([0.1, 2.0])), flat)


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
        assert torch.equal(crop[i if i < 2 else i - 2], want)
    assert all(torch.equal(got[key].flip(-1), mirror[key]) for key in got)
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
        for crop in augment.crop(image, generator(seed))["global"][:, 0]:
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
    assert got["global"].shape == (2, channels, 16, 16) and got["local"].shape == (2, channels, 8, 8)
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
        torch.randint(0, 256, (2, count, channels, 12, 12), generator=random, dtype=torch.uint8),
        torch.randint(0, 256, (locals, count, channels, 10, 10), generator=random, dtype=torch.uint8),
    )


def test_photometric_is_crop_major_and_exact_without_operations():
    globals_, locals_ = batch()
    a, b = MultiCrop(**PLAIN).photometric(globals_, locals_, generator())
    torch.testing.assert_close(a, globals_.reshape(80, 3, 12, 12) / 255)
    torch.testing.assert_close(b, locals_.reshape(80, 3, 10, 10) / 255)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    c, _ = MultiCrop(**{**PLAIN, "mean": tuple(mean), "std": tuple(std)}).photometric(globals_, locals_, generator())
    torch.testing.assert_close(c, TF.normalize(a, mean, std))


def test_photometric_follows_its_generator_and_not_the_chunks(monkeypatch):
    globals_, locals_ = batch()
    crop, state = MultiCrop(recolour=0.3), torch.get_rng_state()
    first = crop.photometric(globals_, locals_, generator(1))
    monkeypatch.setattr(multicrop, "CHUNK", 1000)
    again = crop.photometric(globals_, locals_, generator(1))
    other = crop.photometric(globals_, locals_, generator(2))
    for x, y, z in zip(first, again, other, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
        assert not torch.equal(x, z)
    assert torch.equal(torch.get_rng_state(), state)


def changed(count: int, **settings) -> tuple[float, float, float]:
    """Share of pictures that the settings changed: first globals, second globals, locals."""
    globals_, locals_ = batch(count)
    crop = MultiCrop(**{**PLAIN, **settings})
    a, b = crop.photometric(globals_, locals_, generator(11))
    one, two = (a - globals_.flatten(0, 1) / 255).abs().amax((1, 2, 3)).split(count)
    three = (b - locals_.flatten(0, 1) / 255).abs().amax((1, 2, 3))
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
    globals_ = torch.full((2, 2000, 3, 1, 1), 100, dtype=torch.uint8)
    crop = MultiCrop(**{**PLAIN, "jitter": (1.0, 0.4, 0, 0, 0)})
    a, _ = crop.photometric(globals_, globals_[:0], generator(4))
    factors = a[:, 0, 0, 0].numpy() * 255 / 100
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert ks_2samp(factors, np.linspace(0.6, 1.4, 4001)).pvalue > 1e-3


def test_first_global_equals_torchvision_step_by_step():
    """The whole chain on one picture, with the draws made a second time and handed to torchvision's functions."""
    globals_, locals_ = batch(1)
    crop = MultiCrop(jitter=(1.0, 0.4, 0.4, 0.2, 0.1), grayscale=0.0, blur=(1.0, 1.0, 1.0))
    for seed in range(8):
        got = crop.photometric(globals_, locals_, generator(seed))[0][0]
        random = generator(seed)
        torch.rand(1, generator=random)
        torch.rand(1, 2, 3, generator=random)
        torch.rand(1, generator=random)
        u = [torch.rand(1, generator=random).item() for _ in range(4)]
        order = torch.randperm(4, generator=random).tolist()
        torch.rand(1, generator=random)
        torch.rand(1, generator=random)
        sigma = 0.1 + 1.9 * torch.rand(1, generator=random).item()
        steps = [
            (TF.adjust_brightness, 0.6 + 0.8 * u[0]),
            (TF.adjust_contrast, 0.6 + 0.8 * u[1]),
            (TF.adjust_saturation, 0.8 + 0.4 * u[2]),
            (TF.adjust_hue, -0.1 + 0.2 * u[3]),
        ]
        want = globals_[0, 0] / 255
        for i in order:
            want = steps[i][0](want, steps[i][1])
        want = TF.normalize(TF.gaussian_blur(want, [9, 9], [sigma, sigma]), list(crop.mean), list(crop.std))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_recolour_maps_black_and_white_to_two_colours():
    globals_ = torch.zeros(2, 30, 3, 4, 4, dtype=torch.uint8)
    globals_[..., :2] = 255
    a, _ = MultiCrop(**{**PLAIN, "recolour": 1.0}).photometric(globals_, globals_[:0], generator())
    front, back = a[..., 0, 0], a[..., 0, 3]
    assert (a[..., :2] == front[..., None, None]).all() and (a[..., 2:] == back[..., None, None]).all()
    assert abs(float(front.mean()) - 0.5) < 0.1 and 0.2 < float(back.std()) < 0.4 and 0 <= a.min() <= a.max() <= 1
