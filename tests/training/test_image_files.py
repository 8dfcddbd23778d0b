"""Links, archives, depths and animations among the images."""

import bz2
import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from minegan_fast.training.images import load_images


def save(path, level, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), level).save(path, **options)


def levels(loaded):
    return loaded.images[:, 0, 0, 0].tolist()


def deep(path, values):
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


@pytest.fixture
def links():
    if os.name == "nt":
        pytest.skip("making links takes a privilege on Windows")


def test_linked_folders_are_followed_once_and_loops_end(tmp_path, links):
    save(tmp_path / "real" / "deep" / "1.png", 1)
    save(tmp_path / "set" / "2.png", 2)
    save(tmp_path / "set" / "z" / "3.png", 3)
    (tmp_path / "set" / "more").symlink_to("../real")
    (tmp_path / "set" / "again").symlink_to("z")
    (tmp_path / "set" / "loop").symlink_to(".")
    (tmp_path / "set" / "z" / "back").symlink_to("../more/deep")
    (tmp_path / "real" / "cross").symlink_to("../set")
    loaded = load_images(tmp_path / "set", 8)
    assert loaded.names == ["2.png", "more/deep/1.png", "z/3.png"]
    assert levels(loaded) == [2, 1, 3]
    assert loaded.skipped == []


def test_links_that_cannot_be_followed_are_named(tmp_path, links):
    for i in range(2):
        save(tmp_path / "set" / f"{i}.png", i)
    save(tmp_path / "other.png", 9)
    (tmp_path / "set" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "set" / "up").symlink_to("..")
    with pytest.warns(UserWarning, match="skipped") as caught:
        loaded = load_images(tmp_path / "set", 8)
    assert len(caught) == 2
    assert len(loaded) == 2
    assert dict(loaded.skipped) == {
        "gone.png": "a link that leads nowhere",
        "up": "a link to a folder around this one",
    }


def archive(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


def png(level):
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_data_set_of_stylegan_is_read_and_its_labels_are_named(tmp_path, compression):
    files = {f"00000/img{i:08d}.png": png(i) for i in (5, 4, 3)}
    files |= {"dataset.json": '{"labels": [["00000/img00000003.png", 7]]}', "__MACOSX/._x.png": "x", ".hidden/x": "x"}
    path = archive(tmp_path / "dataset.zip", files, compression=compression)
    with pytest.warns(UserWarning, match=r"labels in 'dataset\.json' are not used") as caught:
        loaded = load_images(path, 8, 1)
    assert len(caught) == 1
    assert loaded.names == [f"00000/img{i:08d}.png" for i in (3, 4, 5)]
    assert levels(loaded) == [3, 4, 5]
    assert loaded.skipped == []


def test_what_an_archive_may_not_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("minegan_fast.training.image_files._LARGEST", 1000)
    path = archive(tmp_path / "a.zip", {"0.png": png(0), "1.png": png(1), "big.png": b"\0" * 1001})
    with zipfile.ZipFile(path, "a") as made:
        made.writestr("odd.png", png(2), compress_type=zipfile.ZIP_BZIP2)
        made.writestr("../../escape.png", png(3))
        made.writestr("Q.png", png(4))
    path.write_bytes(path.read_bytes().replace(b"Q.png", b"\0.png"))  # a name that ends before it begins
    with pytest.warns(UserWarning, match="skipped"):
        loaded = load_images(path, 8, 1)
    reasons = dict(loaded.skipped)
    assert loaded.names == ["0.png", "1.png"]
    assert reasons.keys() == {"big.png", "odd.png"}
    assert "1001 bytes unpacked" in reasons["big.png"]
    assert "deflate" in reasons["odd.png"]
    assert not list(tmp_path.parent.glob("**/escape.png"))
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="or a zip archive of them"):
        load_images(damaged, 8)
    (tmp_path / "x.bz2").write_bytes(bz2.compress(b"x"))
    with pytest.raises(ValueError, match="or a zip archive of them"):
        load_images(tmp_path / "x.bz2", 8)
    with pytest.raises(ValueError, match="holds no files"):
        load_images(archive(tmp_path / "empty.zip", {}), 8)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize(("bits", "peak"), [(8, 255), (8, 200), (10, 1000), (12, 4095), (12, 1500), (14, 9000)])
