"""One image at smaller sizes: what is in it stays right, whatever kind of file it comes from."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from library.dataset.images import BadImageError, picture_of
from library.resizing.pictures import PIL_FILTERS, Recipe, encode, make_picture, read_original

ORIENTATION = 0x0112
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE_ON_RGB = SRGB[:16] + b"GRAY" + SRGB[20:]


def smooth(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 that shrinking hardly changes."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def result_of(path: Path, **recipe: object) -> Image.Image:
    """The picture as it is read back from its file's content."""
    asked = Recipe(**{"area": (64, 64), **recipe})
    original = read_original(path, [asked])
    made = Image.open(io.BytesIO(encode(make_picture(original, asked), asked, original.profile, "note")))
    made.load()
    return made


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [
        ((1200, 600), (512, 512), (724, 362)),
        ((600, 1200), (512, 512), (362, 724)),
        ((1200, 600), (1024, 256), (724, 362)),
        ((300, 200), (512, 512), (300, 200)),
        ((5000, 1), (8, 8), (566, 1)),
    ],
)
def test_the_area_is_the_one_asked_for_the_shape_stays_and_nothing_grows(size, area, expected):
    assert Recipe(area=area).scaled_size(size) == expected


def test_both_sides_are_cut_equally_to_multiples(tmp_path):
    Image.fromarray(smooth((203, 101))).save(tmp_path / "a.png")
    whole = result_of(tmp_path / "a.png", area=(999, 999), png=True)
    cut = result_of(tmp_path / "a.png", area=(999, 999), png=True, divisible_by=16)
    assert cut.size == (192, 96)
    assert np.array_equal(np.asarray(cut), np.asarray(whole)[2:98, 5:197])
    with pytest.raises(BadImageError, match="at 64x64 it would be 91x45, which cannot be cut to multiples of 64"):
        result_of(tmp_path / "a.png", divisible_by=64)


def test_area_is_the_exact_mean_and_halving_first_stays_near_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    exact = np.asarray(result_of(tmp_path / "a.png", area=(160, 120), png=True)).astype(int)
    assert np.abs(exact - pixels.reshape(120, 2, 160, 2, 3).mean((1, 3))).max() <= 0.5
    grainy = np.clip(smooth((320, 240)).astype(int) + np.random.default_rng(1).integers(-6, 7, (240, 320, 1)), 0, 255)
    for kind in ("png", "jpg"):
        Image.fromarray(grainy.astype(np.uint8)).save(tmp_path / f"b.{kind}", quality=100, subsampling=0)
        near = np.asarray(result_of(tmp_path / f"b.{kind}", area=(100, 75), png=True)).astype(float)
        reference = cv2.resize(grainy.astype(np.float64), (100, 75), interpolation=cv2.INTER_AREA)
        assert np.abs(near - reference).mean() < 1


