"""Pictures look as a viewer shows them, whatever the file holds; what cannot be read says why."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from library.dataset.buckets import Fit
from library.dataset.images import (
    BadImageError,
    apply_gamma,
    latent_mask,
    read_header,
    read_picture,
    resize,
    resize_and_crop,
    shift_hue,
)
from tests.library.dataset.conftest import noise_image

TURNS = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}  # how a camera stores an upright picture under each orientation: the way back from what a viewer does


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_rotated_photo_is_shown_upright_and_its_size_is_as_shown(tmp_path, orientation, kind):
    upright = np.asarray(noise_image(24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright)))
    stored.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(read_picture(path).rgb, upright)
    assert read_header(path).size == (24, 16)


def test_a_rotated_jpeg_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((64, 32)).save(tmp_path / "a.jpg", exif=exif)
    assert read_header(tmp_path / "a.jpg").size == (32, 64)
    column = read_picture(tmp_path / "a.jpg").rgb[10, :, 0].astype(int)
    assert column[0] > column[-1] + 100, "the dark top of the stored picture is on the right when it is shown"


def save(path, mode: str, colour, **more) -> None:
    Image.new(mode, (8, 8), colour).save(path, **more)


def palette_image(transparent: bool) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent:
        image.putpixel((0, 0), 0)
        image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("mode", "colour", "shown"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("I;16", 257, (1, 1, 1)),
    ],
)
def test_every_kind_of_png_has_the_colour_that_a_viewer_shows(tmp_path, mode, colour, shown):
    save(tmp_path / "a.png", mode, colour)
    assert tuple(read_picture(tmp_path / "a.png").rgb[3, 3]) == shown


def test_a_palette_is_resolved_and_its_transparent_colour_is_white(tmp_path):
    palette_image(transparent=True).save(tmp_path / "a.png", transparency=0)
    picture = read_picture(tmp_path / "a.png")
    assert tuple(picture.rgb[3, 3]) == (200, 100, 50)
    assert tuple(picture.rgb[0, 0]) == (255, 255, 255)
    assert picture.alpha[0, 0] == 0
    assert picture.alpha[3, 3] == 255


def test_a_transparent_grey_value_of_sixteen_bits_is_white(tmp_path):
    values = np.full((8, 8), 20000, np.uint16)
    values[0, 0] = 5
    Image.fromarray(values).save(tmp_path / "a.png", transparency=5)
    picture = read_picture(tmp_path / "a.png")
    assert tuple(picture.rgb[0, 0]) == (255, 255, 255)
    assert picture.alpha is not None
    assert tuple(picture.rgb[3, 3]) == (78, 78, 78)


def test_a_cmyk_jpeg_has_its_colours_the_right_way_round(tmp_path):
    save(tmp_path / "a.jpg", "CMYK", (0, 255, 255, 0))
    assert tuple(read_picture(tmp_path / "a.jpg").rgb[3, 3]) == (255, 0, 0)


def test_only_files_with_transparency_have_an_alpha_channel(tmp_path):
    save(tmp_path / "rgb.png", "RGB", (1, 2, 3))
    save(tmp_path / "rgba.png", "RGBA", (1, 2, 3, 9))
    assert read_picture(tmp_path / "rgb.png").alpha is None
    assert (read_picture(tmp_path / "rgba.png").alpha == 9).all()


def test_alpha_turns_with_the_picture(tmp_path):
    image = noise_image(24, 16).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((24, 16)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    assert picture.alpha.shape == picture.rgb.shape[:2] == (24, 16)
    assert np.array_equal(picture.alpha, np.rot90(np.asarray(image.getchannel("A")), -1))


def test_an_embedded_profile_is_converted_to_srgb(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    wide = _profile_with_swapped_primaries()
    save(tmp_path / "plain.png", "RGB", (200, 50, 50))
    save(tmp_path / "wide.png", "RGB", (200, 50, 50), icc_profile=wide)
    save(
        tmp_path / "srgb.png",
        "RGB",
        (200, 50, 50),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    save(tmp_path / "lab.png", "RGB", (200, 50, 50), icc_profile=profile.tobytes())
    save(tmp_path / "broken.png", "RGB", (200, 50, 50), icc_profile=b"no profile at all")
    shown = {
        name: tuple(int(v) for v in read_picture(tmp_path / f"{name}.png").rgb[0, 0])
        for name in ("plain", "wide", "srgb", "lab", "broken")
    }
    assert shown["plain"] == shown["srgb"] == shown["lab"] == shown["broken"] == (200, 50, 50)
    assert shown["wide"][1] > shown["wide"][0], "red and green primaries are swapped in that profile"


def _profile_with_swapped_primaries() -> bytes:
    """sRGB's own profile with the tags of its red and green primaries exchanged, under another name."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = data.replace(b"rXYZ", b"tmp1").replace(b"gXYZ", b"rXYZ").replace(b"tmp1", b"gXYZ")
    name = "sRGB".encode("utf-16-be")
    return swapped.replace(name, "wide".encode("utf-16-be")).replace(b"sRGB built-in", b"wide built-in")