def test_few_bits_in_16_are_stretched_alike_and_said(tmp_path, bits, peak, suffix):
    deep(tmp_path / f"a.{suffix}", np.full((8, 8), peak))
    deep(tmp_path / f"b.{suffix}", np.full((8, 8), peak // 4))
    save(tmp_path / "c.png", 77)
    with pytest.warns(UserWarning, match=f"reach {peak} at most.* of {bits} bits.*stretched"):
        loaded = load_images(tmp_path, 8)
    white = 2**bits - 1
    assert levels(loaded) == [round(peak * 255 / white), round(peak // 4 * 255 / white), 77]
    assert loaded.images.shape == (3, 3, 8, 8)


def test_whole_16_bits_and_black_are_taken_as_they_are(tmp_path):
    deep(tmp_path / "a.tiff", np.full((8, 8), 257 * 200))
    deep(tmp_path / "b.tiff", np.full((8, 8), 257))  # dark beside the other
    assert levels(load_images(tmp_path, 8, 1)) == [200, 1]
    for name in "ab":
        deep(tmp_path / f"{name}.tiff", np.zeros((8, 8)))
    assert levels(load_images(tmp_path, 8, 1)) == [0, 0]


def test_16_bits_are_resampled_without_clipping(tmp_path):
    checkers = np.indices((64, 64)).sum(0) % 2 * 65535
    for name in "ab":
        deep(tmp_path / f"{name}.tif", checkers)
    assert (load_images(tmp_path, 8, 1).images.int() - 128).abs().max() <= 2


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "jpeg"])
def test_tiff_of_8_bits(tmp_path, compression):
    save(tmp_path / "a.tif", (10, 100, 200), "RGB", compression=compression)
    save(tmp_path / "b.tif", (0, 0, 0, 51), "RGBA")
    image, transparent = load_images(tmp_path, 8).images[:, :, 0, 0]
    assert (image.int() - torch.tensor((10, 100, 200))).abs().max() <= 2
    assert transparent.tolist() == [204] * 3


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff", "avif"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.new("RGB", (8, 8), (c, c, c)) for c in (200, 30, 60)]
    options = {"webp": {"lossless": True}, "avif": {"quality": 100}}.get(suffix, {})
    for name in "ab":
        frames[0].save(tmp_path / f"{name}.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{suffix}") as file:
        assert file.n_frames == 3
    assert all(abs(level - 200) <= 2 for level in levels(load_images(tmp_path, 8)))


def test_pixels_without_a_known_range_are_named(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", i)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "long.tif")
    Image.fromarray(np.full((8, 8), -1, np.int32)).save(tmp_path / "negative.tif")
    Image.fromarray(np.full((8, 8), 9, np.uint16)).save(tmp_path / "white.tif", tiffinfo={262: 0})
    save(tmp_path / "white8.tif", 9, tiffinfo={262: 0})
    (tmp_path / "dark.png").write_bytes(png16(np.full((8, 8, 3), 4000)))
    with pytest.warns(UserWarning, match="skipped"):
        reasons = dict(load_images(tmp_path, 8).skipped)
    assert "floating point" in reasons["float.tif"]
    assert "from 70000 to 70000" in reasons["long.tif"]
    assert "from -1 to -1" in reasons["negative.tif"]
    assert "at most 12 are used" in reasons["dark.png"]
    assert "from white to black" in reasons["white.tif"]
    assert "white8.tif" not in reasons


def png16(pixels):
    """A PNG of 16-bit RGB, which Pillow does not write: the chunks by hand."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bits_of_colour_keep_the_upper_8(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png16(np.full((8, 8, 3), 257 * 90)))
    assert levels(load_images(tmp_path, 8)) == [90, 90]


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_a_bomb_of_the_new_formats_is_named(tmp_path, monkeypatch, suffix):
    for i in range(2):
        save(tmp_path / f"{i}.png", i)
    Image.new("L", (30, 30), 1).save(tmp_path / f"bomb.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match=r"bomb\.(tif|gif)'.*decompression bomb"):
        assert len(load_images(tmp_path, 8)) == 2
