import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minegan_fast.training.images import ImageSet, load_images, save_folder, to_float, to_uint8


def save(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def solid(mode, color, size=(8, 8)):
    return Image.new(mode, size, color)


def load_pair(folder, resolution=8, channels=3):
    """Loads a folder of one image `a.*`, to which a black one is added since two are needed."""
    save(folder, "z.png", solid("L", 0, (resolution, resolution)))
    loaded = load_images(folder, resolution, channels)
    assert len(loaded) == 2
    return loaded.images[0]


@pytest.mark.parametrize(
    ("image", "suffix", "rgb"),
    [
        (solid("RGB", (10, 100, 200)), "png", (10, 100, 200)),
        (solid("L", 77), "png", (77, 77, 77)),
        (solid("1", 1), "png", (255, 255, 255)),
        (solid("RGB", (10, 100, 200)).quantize(4), "png", (10, 100, 200)),
        (solid("RGBA", (10, 100, 200, 255)), "png", (10, 100, 200)),
        (solid("RGBA", (0, 0, 0, 51)), "png", (204, 204, 204)),
        (solid("LA", (0, 51)), "png", (204, 204, 204)),
        (Image.fromarray(np.full((8, 8), 257 * 200, np.uint16)), "png", (200, 200, 200)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), "png", (255, 255, 255)),
        (solid("CMYK", (0, 255, 255, 0)), "jpg", (255, 0, 0)),
        (solid("L", 77), "jpeg", (77, 77, 77)),
        (solid("L", 77), "mpo", (77, 77, 77)),
        (solid("RGB", (10, 100, 200)), "bmp", (10, 100, 200)),
        (solid("RGBA", (0, 0, 0, 0)), "webp", (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb(tmp_path, image, suffix, rgb):
    options = {"webp": {"lossless": True}, "mpo": {"save_all": True, "append_images": [solid("L", 9)]}}
    save(tmp_path, f"a.{suffix}", image, **options.get(suffix, {}))
    pixels = load_pair(tmp_path)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.uint8
    slack = 2 if suffix in ("jpg", "jpeg", "mpo") else 0  # JPEG's own rounding of YCbCr
    assert (pixels.int() - torch.tensor(rgb).view(3, 1, 1)).abs().max() <= slack


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    save(tmp_path, "a.png", image, transparency=0)
    pixels = load_pair(tmp_path)
    assert (pixels[:, :, :4] == 255).all()
    assert (pixels[:, :, 4:] == torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1)).all()


def test_colour_key_transparency_is_white(tmp_path):
    save(tmp_path, "a.png", solid("RGB", (9, 9, 9)), transparency=(9, 9, 9))
    assert (load_pair(tmp_path) == 255).all()


def test_one_channel_is_luma(tmp_path):
    save(tmp_path, "a.png", solid("RGB", (255, 0, 0)))
    pixels = load_pair(tmp_path, channels=1)
    assert pixels.shape == (1, 8, 8)
    assert (pixels == 76).all()  # 0.299 * 255


# The stored corners a b / c d, as a viewer that follows the EXIF orientation shows them.
@pytest.mark.parametrize(("orientation", "shown"), [(1, "abcd"), (3, "dcba"), (6, "cadb"), (8, "bdac"), (2, "badc")])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_rotation_is_applied(tmp_path, orientation, shown, suffix):
    grey = {"a": 0, "b": 80, "c": 160, "d": 240}
    stored = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, f"a.{suffix}", Image.fromarray(stored).convert("RGB"), exif=exif)
    pixels = load_pair(tmp_path, resolution=32)[0].float()
    corners = [pixels[:16, :16], pixels[:16, 16:], pixels[16:, :16], pixels[16:, 16:]]
    assert [round(corner.mean().item() / 80) * 80 for corner in corners] == [grey[letter] for letter in shown]


@pytest.mark.parametrize("damaged", [b"II*\x00" + struct.pack("<IH", 8, 9) + b"\xff" * 7, b"garbage", b"", b"II*\x00"])
def test_damaged_exif_does_not_lose_the_image(tmp_path, damaged):
    save(tmp_path, "a.jpg", solid("L", 77), exif=b"Exif\x00\x00" + damaged)
    assert (load_pair(tmp_path).int() - 77).abs().max() <= 2


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 40), height=st.integers(1, 40), resolution=st.integers(1, 24), channels=st.sampled_from([1, 3])
)
def test_any_size_is_cropped_to_a_square(tmp_path_factory, width, height, resolution, channels):
    folder = tmp_path_factory.mktemp("images")
    for name in "ab":
        save(folder, f"{name}.png", solid("RGB", (40, 40, 40), (width, height)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_images(folder, resolution, channels)
    assert loaded.images.shape == (2, channels, resolution, resolution)
    assert (loaded.images == 40).all()
    assert loaded.enlarged == (2 if min(width, height) < resolution else 0)
    assert len(caught) == (1 if loaded.enlarged else 0)


def test_the_centre_is_kept_and_pixels_are_not_touched_without_need(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    save(tmp_path, "a.png", Image.fromarray(stored))
    assert torch.equal(load_pair(tmp_path), torch.from_numpy(stored[:, 3:11]).permute(2, 0, 1))


def test_shrinking_averages(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path, "a.png", Image.fromarray(checkers))
    assert (load_pair(tmp_path).int() - 128).abs().max() <= 2  # picking pixels would give 0 or 255


def test_a_large_jpeg_keeps_its_look(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 512), (512, 512)).astype(np.uint8)
    save(tmp_path, "a.jpg", Image.fromarray(ramp), quality=95)
    expected = torch.linspace(0, 255, 9)[:8] + 255 / 16
    assert (load_pair(tmp_path)[0].float() - expected).abs().max() <= 4  # the ends of a ramp ring a little


def test_order_is_by_path_and_folders_are_searched(tmp_path):
    for value, name in enumerate(["b/2.png", "a/9.png", "c.png", "b/10.png"]):
        save(tmp_path, name, solid("L", value))
    save(tmp_path, ".hidden/x.png", solid("L", 99))
    save(tmp_path, "._c.png", solid("L", 99))
    loaded = load_images(tmp_path, 8, 1)
    assert loaded.names == ["a/9.png", "b/10.png", "b/2.png", "c.png"]
    assert loaded.images[:, 0, 0, 0].tolist() == [1, 3, 0, 2]
    assert loaded.skipped == []


def test_limit_takes_the_first_readable(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    for value in range(1, 6):
        save(tmp_path, f"{value}.png", solid("L", value))
    with pytest.warns(UserWarning, match=r"skipped '0\.png'"):
        loaded = load_images(str(tmp_path), 8, 1, limit=3)
    assert loaded.names == ["1.png", "2.png", "3.png"]


def truncated(tmp_path, name):
    path = save(tmp_path, name, Image.effect_noise((64, 64), 50))
    path.write_bytes(path.read_bytes()[:-700])


def test_broken_files_are_named_and_skipped(tmp_path):
    truncated(tmp_path, "cut.png")
    truncated(tmp_path, "cut.jpg")
    truncated(tmp_path, "cut.webp")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.png").touch()
    save(tmp_path, "drawing.ppm", solid("L", 1))
    save(tmp_path, "good.png", solid("L", 1))
    (tmp_path / "misnamed.png").write_bytes(save(tmp_path, "good2.jpg", solid("L", 1)).read_bytes())
    with pytest.warns(UserWarning, match="skipped") as caught:
        loaded = load_images(tmp_path, 8, 1)
    assert loaded.names == ["good.png", "good2.jpg", "misnamed.png"]
    bad = ["cut.jpg", "cut.png", "cut.webp", "drawing.ppm", "empty.png", "notes.txt"]
    assert [name for name, _ in loaded.skipped] == bad
    assert len(caught) == len(bad)
    for name, warning in zip(bad, caught, strict=True):
        assert repr(name) in str(warning.message)
        assert warning.filename == __file__
    assert "truncated" in dict(loaded.skipped)["cut.jpg"]
    assert "not a PNG" in dict(loaded.skipped)["notes.txt"]


def test_many_broken_files_are_summed_up(tmp_path):
    for number in range(15):
        (tmp_path / f"{number:02}.png").write_bytes(b"x")
    for name in "ab":
        save(tmp_path, f"{name}.png", solid("L", 1))
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert len(load_images(tmp_path, 8).skipped) == 15
    assert len(caught) == 11
    assert "skipped 15 of 17 files" in str(caught[-1].message)


def test_decompression_bomb_is_skipped(tmp_path, monkeypatch):
    for name in "abc":
        save(tmp_path, f"{name}.png", solid("L", 1, (30, 30) if name == "b" else (8, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match=r"'b\.png'.*bomb"):
        assert load_images(tmp_path, 8).names == ["a.png", "c.png"]


def test_a_large_image_below_the_bomb_limit_is_read(tmp_path, monkeypatch):
    for name in "ab":
        save(tmp_path, f"{name}.png", solid("L", 1, (12, 12)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(load_images(tmp_path, 8)) == 2  # Pillow's own warning would be an error here


def test_fewer_than_two_images_is_an_error(tmp_path):
    truncated(tmp_path, "cut.png")
    save(tmp_path, "good.png", solid("L", 1))
    with pytest.raises(ValueError, match=r"1 of 2 files.*at least 2.*'cut\.png'") as caught:
        load_images(tmp_path, 8)
    assert "\n" not in str(caught.value)
    assert "cut several squares out of it" in str(caught.value)
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match=r"0 of 1 files.*repair these$"):
        load_images(tmp_path, 8)


def test_useless_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no files: put at least 2"):
        load_images(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match=r"no image folder at .*missing"):
        load_images(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match=r"is a file: give the folder .* or a zip"):
        load_images(save(tmp_path, "a.png", solid("L", 1)), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"channels": 4}, "channels=4"),
        ({"limit": 1}, "limit must be at least 2"),
    ],
)
def test_wrong_arguments_for_a_folder(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, **({"resolution": 8} | arguments))


def uint8_images(count=4, channels=3, size=8, seed=0):
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("convert", [lambda x: x, to_float, lambda x: to_float(x).double(), torch.Tensor.numpy])
def test_arrays_are_taken_as_they_are(convert):
    images = uint8_images()
    loaded = load_images(convert(images), 8)
    assert torch.equal(loaded.images, images)
    assert loaded.names == ["0", "1", "2", "3"]
    assert len(load_images(convert(images), 8, limit=2)) == 2


def test_arrays_are_copied():
    images = uint8_images()
    loaded = load_images(images, 8)
    images.zero_()
    assert loaded.images.any()


def test_half_precision_and_strides():
    images = uint8_images()
    channels_last = to_float(images).half().contiguous(memory_format=torch.channels_last)
    loaded = load_images(channels_last, 8).images
    assert loaded.is_contiguous()
    assert (loaded.int() - images.int()).abs().max() <= 1  # half has 11 bits
    assert torch.equal(load_images(images.numpy()[::-1], 8).images, images.flip(0))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 3, 8, 9), r"\[N, 3, 8, 8\], got \[4, 3, 8, 9\]"),
        (torch.zeros(4, 3, 16, 16), r"got \[4, 3, 16, 16\]; cut and resize"),
        (torch.zeros(4, 1, 8, 8), "wants 3 channels"),
        (torch.zeros(4, 8, 8, 3), "channels come last"),
        (torch.zeros(4, 8, 8), "one dimension is missing"),
        (torch.zeros(1, 3, 8, 8), "at least 2 images"),
        (torch.full((4, 3, 8, 8), 255.0), r"in \[-1, 1\], got \[255, 255\]: give 0..255 as uint8"),
        (torch.full((4, 3, 8, 8), -1.1), r"in \[-1, 1\]"),
        (torch.full((4, 3, 8, 8), float("nan")), "NaN or infinite"),
        (torch.full((4, 3, 8, 8), float("inf")), "NaN or infinite"),
    ],
)
def test_wrong_arrays_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        load_images(images, 8)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="int64"):
        load_images(torch.zeros(4, 3, 8, 8, dtype=torch.int64), 8)
    with pytest.raises(TypeError, match="a folder, a tensor or a NumPy array, got list"):
        load_images([1, 2], 8)


