"""Three-plane pictures show what lies where, whichever way the array is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from okavango.downstream.segmentation.pictures import three_planes


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture
def volume():
    """RAS, 2 x 1 x 1 mm; one bright corner: right, front, top."""
    values = np.full((10, 20, 18), 50.0, np.float32)
    values[-3:, -5:, -4:], values[0, 0, 0] = 100, 0
    return values, np.diag([2.0, 1.0, 1.0, 1.0])


def test_the_stored_orientation_makes_no_difference(tmp_path, volume):
    values, affine = volume
    lps = np.diag([-2.0, -1.0, 1.0, 1.0])
    mask = values > 60
    first = three_planes({"t1": values}, tmp_path / "a.png", masks={"bright": mask}, affine=affine, title="x")
    second = three_planes(
        {"t1": torch.from_numpy(values[::-1, ::-1].copy())},
        tmp_path / "b.png",
        masks={"bright": mask[::-1, ::-1]},
        affine=lps,
        title="x",
    )
    np.testing.assert_array_equal(pixels(first), pixels(second))


def test_right_is_right_front_and_top_are_up(tmp_path, volume):
    values, affine = volume
    image = pixels(three_planes({"t1": values}, tmp_path / "a.png", affine=affine, at=(9, 19, 17))).sum(2)
    height, width = image.shape
    for panel in np.array_split(image, 3, axis=1):
        bright = np.argwhere(panel > 0.95 * image[height // 4 :].max())
        rows, columns = np.nonzero(panel > 200)
        assert bright[:, 0].mean() < rows.mean() and bright[:, 1].mean() > columns.mean()


def test_masks_are_laid_over_all_rows_or_each_over_its_own(tmp_path, volume):
    values, affine = volume
    mask = values > 60
    both = pixels(three_planes({"a": values, "b": values}, tmp_path / "both.png", masks={"m": mask}, affine=affine))
    own = pixels(three_planes({"a": values, "b": values}, tmp_path / "own.png", masks={"a": {"m": mask}, "b": {}}, affine=affine))

    def reds(image: np.ndarray) -> list[int]:
        red = (image[..., 0] > image[..., 1] + 60) & (image[..., 0] > 100)
        return [int(half.sum()) for half in np.array_split(red[: int(0.9 * len(red))], 2)]

    assert min(reds(both)) > 20 and reds(own)[0] > 20 and reds(own)[1] == 0
    assert three_planes({"a": values}, tmp_path / "plain.png").exists()
