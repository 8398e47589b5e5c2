"""GeoTIFF files and folders of bands: what is read, where descriptions come from, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
import torch.nn.functional as F
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from okavango.data import geotiff
from okavango.data.geotiff import GeoError, Scene, read
from okavango.data.sources import BadSample, ImageFolder, Patches, cached, open_source
from okavango.models.preprocess import Preprocess, PreprocessError, Raster
from okavango.models.raster import Bands, plan

ORIGIN = (600_000, 5_700_000)


pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write(path, values, *, metres=10.0, crs="EPSG:32632", origin=ORIGIN, names=(), **profile):
    """A GeoTIFF (or JPEG 2000, by the ending) of (C, H, W) values."""
    values = np.asarray(values)
    place = {"transform": Affine(metres, 0, origin[0], 0, -metres, origin[1]), "crs": crs} if crs else {}
    if path.suffix == ".jp2":
        profile = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES", **profile}
    shape = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = {name: profile.pop(name) for name in ("scales", "offsets", "units", "colorinterp") if name in profile}
    with rasterio.open(path, "w", **{"driver": "GTiff", **shape, **place, **profile}) as dataset:
        dataset.write(values)
        for index, name in enumerate(names, 1):
            dataset.set_band_description(index, name)
        for name, value in tags.items():
            setattr(dataset, name, value)
    return path


def numbers(*shape, dtype="uint16", seed=0):
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype)


# -- one file ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_values_of_any_dtype_come_as_they_are_stored(tmp_path, dtype):
    values = numbers(3, 7, 9, dtype=dtype)
    bands = read(write(tmp_path / "a.tif", values, names=("B02", "B03", "B8A")))
    assert bands.values.dtype == dtype
    np.testing.assert_array_equal(bands.values, values)
    assert (bands.channels, bands.nodata, bands.mask) == (("B02", "B03", "B8A"), None, None)
    assert bands.transform == (10, 0, ORIGIN[0], 0, -10, ORIGIN[1]) and bands.resolution == 10 and "32N" in bands.crs


def test_what_nobody_says_stays_unknown(tmp_path):
    bands = read(write(tmp_path / "a.tif", numbers(2, 4, 4, dtype="int16"), crs=None))
    assert (bands.sensor, bands.level, bands.units, bands.baseline, bands.crs) == ("",) * 5
    assert (bands.channels, bands.nodata, bands.resolution, bands.transform) == (("1", "2"), None, None, ())
    with pytest.raises(PreprocessError, match="unit of the data is not known"):
        plan(Raster(channels=("B04",), sensor="sentinel-2"), bands)


def test_numbers_of_bands_are_no_names(tmp_path):
    path = write(tmp_path / "a.tif", numbers(2, 4, 4))
    with pytest.raises(
        GeoError, match=r"has no band 'B1'; it has 1, 2; its bands have no names, say channels= or write a bands.json"
    ):
        read(path, bands=["B1"], sensor="sentinel-2")


def test_arguments_go_before_the_sidecar_and_that_before_tags(tmp_path):
    path = write(tmp_path / "a.tif", numbers(2, 4, 4), names=("B02", "B03"), nodata=7, units=("dn", "dn"))
    assert (read(path).channels, read(path).nodata, read(path).units) == (("B02", "B03"), 7, "dn")
    (tmp_path / "bands.json").write_text(
        json.dumps({"channels": ["B04", "B05"], "nodata": 0, "sensor": "s2", "units": "reflectance"})
    )
    said = read(path)
    assert (said.channels, said.nodata, said.sensor, said.units) == (("B04", "B05"), 0, "s2", "reflectance")
    given = read(path, channels=["red", "nir"], sensor="naip", nodata=None)
    assert (given.channels, given.nodata, given.sensor, given.units) == (("red", "nir"), None, "naip", "reflectance")


def test_colours_name_the_bands_of_a_picture_and_transparency_is_its_mask(tmp_path):
    values = numbers(4, 6, 6, dtype="uint8")
    values[3] = 255
    values[3, 2, 3] = 0
    bands = read(write(tmp_path / "a.tif", values, photometric="rgb", alpha="yes"))
    assert (bands.channels, bands.units) == (("red", "green", "blue"), "u8")
    assert bands.mask.shape == (3, 6, 6) and not bands.mask[:, 2, 3].any() and bands.mask.sum() == 3 * 35
    np.testing.assert_array_equal(bands.values, values[:3])


def test_scale_offset_and_unit_come_from_tags(tmp_path):
    path = write(
        tmp_path / "a.tif", numbers(2, 4, 4), names=("B2", "B3"), scales=(1e-4, 2e-4), offsets=(-0.1, 0), units=("reflectance",) * 2
    )
    bands = read(path)
    assert (bands.scale, bands.offset, bands.units) == ((1e-4, 2e-4), (-0.1, 0), "reflectance")
    chosen = read(path, bands=["B03"], sensor="sentinel-2")
    assert (chosen.channels, chosen.scale, chosen.offset) == (("B3",), (2e-4,), (0,))
    stored = read(path, units="dn")
    assert (stored.scale, stored.offset, stored.units) == ((1,), (0,), "dn")


def test_bands_are_found_by_any_of_their_names_in_the_order_asked_for(tmp_path):
    values = numbers(4, 4, 4)
    path = write(tmp_path / "a.tif", values, names=("B8", "B08A", "B4", "B2"))
    bands = read(path, bands=["red", "B8A", "B08"], sensor="sentinel-2")
    assert bands.channels == ("B4", "B08A", "B8")
    np.testing.assert_array_equal(bands.values, values[[2, 1, 0]])
    with pytest.raises(GeoError, match="a.tif: has no band 'B11'; it has B8, B08A, B4, B2"):
        read(path, bands=["B11"], sensor="sentinel-2")


def test_one_number_per_band_follows_the_bands_that_are_read(tmp_path):
    path = write(tmp_path / "a.tif", numbers(3, 4, 4))
    given = {"channels": ["red", "green", "nir"], "scale": [1.0, 2.0, 3.0], "wavelengths": [650, 550, 840]}
    bands = read(path, bands=["nir", "red"], **given)
    assert (bands.channels, bands.scale, bands.wavelengths) == (("nir", "red"), (3.0, 1.0), (840, 650))


# -- nodata -----------------------------------------------------------------------------------------------------------------


def test_the_switch_for_files_without_the_tag(tmp_path):
    values = numbers(2, 5, 5)
    values[:, 1, 2] = 0
    path = write(tmp_path / "a.tif", values, names=("B02", "B03"))
    assert read(path).nodata is None
    bands = read(path, nodata=0)
    assert bands.nodata == 0 and bands.mask is None
    np.testing.assert_array_equal(bands.values, values)


def test_a_value_that_the_dtype_cannot_hold_is_no_value(tmp_path):
    path = write(tmp_path / "a.tif", numbers(1, 3, 3))
    bands = read(path, nodata=-9999, window=(1, 1, 3, 3))
    assert bands.nodata is None and bands.mask.sum() == 4


def test_an_internal_mask_counts(tmp_path):
    path = tmp_path / "a.tif"
    valid = np.ones((4, 4), np.uint8)
    valid[0, :2] = 0
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", width=4, height=4, count=1, dtype="uint8") as d,
    ):
        d.write(numbers(1, 4, 4, dtype="uint8"))
        d.write_mask(valid * 255)
    np.testing.assert_array_equal(read(path).mask[0], valid > 0)


def test_beyond_the_scene_nothing_is_measured(tmp_path):
    values = numbers(2, 6, 8)
    without, tagged = write(tmp_path / "a.tif", values), write(tmp_path / "b.tif", values, nodata=0)
    bands = read(without, window=(4, -2, 5, 4))
    np.testing.assert_array_equal(bands.mask[1], [[False, False, True, True]] * 2 + [[False] * 4] * 3)
    np.testing.assert_array_equal(bands.values[:, :2, 2:], values[:, 4:, :2])
    assert bands.transform[2] == ORIGIN[0] - 20 and bands.transform[5] == ORIGIN[1] - 40
    filled = read(tagged, window=(4, -2, 5, 4))
    assert filled.mask is None and (filled.values == 0).sum() == 2 * (20 - 4)
    assert (read(tagged, window=(60, 60, 3, 3)).values == 0).all()
    with pytest.raises(GeoError, match="window of 0x3 pixels"):
        read(without, window=(0, 0, 0, 3))


# -- several resolutions ----------------------------------------------------------------------------------------------------


def mixed(folder, *, coarse, fine=None, **profile):
    """A folder with a 10 m and a 20 m band."""
    coarse = np.asarray(coarse)
    fine = numbers(1, 2 * coarse.shape[-2], 2 * coarse.shape[-1]) if fine is None else fine
    write(folder / "x_B04_10m.tif", fine, **profile)
    write(folder / "x_B05_20m.tif", coarse, metres=20.0, **profile)
    return folder


def test_a_coarser_band_comes_to_the_finest_grid_as_torch_would_bring_it(tmp_path):
    coarse = numbers(1, 9, 6)
    bands = read(mixed(tmp_path, coarse=coarse), sensor="sentinel-2")
    want = F.interpolate(torch.from_numpy(coarse[None].astype(np.float32)), scale_factor=2, mode="bilinear")[0, 0]
    assert bands.channels == ("B04", "B05") and bands.values.shape == (2, 18, 12) and bands.values.dtype == np.float32
    np.testing.assert_allclose(bands.values[1], want, rtol=1e-6)
    assert bands.resolution == 10


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.integers(-3, 12), st.integers(-3, 12), st.integers(1, 14), st.integers(1, 14), st.sampled_from([None, 20.0, 14.0]))
def test_a_window_is_a_part_of_the_whole(tmp_path, top, left, height, width, resolution):
    if not (tmp_path / "x_B04_10m.tif").exists():
        coarse = numbers(1, 6, 6)
        coarse[0, 2, 3] = 0
        mixed(tmp_path, coarse=coarse, nodata=0)
    with Scene(tmp_path, resolution=resolution) as scene:
        whole, part = scene.read(), scene.read((top, left, height, width))
    padded = np.zeros((2, 60, 60), part.values.dtype)
    padded[:, 20 : 20 + scene.height, 20 : 20 + scene.width] = whole.values
    want = padded[:, 20 + top : 20 + top + height, 20 + left : 20 + left + width]
    np.testing.assert_allclose(part.values, want, rtol=1e-6 if resolution else 0)


def test_what_was_not_measured_does_not_leak_into_neighbours(tmp_path):
    coarse = np.full((1, 6, 6), 50, np.uint16)
    coarse[0, 2, 2] = 60_000
    bands = read(mixed(tmp_path, coarse=coarse, fine=np.full((1, 12, 12), 7, np.uint16), nodata=60_000))
    hole = bands.values[1] == 60_000
    assert hole.sum() == 4 and hole[4:6, 4:6].all()
    np.testing.assert_allclose(bands.values[1][~hole], 50)
    np.testing.assert_array_equal(bands.values[0], 7)


def test_a_finer_band_is_averaged_over_the_pixel(tmp_path):
    fine, coarse = numbers(1, 12, 12), numbers(1, 6, 6, seed=1)
    bands = read(mixed(tmp_path, coarse=coarse, fine=fine), resolution=20)
    np.testing.assert_allclose(bands.values[0], fine[0].reshape(6, 2, 6, 2).mean((1, 3)), rtol=1e-6)
    np.testing.assert_array_equal(bands.values[1], coarse[0])
    third = read(tmp_path / "x_B04_10m.tif", resolution=30).values[0]
    np.testing.assert_allclose(third, fine[0].reshape(4, 3, 4, 3).mean((1, 3)), rtol=1e-6)
    odd = read(tmp_path / "x_B04_10m.tif", resolution=15).values[0]  # pixels of one and a half: by hand
    weights = np.array([1, 0.5])
    np.testing.assert_allclose(odd[0, 0], (np.outer(weights, weights) * fine[0, :2, :2]).sum() / 1.5**2, rtol=1e-6)


def test_grids_that_share_pixel_centres_but_not_corners(tmp_path):
    # as Landsat's panchromatic band, which begins 7.5 m to the left of and above the others
    def field(size, metres, origin):
        at = (np.arange(size) + 0.5) * metres
        return (1000 + (origin[0] - ORIGIN[0]) + at[None, None, :] - ((origin[1] - ORIGIN[1]) - at)[None, :, None]).astype(
            np.float32
        )

    pan = (ORIGIN[0] - 7.5, ORIGIN[1] + 7.5)
    write(tmp_path / "x_B4.tif", field(10, 30.0, ORIGIN), metres=30.0)
    write(tmp_path / "x_B8.tif", field(20, 15.0, pan), metres=15.0, origin=pan)
    bands = read(tmp_path, sensor="landsat-8")
    inner = bands.values[:, 1:-2, 1:-2]  # a plane is reproduced wherever there are neighbours on both sides
    np.testing.assert_allclose(inner[0], inner[1], rtol=1e-6)


# -- products ---------------------------------------------------------------------------------------------------------------

SAFE = "S2B_MSIL1C_20220301T103021_N0400_R108_T32UMC_20220301T123456.SAFE"
MTD = """<?xml version="1.0"?><n1:Level-1C_User_Product xmlns:n1="https://psd/"><n1:General_Info><Product_Info>
<PRODUCT_START_TIME>2022-03-01T10:30:21.024Z</PRODUCT_START_TIME><PROCESSING_BASELINE>04.00</PROCESSING_BASELINE>
</Product_Info></n1:General_Info></n1:Level-1C_User_Product>"""


def test_a_product_of_sentinel_2_says_level_baseline_and_nodata(tmp_path):
    folder, values = tmp_path / SAFE, {}
    for number, (name, metres) in enumerate({"B02": 10, "B08": 10, "B8A": 20, "B05": 20, "B01": 60, "TCI": 10}.items()):
        values[name] = numbers(1, 120 // metres, 120 // metres, seed=number)
        write(folder / f"GRANULE/L1C/IMG_DATA/T32UMC_20220301T103021_{name}.jp2", values[name], metres=float(metres))
    (folder / "MTD_MSIL1C.xml").write_text(MTD)
    bands = read(folder)
    assert bands.channels == ("B01", "B02", "B05", "B08", "B8A")
    assert (bands.sensor, bands.level, bands.units, bands.nodata) == ("sentinel-2", "L1C", "dn", 0)
    assert (bands.baseline, bands.time, bands.resolution) == ("04.00", "2022-03-01T10:30:21", 10)
    np.testing.assert_array_equal(bands.values[1], values["B02"][0])
    chosen = read(folder / "MTD_MSIL1C.xml", bands=["nir_narrow", "nir"])  # B8A is not B8
    assert chosen.channels == ("B8A", "B08")
    np.testing.assert_array_equal(chosen.values[1], values["B08"][0])
    assert read(folder, bands=["B8A"]).values.shape == (1, 6, 6)
    # the offset of baseline 04.00 is known to whoever takes the data
    assert "x - 1000" in str(plan(Raster(channels=("B02",), sensor="sentinel-2", level="L1C", units="dn"), bands))


def test_of_a_band_at_several_resolutions_the_finest_is_read(tmp_path):
    for metres in (20, 60, 10):
        path = tmp_path / f"GRANULE/L2A/IMG_DATA/R{metres}m/T32UMC_20220301T103021_B02_{metres}m.tif"
        write(path, numbers(1, 120 // metres, 120 // metres), metres=float(metres))
    (tmp_path / "MTD_MSIL2A.xml").write_text(MTD)
    bands = read(tmp_path)
    assert (bands.values.shape, bands.level) == ((1, 12, 12), "L2A")


def test_names_of_plain_files_tell_the_bands_apart(tmp_path):
    values = {name: numbers(1, 4, 4, seed=number) for number, name in enumerate(("B08", "B8A", "B8", "SCL", "B12"))}
    for name in ("B08", "B8A", "SCL", "B12"):
        write(tmp_path / f"S2A_MSIL2A_20200105T103021_N0213_R108_T32UMC_{name}.tif", values[name])
    bands = read(tmp_path)
    assert bands.channels == ("B08", "B12", "B8A") and (bands.sensor, bands.level, bands.baseline) == ("sentinel-2", "L2A", "02.13")
    assert bands.units == "" and bands.time == "2020-01-05T10:30:21"
    np.testing.assert_array_equal(read(tmp_path, bands=["B8A"]).values, values["B8A"])


def test_names_that_tell_nothing_are_named_by_the_sidecar(tmp_path):
    for name in ("one", "two", "labels"):
        write(tmp_path / f"{name}.tif", numbers(1, 4, 4, seed=len(name)))
    assert read(tmp_path).channels == ("labels", "one", "two")
    (tmp_path / "bands.json").write_text(
        json.dumps({"files": {"nir": "two.tif", "red": "one.tif"}, "sensor": "landsat-7", "units": "dn"})
    )
    bands = read(tmp_path)
    assert (bands.channels, bands.sensor) == (("nir", "red"), "landsat-7")
    listed = read([tmp_path / "two.tif", tmp_path / "one.tif"], channels=["a", "b"])
    np.testing.assert_array_equal(listed.values, bands.values)


MTL_1 = """GROUP = L1_METADATA_FILE
  GROUP = PRODUCT_METADATA
    DATA_TYPE = "L1TP"
    SPACECRAFT_ID = "LANDSAT_{number}"
    DATE_ACQUIRED = 2013-07-07
    SCENE_CENTER_TIME = "10:17:42.1649470Z"
{files}    FILE_NAME_BAND_QUALITY = "{stem}_BQA.TIF"
  END_GROUP = PRODUCT_METADATA
  GROUP = IMAGE_ATTRIBUTES
    SUN_ELEVATION = 30.0
  END_GROUP = IMAGE_ATTRIBUTES
  GROUP = RADIOMETRIC_RESCALING
{scales}  END_GROUP = RADIOMETRIC_RESCALING
END_GROUP = L1_METADATA_FILE
END
"""


def landsat(folder, number, bands, scale="REFLECTANCE_MULT_BAND_{0} = {1}e-5\n    REFLECTANCE_ADD_BAND_{0} = -0.1", metres=30.0):
    """A product of Collection 1; the gain of band n is n * 1e-5."""
    stem = f"L{'C' if number == 8 else 'E'}0{number}_L1TP_195025_20130707_20170503_01_T1"
    for seed, name in enumerate((*bands, "QA")):
        file = f"{stem}_BQA.TIF" if name == "QA" else f"{stem}_B{name}.TIF"
        size = 8 if name == "8" else 4
        write(folder / file, numbers(1, size, size, dtype="int16", seed=seed), metres=metres * 4 / size)
    files = "".join(f'    FILE_NAME_BAND_{name} = "{stem}_B{name}.TIF"\n' for name in bands)
    scales = "".join(f"    {scale.format(name, name[0])}\n" for name in bands if len(name) == 1)
    (folder / f"{stem}_MTL.txt").write_text(MTL_1.format(number=number, stem=stem, files=files, scales=scales))
    return folder / f"{stem}_MTL.txt"


def test_a_level_1_product_of_landsat_gives_its_scale_to_reflectance(tmp_path):
    landsat(tmp_path, 8, ("2", "3", "4", "8", "10"))
    bands = read(tmp_path)
    assert bands.channels == ("B2", "B3", "B4")  # neither the panchromatic nor the thermal band
    assert (bands.sensor, bands.level, bands.units, bands.nodata) == ("landsat-8", "L1", "reflectance", 0)
    assert bands.scale == pytest.approx([n * 1e-5 / math.sin(math.radians(30)) for n in (2, 3, 4)])
    assert bands.offset == pytest.approx([-0.2] * 3) and bands.time == "2013-07-07T10:17:42"
    reordered = read(tmp_path, bands=["red", "blue"])
    assert reordered.channels == ("B4", "B2") and reordered.scale == pytest.approx([8e-5, 4e-5])
    assert read(tmp_path, units="dn").scale == (1,)
    thermal = read(tmp_path, bands=["thermal"])
    assert (thermal.units, thermal.scale) == ("dn", (1,))


def test_red_is_band_4_of_landsat_8_and_band_3_of_landsat_7(tmp_path):
    eight, seven = landsat(tmp_path, 8, ("3", "4")), landsat(tmp_path, 7, ("3", "4", "6_VCID_1", "6_VCID_2"))
    assert read(eight, bands=["red"]).channels == ("B4",)
    assert read(seven, bands=["red"]).channels == ("B3",)
    assert read(seven).channels == ("B3", "B4") and read(seven, bands=["B6_VCID_2"]).channels == ("B6_VCID_2",)
    with pytest.raises(GeoError, match="holds several products; name one: LC08.*MTL.txt, LE07.*MTL.txt"):
        read(tmp_path)


def test_metadata_of_before_collection_1_know_radiance_only(tmp_path):
    bands = read(landsat(tmp_path, 7, ("3",), "RADIANCE_MULT_BAND_{0} = 0.62\n    RADIANCE_ADD_BAND_{0} = -5.0"))
    day = 188  # of the year; the distance is within 0.0003 of the almanac's 1.01670
    distance = 1 - 0.01672 * math.cos(math.radians(0.9856 * (day - 4)))
    assert abs(distance - 1.01670) < 3e-4
    factor = math.pi * distance**2 / (1533 * 0.5)
    assert (
        bands.units == "reflectance"
        and bands.scale == pytest.approx([0.62 * factor])
        and bands.offset == pytest.approx([-5 * factor])
    )


MTL_2 = """GROUP = LANDSAT_METADATA_FILE
  GROUP = PRODUCT_CONTENTS
    PROCESSING_LEVEL = "L2SP"
    FILE_NAME_BAND_4 = "{stem}_SR_B4.TIF"
    FILE_NAME_BAND_ST_B10 = "{stem}_ST_B10.TIF"
    FILE_NAME_QUALITY_L1_PIXEL = "{stem}_QA_PIXEL.TIF"
  END_GROUP = PRODUCT_CONTENTS
  GROUP = IMAGE_ATTRIBUTES
    SPACECRAFT_ID = "LANDSAT_9"
    SUN_ELEVATION = 30.0
  END_GROUP = IMAGE_ATTRIBUTES
  GROUP = LEVEL1_RADIOMETRIC_RESCALING
    REFLECTANCE_MULT_BAND_4 = 2.0E-05
    REFLECTANCE_ADD_BAND_4 = -0.1
  END_GROUP = LEVEL1_RADIOMETRIC_RESCALING