def test_zero_to_one_is_suspicious():
    with pytest.warns(UserWarning, match=r"2 \* x - 1"):
        load_images(torch.rand(4, 3, 8, 8), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_uint8_survives_the_round_trip(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels).to(dtype)), levels)
    assert to_float(levels).aminmax() == (-1, 1)


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=50))
def test_to_uint8_rounds_to_the_nearest_level(values):
    x = torch.tensor(values)
    error = (to_float(to_uint8(x)) - x.clamp(-1, 1)).abs().max()
    assert error <= 1 / 255 + 1e-6  # half a level, and float32's rounding


def test_split_is_a_partition_that_the_seed_decides():
    whole = load_images(uint8_images(20), 8)
    train, held_out = whole.split(0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train.names + held_out.names) == sorted(whole.names)
    for part in (train, held_out):
        assert part.names == sorted(part.names, key=int)
        assert torch.equal(part.images, whole.images[[int(name) for name in part.names]])
    assert whole.split(0.25, seed=3)[1].names == held_out.names
    assert whole.split(0.25, seed=4)[1].names != held_out.names


@pytest.mark.parametrize(("count", "fraction", "held"), [(20, 0.0, 0), (20, 0.01, 1), (3, 0.9, 1), (2, 0.5, 0)])
def test_split_leaves_two_to_train_on(count, fraction, held):
    train, held_out = load_images(uint8_images(count), 8).split(fraction, seed=0)
    assert (len(train), len(held_out)) == (count - held, held)
    assert held_out.images.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_split_refuses(fraction):
    with pytest.raises(ValueError, match="fraction"):
        load_images(uint8_images(), 8).split(fraction)