@pytest.mark.parametrize("name", PIL_FILTERS)
def test_the_other_filters_are_pillows(name, tmp_path):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    pixels.save(tmp_path / "a.png")
    made = result_of(tmp_path / "a.png", area=(90, 60), png=True, interpolation=name)
    assert np.array_equal(np.asarray(made), np.asarray(pixels.resize((90, 60), PIL_FILTERS[name])))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_gone(orientation, kind, tmp_path):
    stored = Image.fromarray(smooth((320, 160)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(
        tmp_path / f"a.{kind}", exif=exif, quality=95, **({"format": "MPO", "save_all": True} if kind == "mpo" else {})
    )
    made = result_of(tmp_path / f"a.{kind}", png=True)
    assert made.size == ((45, 91) if orientation >= 5 else (91, 45))
    assert ORIENTATION not in made.getexif()
    shown = Image.fromarray(picture_of(Image.open(tmp_path / f"a.{kind}")).rgb).resize(made.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(made).astype(int) - np.asarray(shown)).mean() < 2


@pytest.mark.parametrize("png", [False, True])
def test_a_profile_stays_with_its_colours(png, tmp_path):
    Image.fromarray(smooth((200, 200))).save(tmp_path / "a.png", icc_profile=SRGB)
    assert result_of(tmp_path / "a.png", png=png).info["icc_profile"] == SRGB
    Image.fromarray(smooth((200, 200))).save(tmp_path / "a.png", icc_profile=GREY_PROFILE_ON_RGB)
    assert "icc_profile" not in result_of(tmp_path / "a.png", png=png).info, "it describes other numbers"
    Image.fromarray(smooth((200, 200))).save(tmp_path / "a.png", icc_profile=b"none at all")
    assert "icc_profile" not in result_of(tmp_path / "a.png", png=png).info


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (100, 100), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = result_of(tmp_path / "a.jpg", png=True).getpixel((5, 5))
    assert red < 10
    assert min(green, blue) > 245


def test_alpha_is_kept_in_png_without_a_rim_and_becomes_white_in_jpeg(tmp_path):
    pixels = np.zeros((200, 200, 4), np.uint8)
    pixels[..., 1] = 255  # invisible green
    pixels[:, 101:] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for interpolation in ("area", "cubic", "linear", "box"):
        kept = np.asarray(result_of(tmp_path / "a.png", png=True, interpolation=interpolation)).astype(int)
        assert kept.shape == (64, 64, 4)
        assert kept[..., 3].min() == 0
        assert kept[..., 3].max() == 255
        seen = kept[kept[..., 3] > 30]
        assert seen[:, 1].max() <= 8, "the invisible colour shows"
        assert np.abs(seen[:, 0] - 200).max() <= 8
    flat = np.asarray(result_of(tmp_path / "a.png"))
    assert flat[:, :20].min() > 250
    assert np.abs(flat[:, 50:].astype(int) - (200, 0, 0)).max() < 6


@pytest.mark.parametrize("mode", ["LA", "P", "PA"])
def test_other_kinds_of_transparency_are_kept_too(mode, tmp_path):
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (50, 0, 100, 100))
    if mode == "PA":
        image.quantize(16).save(tmp_path / "a.png")
    elif mode == "P":
        image.convert("RGB").quantize(2).save(
            tmp_path / "a.png", transparency=image.convert("RGB").quantize(2).getpixel((0, 0))
        )
    else:
        image.convert(mode).save(tmp_path / "a.png")
    made = result_of(tmp_path / "a.png", png=True)
    assert made.mode in ("LA", "RGBA")
    assert (made.getchannel("A").getpixel((5, 5)), made.getchannel("A").getpixel((60, 5))) == (0, 255)


def test_palettes_are_resolved_before_scaling(tmp_path):
    indexed = Image.fromarray((np.indices((128, 128)).sum(0) % 2).astype(np.uint8), "P")
    indexed.putpalette([200, 0, 0, 0, 0, 200] + [9] * 762)
    indexed.save(tmp_path / "a.png")
    made = np.asarray(result_of(tmp_path / "a.png", png=True))
    assert np.unique(made.reshape(-1, 3), axis=0).tolist() == [[100, 0, 100]]


@pytest.mark.parametrize("interpolation", ["area", "lanczos4"])
def test_sixteen_bits_stay_sixteen_in_png_and_are_scaled_for_jpeg(interpolation, tmp_path):
    values = np.linspace(0, 65535, 256 * 256).reshape(256, 256).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    kept = result_of(tmp_path / "a.png", png=True, interpolation=interpolation)
    assert kept.mode == "I;16"
    middle = np.asarray(kept).astype(int)[10:-10, 10:-10]
    assert len(np.unique(middle)) > 256
    expected = np.asarray(Image.fromarray(values.astype(np.float32)).resize((64, 64), Image.Resampling.BOX))[10:-10, 10:-10]
    assert np.abs(middle - expected).max() < 300
    eight = np.asarray(result_of(tmp_path / "a.png", interpolation=interpolation)).astype(float)[10:-10, 10:-10]
    assert np.abs(eight - expected / 257).max() < 3


def test_sixteen_bit_colour_and_bilevel_images_are_read(tmp_path):
    wide = (smooth((100, 100)).astype(np.uint16) * 257)[..., ::-1]
    cv2.imwrite(str(tmp_path / "a.png"), wide)
    made = np.asarray(result_of(tmp_path / "a.png", area=(999, 999), png=True))
    assert np.abs(made.astype(int) - smooth((100, 100))).max() <= 1
    Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert("1", dither=0).save(
        tmp_path / "b.png"
    )
    assert set(np.unique(np.asarray(result_of(tmp_path / "b.png", png=True)))) <= {127, 128}


def test_jpeg_has_quality_100_and_all_its_colour(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 0, 255)
    Image.fromarray(stripes).save(tmp_path / "a.png")
    made = result_of(tmp_path / "a.png")
    assert set(made.quantization[0]) == {1}
    assert np.abs(np.asarray(made).astype(int) - stripes).mean() < 2


@pytest.mark.parametrize("cut", [0, 30, 2000])
def test_what_cannot_be_decoded_is_said(cut, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:cut])
    with pytest.raises(BadImageError, match="is empty|is not an image|cannot be decoded"):
        result_of(tmp_path / "b.png")
