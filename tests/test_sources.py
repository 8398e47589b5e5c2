"""Sources: what is found, how odd pictures are decoded, and how broken ones are reported."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from okavango.data import sources
from okavango.data.sources import Arrays, BadSample, HuggingFace, ImageFolder, Shards, cached, decode, open_source
from okavango.samples import build_fashion
from okavango.samples.fashion import fashion, moved


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def write_tar(path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# -- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
@pytest.mark.parametrize("size", [(1, 1), (5, 9)])
def test_plain_pictures_decode_as_pil_does(form, size):
    data = encoded(picture(*size), form, **({"lossless": True} if form == "WEBP" else {}))
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    got = decode(data, "x")
    assert got.dtype == torch.uint8 and got.shape == (3, *size)
    np.testing.assert_allclose(got.permute(1, 2, 0), want, atol=3 if form == "JPEG" else 0)


def test_grey_stays_one_channel():
    values = picture(4, 6, 1)
    assert torch.equal(decode(encoded(values), "x"), torch.from_numpy(values)[None])
    assert decode(encoded(values, "JPEG"), "x").shape == (1, 4, 6)
    bits = Image.fromarray(values).convert("1")
    assert torch.equal(decode(encoded(bits), "x")[0] > 0, torch.from_numpy(np.array(bits)))
    assert torch.equal(decode(encoded(Image.fromarray(values).convert("LA")), "x"), torch.from_numpy(values)[None])


def test_palette_alpha_and_cmyk_become_rgb():
    values = picture(8, 8)
    palette = Image.fromarray(values).quantize(16)
    np.testing.assert_array_equal(decode(encoded(palette), "x").permute(1, 2, 0), np.asarray(palette.convert("RGB")))
    rgba = np.concatenate([values, picture(8, 8, 1, seed=1)[..., None]], -1)
    np.testing.assert_array_equal(decode(encoded(rgba), "x").permute(1, 2, 0), values)
    cmyk = encoded(Image.fromarray(values).convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_allclose(
        decode(cmyk, "x").permute(1, 2, 0).float(), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")), atol=1
    )


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(form):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert decode(encoded(Image.fromarray(values), form), "x").tolist() == [[[0, 1, 128, 255]]]


def test_pil_alone_decodes_the_same(monkeypatch):
    files = [encoded(picture(8, 8)), encoded(picture(8, 8, 1)), encoded(picture(16, 16), "JPEG")]
    fast = [decode(data, "x") for data in files]
    monkeypatch.setattr(sources, "decode_image", None)
    for data, want in zip(files, fast, strict=True):
        torch.testing.assert_close(decode(data, "x"), want, atol=3, rtol=0)


def test_float_pictures_are_refused():
    with pytest.raises(BadSample, match="no known range"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "x")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(form):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    values = np.zeros((16, 32, 3), np.uint8)
    values[:, :16] = 255
    got = decode(encoded(values, form, exif=exif), "x").float().mean(0)
    assert got.shape == (32, 16)
    assert got[:15].mean() > 250 and got[17:].mean() < 5


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_max_side_shrinks(form):
    ramp = np.broadcast_to(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], (200, 400, 3)).copy()
    got = decode(encoded(ramp, form), "x", max_side=50)
    assert got.shape == (3, 25, 50)
    want = torch.linspace(0, 255, 400).view(50, 8).mean(1)
    assert (got.float().mean((0, 1)) - want).abs().max() < 4
    assert decode(encoded(ramp, form), "x", max_side=400).shape == (3, 200, 400)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@settings(max_examples=12, deadline=None)
@given(share=st.floats(0, 0.9))
def test_torn_files_are_bad_samples(form, share):
    data = encoded(picture(40, 40), form)
    with pytest.raises(BadSample) as caught:
        decode(data[: int(len(data) * share)], "some/id")
    assert caught.value.id == "some/id" and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    head=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]), data=st.binary(max_size=80)
)
def test_noise_never_raises_anything_else(head, data):
    with contextlib.suppress(BadSample):
        assert decode(head + data, "x").dtype == torch.uint8


def test_bad_sample_survives_a_pickle():
    error = pickle.loads(pickle.dumps(BadSample("a/b.jpg", "torn")))
    assert (error.id, error.reason, str(error)) == ("a/b.jpg", "torn", "a/b.jpg: torn")


# -- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, data in {
        "zebra/2.PNG": encoded(picture(3, 3)),
        "ant/deep/1.jpg": encoded(picture(8, 8), "JPEG"),
        "ant/torn.jpeg": encoded(picture(50, 50), "JPEG")[:700],
        "ant/empty.png": b"",
        "ant/text.jpg": b"no picture here",
        "ant/notes.txt": b"left out",
        "ant/.hidden.png": b"left out",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def test_folder_is_sorted_and_named_by_its_subfolders(folder):
    source = open_source(str(folder))
    assert isinstance(source, ImageFolder)
    assert list(source.ids) == ["ant/deep/1.jpg", "ant/empty.png", "ant/text.jpg", "ant/torn.jpeg", "zebra/2.PNG"]
    assert source.classes == ("ant", "zebra") and source.labels.tolist() == [0, 0, 0, 0, 1]
    sample = source[4]
    assert sample["label"] == 1 and sample["id"] == "zebra/2.PNG" and sample["image"].shape == (3, 3, 3)
    assert source[-1]["id"] == "zebra/2.PNG"
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(("index", "reason"), [(1, "file is empty"), (2, "not a picture"), (3, ".")])
def test_unreadable_files_say_why(folder, index, reason):
    with pytest.raises(BadSample, match=reason):
        open_source(folder)[index]


def test_vanished_file_is_a_bad_sample(folder):
    source = open_source(folder)
    (folder / "zebra/2.PNG").unlink()
    with pytest.raises(BadSample, match="No such file"):
        source[4]


def test_flat_folder_is_unlabelled(tmp_path):
    (tmp_path / "b.png").write_bytes(encoded(picture(2, 2)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.png").write_bytes(encoded(picture(2, 2)))
    source = ImageFolder(tmp_path)
    assert source.labels is None and source.classes == () and "label" not in source[0]


def test_link_back_to_the_folder_ends(folder):
    (folder / "ant/again").symlink_to(folder, target_is_directory=True)
    assert len(ImageFolder(folder)) == 5


def test_digest_follows_content_not_place(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(folder, other)
    before = ImageFolder(folder).digest
    assert ImageFolder(other).digest == before
    (other / "ant/text.jpg").write_bytes(b"longer than it was before")
    assert ImageFolder(other).digest != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}", "no pictures .* looked for .jpg"),
        ("{tmp}/missing", "no such folder"),
        ("{tmp}/missing.tar", "no shard"),
        ("{tmp}/*.tar", "no .tar shards match"),
        ("https://example.org/a.tar", "only local data"),
        ("samples/nothing", "samples/fashion"),
        ("samples/fashion:validation", "train, test and moved"),
        ("{tmp}/file.zip", "is a file"),
    ],
)
def test_nothing_there_is_one_clear_line(tmp_path, spec, message):
    if spec.endswith(".zip"):
        (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=message) as caught:
        open_source(spec.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


# -- shards -------------------------------------------------------------------------------------------------------


def shard_members(count=4, first=0):
    for i in range(first, first + count):
        yield f"{i:04d}.png", encoded(picture(4, 4, seed=i))
        yield f"{i:04d}.cls", str(i % 3).encode()
        yield f"{i:04d}.json", json.dumps({"note": i}).encode()


def test_shards_agree_with_the_webdataset_library(tmp_path):
    wds = pytest.importorskip("webdataset")
    for number in range(2):
        write_tar(tmp_path / f"a-{number:02d}.tar", list(shard_members(first=4 * number)))
    source = open_source(f"{tmp_path}/a-{{00..01}}.tar")
    theirs = list(wds.WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False, empty_check=False))
    assert len(source) == len(theirs) == 8
    for ours, other in zip((source[i] for i in range(8)), theirs, strict=True):
        assert ours["id"].split("/")[1] == other["__key__"] and ours["label"] == int(other["cls"])
        assert torch.equal(ours["image"], decode(other["png"], "x"))
    assert open_source(tmp_path).digest == source.digest == Shards(f"{tmp_path}/*.tar").digest


def test_folders_inside_a_tar_are_classes_and_dots_split_keys(tmp_path):
    data = encoded(picture(2, 2))
    write_tar(tmp_path / "x.tar", [("b/1.0.seg.PNG", data), ("a/2.png", data), ("a/README", b""), ("__meta__.json", b"{}")])
    source = Shards(tmp_path / "x.tar")
    assert list(source.ids) == ["x/b/1", "x/a/2"] and source.classes == ("a", "b") and source.labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("b\na\nc")
    again = Shards(tmp_path / "x.tar")
    assert again.classes == ("b", "a", "c") and again.labels.tolist() == [0, 1]


@pytest.mark.parametrize("cut", [300, 700, 512 * 4, 512 * 5, 512 * 5 + 17])
def test_cut_tar_is_reported(tmp_path, cut):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{i}.png", encoded(picture(8, 8))) for i in range(4)])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="is torn"):
        Shards(path)


def test_compressed_tar_and_wrong_labels_are_reported(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        Shards(path)
    data = encoded(picture(2, 2))
    write_tar(path, [("1.png", data), ("1.cls", b"cat")])
    with pytest.raises(ValueError, match="label of sample '1' is not a number"):
        Shards(path)
    write_tar(path, [("1.png", data), ("1.cls", b"0"), ("2.png", data)])
    with pytest.raises(ValueError, match="x/2 has no label"):
        Shards(path)
    write_tar(path, [("1.txt", data)])
    with pytest.raises(ValueError, match="no pictures in the shards"):
        Shards(path)


def test_torn_picture_in_a_whole_tar_is_a_bad_sample(tmp_path):
    write_tar(tmp_path / "x.tar", [("1.jpg", encoded(picture(40, 40), "JPEG")[:500]), ("2.jpg", b"")])
    source = Shards(tmp_path)
    for index, id in enumerate(("x/1", "x/2")):
        with pytest.raises(BadSample) as caught:
            source[index]
        assert caught.value.id == id


@settings(deadline=None)
@given(st.lists(st.text(min_size=1)))
def test_names_are_a_sequence_of_strings(names):
    assert list(sources._Names([name.encode("utf-8", "ignore").decode() for name in names])) == [
        name.encode("utf-8", "ignore").decode() for name in names
    ]


def test_braces():
    assert sources._braces("a-{08..10}-{x,y}") == [f"a-{n}-{c}" for n in ("08", "09", "10") for c in "xy"]


# -- arrays and datasets ------------------------------------------------------------------------------------------


def test_arrays():
    images = np.stack([picture(4, 5, seed=i) for i in range(3)])
    source = Arrays(images, [0, 2, 1], classes=("a", "b", "c"))
    assert torch.equal(source[1]["image"], torch.from_numpy(images[1]).permute(2, 0, 1)) and source[1]["label"] == 2
    assert Arrays(images[..., 0])[2]["image"].shape == (1, 4, 5)
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    assert Arrays(changed, [0, 2, 1]).digest != source.digest == Arrays(torch.from_numpy(images), [0, 2, 1]).digest


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4), np.float32), None, "expected uint8"),
        (np.zeros((2, 4, 4, 2), np.uint8), None, "expected uint8"),
        (np.zeros((2, 4, 4), np.uint8), [0], "one for each of 2"),
        (np.zeros((2, 4, 4), np.uint8), [0, -1], "labels run -1"),
    ],
)
def test_arrays_refuse(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Arrays(images, labels)


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [{"bytes": encoded(picture(4, 4, seed=i)), "path": None} for i in range(3)], "kind": [1, 0, 1]}
    rows["img"][2]["bytes"] = b"torn"
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "many")
    for source in (open_source(data), open_source(tmp_path / "one"), open_source(tmp_path / "many/train")):
        assert isinstance(source, HuggingFace) and source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]
        assert torch.equal(source[1]["image"], torch.from_numpy(picture(4, 4, seed=1)).permute(2, 0, 1))
        with pytest.raises(BadSample, match="not a picture"):
            source[2]
    assert open_source(data).digest == open_source(tmp_path / "one").digest
    with pytest.raises(ValueError, match="several splits; .*train"):
        open_source(tmp_path / "many")
    with pytest.raises(ValueError, match="no column 'image'"):
        HuggingFace(data, image="image")
    with pytest.raises(ValueError, match="no image columns"):
        HuggingFace(data.select_columns(["kind"]))


def test_every_source_is_cheap_to_send(folder, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    write_tar(shards / "x.tar", list(shard_members()))
    for source in (open_source(folder), open_source(shards), fashion("test"), moved(fashion("test"), 1)):
        data = pickle.dumps(source)
        again = pickle.loads(data)
        assert again.digest == source.digest and torch.equal(again[0]["image"], source[0]["image"])
        assert len(data) < 20_000 + 80 * len(source)


# -- the sample that ships ----------------------------------------------------------------------------------------


def test_cached_decodes_once_within_its_limit():
    class Counting(Arrays):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    plain = Counting(np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3), [0, 1, 0, 1], classes=("a", "b"))
    kept = cached(plain, limit=2 * 9)
    assert (kept.name, kept.classes, kept.digest, len(kept)) == (plain.name, plain.classes, plain.digest, 4)
    for _ in range(3):
        for index in range(4):
            sample = kept[index]
            assert torch.equal(sample["image"], plain.images[index]) and sample["label"] == index % 2
    assert plain.reads == 2 * 1 + 2 * 3, "the first two were kept, the others did not fit"


def test_shipped_sample_is_what_its_provenance_says():
    facts = json.loads((fashion("test").paths[0].parent / "PROVENANCE.json").read_text())
    for split, count in (("train", 1000), ("test", 200)):
        source = open_source(f"samples/fashion:{split}")
        assert np.bincount(source.labels).tolist() == [count] * 10 == list(facts["splits"][split]["per_class"].values())
        assert source.classes == build_fashion.CLASSES and source[17]["image"].shape == (1, 28, 28)
        for path in source.paths:
            assert build_fashion._sha256(path) == facts["shards_sha256"][path.name]
    assert open_source("samples/fashion").digest == fashion("train").digest


def test_building_the_sample_gives_equal_bytes_and_pixels(tmp_path):
    import gzip

    random = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images, labels = random.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    first = build_fashion.build(tmp_path, tmp_path / "a", {"train": 3, "test": 2})
    assert build_fashion.build(tmp_path, tmp_path / "b", {"train": 3, "test": 2}) == first
    source = Shards(tmp_path / "a" / "test-*.tar")
    assert len(source) == 20 and source.labels.tolist() == (list(range(10)) * 2)
    assert torch.equal(source[13]["image"][0], torch.from_numpy(images[13]))
    with pytest.raises(ValueError, match="fewer than 9"):
        build_fashion.build(tmp_path, tmp_path / "c", {"train": 9, "test": 2})


def test_moved_is_deterministic_and_within_its_ranges():
    square = Arrays(np.full((64, 28, 28), 255, np.uint8), np.zeros(64, int))
    view, again, other = moved(square, 3), moved(square, 3), moved(square, 4)
    assert all(torch.equal(view[i]["image"], again[i]["image"]) for i in range(64))
    assert not any(torch.equal(view[i]["image"], other[i]["image"]) for i in range(64)) and view.digest != other.digest
    sides, offsets, darker = [], [], 0
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    for i in range(64):
        image = view[i]["image"].float()
        colours = image.flatten(1).unique(dim=1)
        if colours.shape[1] == 1:
            sides.append(28)  # the object fills the canvas
            continue
        corner = next(c for c in (image[:, 0, 0], image[:, -1, -1]) if (image == c.view(3, 1, 1)).all(0).float().mean() < 0.65)
        inside = (image != corner.view(3, 1, 1)).any(0)
        rows = inside.any(1).nonzero()[:, 0]
        sides.append(len(rows))
        offsets.append(int(rows[0]))
        assert inside.sum() == len(rows) ** 2
        front = image[:, rows[0], inside[rows[0]].nonzero()[0, 0]]
        difference = float(((front - corner).view(3, 1, 1) * luma).sum())
        assert abs(difference) >= 62  # 64 less rounding of both colours
        darker += difference < 0
    assert 17 <= min(sides) < 20 and 26 < max(sides) <= 28 and len(set(offsets)) > 4
    assert 16 < darker < 48