def test_a_wrong_extension_is_read_by_content(tmp_path):
    noise_image(16, 8).save(tmp_path / "a.jpg", format="PNG")
    assert read_header(tmp_path / "a.jpg").format == "PNG"
    assert read_picture(tmp_path / "a.jpg").rgb.shape == (8, 16, 3)


def truncated(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise_image(200, 200).save(buffer, format=kind)
    return buffer.getvalue()[:-2000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"this is text", "is not an image"),
        (truncated("JPEG"), "cannot be decoded"),
        (truncated("PNG"), "cannot be decoded"),
        (truncated("WEBP"), "cannot be decoded|is not an image"),
    ],
)
def test_a_file_that_is_no_whole_image_says_why_already_when_scanned(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImageError, match=reason):
        read_header(tmp_path / "a.png")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(BadImageError, match="is not there"):
        read_header(tmp_path / "a.png")


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path):
    buffer = io.BytesIO()
    noise_image(64, 64).save(buffer, format="JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue() + b"\0" * 5000)
    assert read_header(tmp_path / "a.jpg").size == (64, 64)


@pytest.mark.parametrize("name", ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box", None])
def test_every_filter_keeps_a_flat_picture_flat_and_gives_the_size(name):
    flat = np.full((40, 60, 3), 90, np.uint8)
    for size in ((30, 20), (90, 90)):
        scaled = resize(flat, size, name)
        assert scaled.shape == (size[1], size[0], 3)
        assert (scaled == 90).all()


def test_the_default_filter_is_area_for_shrinking_and_lanczos_for_enlarging():
    picture = np.asarray(noise_image(64, 64))
    assert np.array_equal(resize(picture, (32, 64)), resize(picture, (32, 64), "area"))
    assert np.array_equal(resize(picture, (32, 65)), resize(picture, (32, 65), "lanczos"))
    blocks = picture.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize(picture, (32, 32)) - blocks).max() <= 0.5


def test_the_cut_is_where_the_offset_says():
    picture = np.asarray(noise_image(80, 64))
    cut = resize_and_crop(picture, Fit((64, 64), (80, 64)), (5, 0))
    assert np.array_equal(cut, picture[:, 5:69])


def test_a_mask_is_the_mean_over_the_pixels_of_a_latent():
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:8, :4] = 255
    assert latent_mask(alpha, 8).tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_colour_changes_are_small_and_neutral_at_zero():
    picture = np.asarray(noise_image(32, 32))
    assert np.array_equal(apply_gamma(picture, 1.0), picture)
    assert 0 < np.abs(apply_gamma(picture, 1.05).astype(int) - picture).max() <= 6
    grey = np.full((4, 4, 3), 120, np.uint8)
    assert np.array_equal(shift_hue(grey, 8), grey)
    red = np.array([[[255, 0, 0]]], np.uint8)
    assert shift_hue(red, 8)[0, 0].tolist() == [255, 68, 0], "16 degrees towards yellow: 255 * 16 / 60"
    assert shift_hue(red, -8)[0, 0].tolist() == [255, 0, 68]