END_GROUP = LANDSAT_METADATA_FILE
END
"""


def test_a_level_2_product_is_stored_by_the_rule_of_its_level(tmp_path):
    stem = "LC09_L2SP_195025_20220707_20220708_02_T1"
    write(tmp_path / f"{stem}_SR_B4.TIF", numbers(1, 4, 4))
    write(tmp_path / f"{stem}_ST_B10.TIF", numbers(1, 4, 4))
    (tmp_path / f"{stem}_MTL.txt").write_text(MTL_2.format(stem=stem))
    bands = read(tmp_path)
    assert (bands.channels, bands.sensor, bands.level, bands.units, bands.scale) == (("B4",), "landsat-9", "L2", "dn", (1,))
    assert read(tmp_path, bands=["thermal"]).channels == ("B10",)
    made = plan(Raster(channels=("red",), sensor="landsat-8", units="reflectance"), bands, allow={"sensor": "a test"})
    assert "x * 2.75e-05 - 0.2" in str(made)


# -- what is refused --------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path):
    with pytest.raises(GeoError, match="nowhere.tif: no such file or folder"):
        read(tmp_path / "nowhere.tif")
    with pytest.raises(GeoError, match="no raster in this folder; looked for .tif .tiff .jp2"):
        read(tmp_path)
    (tmp_path / "text.tif").write_text("no picture")
    with pytest.raises(GeoError, match="text.tif: torn, or no raster"):
        read(tmp_path / "text.tif")
    with pytest.raises(GeoError, match="gone.tif: no such file"):
        read([tmp_path / "gone.tif"])
    whole = write(tmp_path / "whole.tif", numbers(2, 64, 64)).read_bytes()
    (tmp_path / "torn.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GeoError, match="torn.tif: torn") as caught:
        read(tmp_path / "torn.tif")
    assert "\n" not in str(caught.value)
    with pytest.raises(GeoError, match="unknown field 'sensors'"):
        read(tmp_path / "whole.tif", sensors="s2")
    with pytest.raises(GeoError, match="2 bands, but channels names 1: B02"):
        read(tmp_path / "whole.tif", channels="B02")


def test_a_tear_is_found_where_it_is_read(tmp_path):
    path = write(tmp_path / "a.tif", numbers(1, 64, 64), blockysize=8)
    path.write_bytes(path.read_bytes()[:5000])  # the directory comes first, rows 0..31 are whole
    with Scene(path) as scene:
        assert scene.read((0, 0, 16, 64)).values.shape == (1, 16, 64)
        with pytest.raises(GeoError, match=r"a.tif: torn, cannot be read at rows 48..63, columns 0..9"):
            scene.read((48, 0, 16, 10))


def test_files_of_other_places_do_not_make_a_scene(tmp_path):
    write(tmp_path / "a/x_B02.tif", numbers(1, 8, 8))
    write(tmp_path / "a/x_B03.tif", numbers(1, 8, 8), origin=(ORIGIN[0] + 500, ORIGIN[1]))
    with pytest.raises(GeoError, match="x_B03.tif: 8x8 pixels over .* the files of a scene cover the same place"):
        read(tmp_path / "a")
    write(tmp_path / "b/x_B02.tif", numbers(1, 8, 8))
    write(tmp_path / "b/x_B03.tif", numbers(1, 8, 8), crs="EPSG:32633")
    with pytest.raises(GeoError, match="x_B03.tif: EPSG:32633, and x_B02.tif has EPSG:32632"):
        read(tmp_path / "b")
    write(tmp_path / "c/x_B02.tif", numbers(1, 8, 8), crs=None)
    write(tmp_path / "c/x_B03.tif", numbers(1, 4, 4), crs=None)
    with pytest.raises(GeoError, match="cover the same place"):
        read(tmp_path / "c")
    write(tmp_path / "d/x_B02.tif", numbers(2, 8, 8))
    with pytest.raises(GeoError, match="x_B02.tif: 2 bands; each file of a scene's folder holds one"):
        read(tmp_path / "d")


def test_a_sidecar_with_a_slip_is_refused(tmp_path):
    path = write(tmp_path / "a.tif", numbers(1, 4, 4))
    for text, what in (
        ('{"chanels": ["red"]}', "'chanels'; expected an object with some of channels"),
        ("[1]", "a list; expected an object with some of channels"),
        ("{", "no JSON"),
    ):
        (tmp_path / "bands.json").write_text(text)
        with pytest.raises(GeoError, match=f"bands.json: {what}"):
            read(path)
    (tmp_path / "bands.json").write_text('{"units": "furlongs"}')
    with pytest.raises(PreprocessError, match="units 'furlongs': expected one of dn, reflectance"):
        read(path)


def test_metadata_that_are_none(tmp_path):
    (tmp_path / "x_MTL.txt").write_text("GROUP = nothing\n")
    with pytest.raises(GeoError, match="x_MTL.txt: expected the metadata of a Landsat product"):
        read(tmp_path)
    (tmp_path / "MTD_MSIL1C.xml").write_text("<a>")
    with pytest.raises(GeoError, match="MTD_MSIL1C.xml: torn, or no XML"):
        read(tmp_path / "MTD_MSIL1C.xml")
    (tmp_path / "MTD_MSIL1C.xml").write_text(MTD)
    with pytest.raises(GeoError, match="no band files below GRANULE"):
        read(tmp_path / "MTD_MSIL1C.xml")


def test_without_rasterio_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", numbers(1, 4, 4))
    geotiff._rasterio.cache_clear()
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImportError, match=r"reading GeoTIFF needs the package rasterio: pip install okavango\[geo\]"):
        read(path)


# -- patches ----------------------------------------------------------------------------------------------------------------


def eurosat(folder, count=3, classes=("Forest", "River"), said=None, **profile):
    """A folder per class of 13-band patches."""
    for label, name in enumerate(classes):
        for number in range(count):
            write(folder / name / f"{name}_{number}.tif", numbers(4, 8, 8, seed=10 * label + number), **profile)
    if said is not None:
        (folder / "bands.json").write_text(json.dumps(said))
    return folder


SAID = {"sensor": "sentinel-2", "level": "L1C", "units": "dn", "baseline": "02.08", "channels": ["B02", "B03", "B04", "B8A"]}


def test_a_folder_of_patches_is_a_source_of_bands(tmp_path):
    source = open_source(eurosat(tmp_path / "data", said=SAID, nodata=0))
    assert isinstance(source, Patches) and source.classes == ("Forest", "River") and list(source.labels) == [0] * 3 + [1] * 3
    sample = source[4]
    assert (sample["id"], sample["label"]) == ("River/River_1.tif", 1)
    image = sample["image"]
    assert (image.channels, image.units, image.nodata, image.baseline) == (("B02", "B03", "B04", "B8A"), "dn", 0, "02.08")
    np.testing.assert_array_equal(image.values, read(tmp_path / "data/River/River_1.tif").values)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[4]["image"].values, image.values)
    assert again.digest == source.digest != open_source(eurosat(tmp_path / "more", 4, said=SAID)).digest
    kept = cached(source)
    assert kept[4]["image"] is kept[4]["image"]


def test_both_parts_share_the_sidecar_above_them(tmp_path):
    for part in ("train", "test"):
        eurosat(tmp_path / part)
    (tmp_path / "bands.json").write_text(json.dumps(SAID))
    assert open_source(tmp_path / "train")[0]["image"].channels == ("B02", "B03", "B04", "B8A")


def test_without_a_sidecar_tags_speak_and_the_rest_is_unknown(tmp_path):
    image = open_source(eurosat(tmp_path, names=("B2", "B3", "B4", "B8")))[0]["image"]
    assert image.channels == ("B2", "B3", "B4", "B8") and image.units == ""


def test_a_patch_that_cannot_be_read_is_a_bad_sample(tmp_path):
    source = open_source(eurosat(tmp_path, said=SAID))
    path = tmp_path / "Forest/Forest_1.tif"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadSample, match="^Forest/Forest_1.tif: torn"):
        source[1]
    write(path, numbers(3, 8, 8))
    with pytest.raises(BadSample, match="3 bands of uint16, and the first file has 4 of uint16"):
        source[1]


def test_patches_with_masks_of_their_own_are_read_with_them(tmp_path):
    for number in range(2):
        values = numbers(4, 6, 6, dtype="uint8", seed=number)
        values[3] = 255 * (np.arange(36).reshape(6, 6) > number)
        write(tmp_path / f"{number}.tif", values, photometric="rgb", alpha="yes")
    (tmp_path / "bands.json").write_text('{"units": "u8"}')
    source = open_source(tmp_path)
    assert [int((~source[number]["image"].mask).sum()) for number in range(2)] == [3, 6]


def test_pictures_in_tiff_files_stay_pictures(tmp_path):
    Image.fromarray(numbers(5, 6, 3, dtype="uint8")).save(tmp_path / "a.tif")
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder) and source[0]["image"].shape == (3, 5, 6)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "grey.tif")
    assert open_source(tmp_path)[0]["image"].max() == 255


# -- what files in the wild are like ----------------------------------------------------------------------------------------


def test_files_with_marks_of_their_own_do_not_make_gaps_in_each_other(tmp_path):
    first, second = numbers(1, 4, 4, dtype="uint8"), numbers(1, 4, 4, seed=1)
    first[0, 0, 0], second[0, 0, 0], second[0, 3, 3] = 255, 255, 0
    write(tmp_path / "x_B02.tif", first, nodata=255)
    write(tmp_path / "x_B03.tif", second, nodata=0)
    bands = read(tmp_path)
    assert bands.nodata is None and bands.values[1, 0, 0] == 255
    assert (~bands.mask).sum() == 2 and not bands.mask[0, 0, 0] and not bands.mask[1, 3, 3]
    write(tmp_path / "x_B03.tif", second)  # without a tag, every value is a measurement
    assert (~read(tmp_path).mask).sum() == 1


def test_a_mark_that_is_no_number_hides_nothing_in_whole_numbers(tmp_path):
    bands = read(write(tmp_path / "a.tif", numbers(1, 4, 4)), nodata=float("nan"))
    assert bands.nodata is None and bands.mask is None
    values = numbers(1, 4, 4, dtype="float32")
    values[0, 1, 1] = np.nan
    bands = read(write(tmp_path / "b.tif", values, nodata=np.nan), window=(0, 0, 5, 4))
    assert (~bands.mask).sum() == 1 + 4


def test_a_mask_beside_the_file_counts(tmp_path):
    valid = np.full((6, 6), 255, np.uint8)
    valid[2:4] = 0
    path = write(tmp_path / "a.tif", numbers(2, 6, 6), names=("B02", "B03"))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(valid)
    assert (tmp_path / "a.tif.msk").exists()
    np.testing.assert_array_equal(read(path).mask, np.stack([valid > 0] * 2))
    assert read(path, window=(4, 0, 2, 6)).mask is None


@pytest.mark.parametrize("beside", [True, False])
def test_a_mask_of_a_later_patch_is_not_overlooked(tmp_path, beside):
    for name in "abc":
        write(tmp_path / f"field/{name}.tif", numbers(1, 6, 6), names=("B02",))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=not beside), rasterio.open(tmp_path / "field/b.tif", "r+") as dataset:
        dataset.write_mask(np.eye(6, dtype=np.uint8) * 255)
    patches = Patches(ImageFolder(tmp_path))
    assert patches[0]["image"].mask is None and patches[2]["image"].mask is None
    np.testing.assert_array_equal(patches[1]["image"].mask[0], np.eye(6) > 0)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"nodata": 0}, "nodata 0.0, and the first file has None"),
        ({"names": ("B03", "B02")}, r"names of bands \('B03', 'B02'\), and the first file has \('B02', 'B03'\)"),
        ({"scales": (1e-4, 1e-4)}, "scales .*, and the first file has"),
    ],
)
def test_a_patch_that_says_something_else_is_named(tmp_path, tags, message):
    write(tmp_path / "field/a.tif", numbers(2, 4, 4), names=("B02", "B03"))
    write(tmp_path / "field/b.tif", numbers(2, 4, 4), **{"names": ("B02", "B03"), **tags})
    with pytest.raises(BadSample, match=message):
        Patches(ImageFolder(tmp_path))[1]


def test_masked_arrays_of_rasterio_are_bands_with_their_mask(tmp_path):
    values = numbers(2, 5, 5)
    values[:, 1, 2] = 0
    path = write(tmp_path / "a.tif", values, names=("B04", "B03"), nodata=0)
    about = {"channels": ("B04", "B03"), "sensor": "sentinel-2", "level": "L2A", "units": "dn", "baseline": "02.08"}
    with rasterio.open(path) as dataset:
        bands = Bands(values=dataset.read(masked=True), **about)
        with pytest.raises(PreprocessError, match="a masked array, and a mask besides"):
            Bands(values=dataset.read(masked=True), mask=np.ones((5, 5), bool), **about)
    assert not isinstance(bands.values, np.ma.MaskedArray) and not bands.mask[:, 1, 2].any() and bands.mask.sum() == 48
    spec = Preprocess(image=Raster(channels=("B03", "B04"), sensor="sentinel-2", level="L2A", units="dn", size=(5, 5)))
    torch.testing.assert_close(spec(image=bands)["image"], spec(image=Bands(values=values, nodata=0, **about))["image"])


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
def test_the_order_of_bytes_in_a_file_does_not_matter(tmp_path, dtype):
    values = numbers(2, 6, 6, dtype=dtype)
    path = write(tmp_path / "a.tif", values, names=("B04", "B03"), ENDIANNESS="BIG")
    assert path.read_bytes()[:2] == b"MM"
    bands = read(path)
    np.testing.assert_array_equal(bands.values, values)
    about = {"channels": ("red", "green"), "sensor": "naip", "units": "reflectance", "scale": 1e-3}
    spec = Preprocess(image=Raster(channels=("red",), sensor="naip", units="reflectance", size=(6, 6)))
    swapped = values.astype(values.dtype.newbyteorder(">"))
    torch.testing.assert_close(
        spec(image=Bands(values=swapped, **about))["image"], spec(image=Bands(values=values, **about))["image"]
    )


@pytest.mark.parametrize("angle", [0, 30, 90, 180])
def test_a_grid_at_an_angle_is_read_and_stays_where_it_lies(tmp_path, angle):
    turned = Affine.translation(*ORIGIN) * Affine.rotation(angle) * Affine.scale(10, -10)
    values = numbers(2, 8, 6)
    write(tmp_path / "x_B02.tif", values[:1], transform=turned)
    write(tmp_path / "x_B03.tif", values[1:], transform=turned)
    with Scene(tmp_path) as scene:
        bands = scene.read((2, 1, 3, 4))
        assert scene.block >= 1
    np.testing.assert_array_equal(bands.values, values[:, 2:5, 1:5])
    assert bands.resolution == pytest.approx(10)
    assert tuple(bands.transform) == pytest.approx(tuple(turned * Affine.translation(1, 2))[:6])
    if angle == 30:
        with pytest.raises(GeoError, match="lies at an angle to its coordinate system; leave resolution= out"):
            read(tmp_path, resolution=20)
        write(tmp_path / "x_B04.tif", numbers(1, 4, 3), transform=turned * Affine.scale(2))
        with pytest.raises(GeoError, match="x_B04.tif: 3x4 pixels .* cover the same place"):
            read(tmp_path)


def test_a_file_that_stands_on_its_head_is_not_mixed_with_others(tmp_path):
    write(tmp_path / "x_B02.tif", numbers(1, 8, 8))
    head = Affine(10, 0, ORIGIN[0], 0, 10, ORIGIN[1] - 80)
    write(tmp_path / "x_B03.tif", numbers(1, 8, 8), transform=head)
    with pytest.raises(GeoError, match="x_B03.tif: 8x8 pixels"):
        read(tmp_path)
    alone = read(tmp_path / "x_B03.tif")
    np.testing.assert_array_equal(alone.values, numbers(1, 8, 8))
    assert alone.transform == (10, 0, ORIGIN[0], 0, 10, ORIGIN[1] - 80)


def test_resolution_is_in_metres_where_maps_are_in_feet(tmp_path):
    feet = read(write(tmp_path / "a.tif", numbers(1, 4, 4), metres=10.0, crs="EPSG:2264"))
    assert feet.resolution == pytest.approx(10 * 1200 / 3937)
    degrees = read(write(tmp_path / "b.tif", numbers(1, 4, 4), metres=0.001, crs="EPSG:4326", origin=(8, 50)))
    assert degrees.resolution is None


def test_files_of_different_extent_are_named_with_both(tmp_path):
    write(tmp_path / "x_B04_10m.tif", numbers(1, 12, 12))
    write(tmp_path / "x_B05_20m.tif", numbers(1, 8, 6), metres=20.0)
    with pytest.raises(GeoError, match=r"x_B05_20m.tif: 6x8 pixels over .* x_B04_10m.tif has 12x12 over"):
        read(tmp_path)
    write(tmp_path / "x_B05_20m.tif", numbers(1, 7, 7), metres=20.0)  # a pixel more, as at the borders of products
    assert read(tmp_path).values.shape == (2, 12, 12)


def test_a_palette_is_not_taken_for_a_measurement(tmp_path):
    path = write(tmp_path / "a.tif", numbers(1, 4, 4, dtype="uint8"), photometric="palette")
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {number: (number, 0, 255 - number, 255) for number in range(256)})
    bands = read(path)
    assert (bands.channels, bands.units) == (("palette",), "")
    spec = Preprocess(image=Raster(channels=("red",), sensor="", units="u8", size=(4, 4)))
    with pytest.raises(PreprocessError, match="unit of the data is not known"):
        spec(image=bands)
    with pytest.raises(PreprocessError, match="the data lack band red; they have palette"):
        spec(image=read(path, units="u8"))
    assert read(path, channels=["classes"]).channels == ("classes",)  # a map of classes may have colours


def test_complex_numbers_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", numbers(1, 4, 4).astype("complex64"), names=("VV",))
    with pytest.raises(GeoError, match="a.tif: holds complex numbers; write their magnitude or power"):
        read(path)


def test_overviews_are_never_read(tmp_path):
    values = numbers(1, 256, 256)
    path = write(tmp_path / "a.tif", values, tiled=True, blockxsize=128, blockysize=128)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4], rasterio.enums.Resampling.nearest)
    cog = tmp_path / "cog.tif"
    with rasterio.open(path) as source:
        rasterio.shutil.copy(source, cog, driver="COG", blocksize=128, overview_resampling="nearest")
    for file in (path, cog):
        half = read(file, resolution=20)
        np.testing.assert_allclose(half.values[0], values[0].reshape(128, 2, 128, 2).mean((1, 3)), rtol=1e-6)


def test_files_beyond_four_gigabytes(tmp_path):
    path, side = tmp_path / "a.tif", 70_000  # sparse: blocks that were never written take no room
    place = {"transform": Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1]), "crs": "EPSG:32632", "sparse_ok": True}
    profile = {"width": side, "height": side, "count": 1, "dtype": "uint8", "tiled": True, "bigtiff": "yes", "nodata": 0}
    with rasterio.open(path, "w", driver="GTiff", **profile, **place) as dataset:
        dataset.write(np.full((1, 16, 16), 9, np.uint8), window=((69_000, 69_016), (69_500, 69_516)))
    assert path.stat().st_size < 2**20 * 20 and path.read_bytes()[:4] == b"II+\0"
    with Scene(path) as scene:
        assert (scene.height, scene.width) == (side, side)
        bands = scene.read((68_999, 69_499, 4, 4))
    np.testing.assert_array_equal(bands.values[0], [[0] * 4] + [[0, 9, 9, 9]] * 3)


def test_a_description_of_bands_that_a_vrt_puts_together_counts_band_by_band(tmp_path):
    values = numbers(1, 4, 4)
    values[0, 0, 0], values[0, 1, 1] = 0, 7
    write(tmp_path / "one.tif", values)
    band = "<VRTRasterBand dataType='UInt16' band='{0}'><NoDataValue>{1}</NoDataValue><Description>{2}</Description><SimpleSource>"
    band += "<SourceFilename relativeToVRT='1'>one.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
    text = band.format(1, 0, "B02") + band.format(2, 7, "B03")
    (tmp_path / "a.vrt").write_text(f"<VRTDataset rasterXSize='4' rasterYSize='4'>{text}</VRTDataset>")
    bands = read(tmp_path / "a.vrt")
    assert bands.channels == ("B02", "B03") and bands.nodata is None
    assert np.argwhere(~bands.mask).tolist() == [[0, 0, 0], [1, 1, 1]]