def test_fingerprint_follows_pixels_and_order():
    images = uint8_images()
    fingerprint = load_images(images, 8).fingerprint()
    assert load_images(images.clone(), 8).fingerprint() == fingerprint
    assert load_images(images.flip(0), 8).fingerprint() != fingerprint
    changed = images.clone()
    changed[3, 2, 7, 7] ^= 1
    assert load_images(changed, 8).fingerprint() != fingerprint
    names = [str(i) for i in range(4)]
    assert ImageSet(images.view(4, 1, 8, 24), names).fingerprint() != fingerprint


@pytest.mark.parametrize("channels", [1, 3])
def test_save_folder_is_read_back(tmp_path, channels):
    images = uint8_images(channels=channels)
    paths = save_folder(tmp_path / "new" / "folder", to_float(images))
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    assert [path.name for path in save_folder(tmp_path / "new" / "folder", images[:1], start=4)] == ["00004.png"]
    assert sorted(tmp_path.glob("new/folder/*")) == [*paths, tmp_path / "new/folder/00004.png"]
    loaded = load_images(tmp_path / "new", 8, channels)
    assert torch.equal(loaded.images, torch.cat([images, images[:1]]))


def test_save_folder_refuses(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(ValueError, match="a file is in its place"):
            save_folder(tmp_path / path, uint8_images())
    with pytest.raises(ValueError, match=r"\[1 to 4, H, W\]"):
        save_folder(tmp_path / "out", uint8_images(channels=5))
    assert list((tmp_path / "out").iterdir()) == []
