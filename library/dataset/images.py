"""Image files as viewers show them, and the way from there to pixels of the training size.

Arrays are (height, width, 3) uint8 in sRGB; sizes are (width, height). A viewer turns a photo by its EXIF orientation, shows
transparency on a ground (here white), scales 16 bits down, and converts an embedded colour profile to the screen's sRGB.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

from library.dataset.buckets import Fit, Size

ORIENTATION_TAG = 0x0112
_TURNS = {  # EXIF 2.32, table 6: how the stored picture has to be turned
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = (5, 6, 7, 8)
_PROFILE_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC colour space -> the PIL mode that it describes
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class BadImageError(Exception):
    """A file that is no readable image; the message says why."""


@dataclass(frozen=True)
class Header:
    """What an image file says without being decoded: size as shown, in pixels, and format ("PNG")."""

    size: Size
    format: str


@dataclass(frozen=True)
class Picture:
    """A decoded image: `rgb` (H, W, 3) uint8 on white; `alpha` (H, W) uint8, or None where the file has none."""

    rgb: np.ndarray
    alpha: np.ndarray | None


def image_extensions() -> tuple[str, ...]:
    """Extensions of image files, lower case; those whose decoder this Pillow lacks are left out."""
    Image.init()
    always = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    avif = (".avif",) if features.check("avif") or ".avif" in Image.EXTENSION else ()
    return always + avif + ((".jxl",) if ".jxl" in Image.EXTENSION else ())


def read_header(path: Path) -> Header:
    """Size and format, decoding nothing unless the end of the file looks cut off.

    Raises:
        BadImageError: it is no image, is empty, or is cut off.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            width, height = upright_size(image.size, orientation_of(image))
            kind = image.format or ""
            if _looks_cut_off(file, kind):
                image.load()
    except Exception as error:  # decoders raise whatever they like on broken data
        raise decoding_error(error, path) from error
    if not (width and height):
        raise BadImageError("has a side of 0 pixels")
    return Header((width, height), kind)


def read_picture(path: Path, data: BinaryIO | None = None) -> Picture:
    """The image as viewers show it; from `data` where the file's content is at hand.

    Raises:
        BadImageError: it cannot be decoded.
    """
    try:
        with Image.open(data or path) as image:
            image.load()
            return picture_of(image)
    except Exception as error:  # decoders raise whatever they like on broken data
        raise decoding_error(error, path) from error


def picture_of(image: Image.Image) -> Picture:
    """An opened image as viewers show it: colour, transparency and orientation."""
    orientation = orientation_of(image)
    profile = image.info.get("icc_profile")
    image = eight_bits(image)
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = to_srgb(image, profile)
    if alpha is not None:
        white = Image.new("RGB", image.size, (255, 255, 255))
        image = Image.composite(image, white, alpha)
    shown = np.asarray(turned(image, orientation))
    return Picture(shown, None if alpha is None else np.asarray(turned(alpha, orientation)))


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. In a PNG only what stands before the pixels counts, as in browsers."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "xmp"} & image.info.keys():
        return 1  # asking a PNG for its EXIF would decode the picture
    return image.getexif().get(ORIENTATION_TAG, 1)


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Upright, where it is stored in an EXIF orientation."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def upright_size(size: Size, orientation: int) -> Size:
    """(width, height) after `turned`."""
    return (size[1], size[0]) if orientation in _SIDES_SWAPPED else size


def resize_and_crop(array: np.ndarray, fit: Fit, offset: Size, interpolation: str | None = None) -> np.ndarray:
    """Scale to `fit.resized` and cut out `fit.bucket`.

    Args:
        array: (H, W, 3) or (H, W), uint8.
        offset: (left, top) of the cut in the scaled image.
        interpolation: a filter by name; None takes area where both sides shrink or stay, else Lanczos.

    Returns:
        (bucket height, bucket width[, 3]) uint8.
    """
    (left, top), (width, height) = offset, fit.bucket
    return np.ascontiguousarray(resize(array, fit.resized, interpolation)[top : top + height, left : left + width])


def resize(array: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """Scale to (width, height); see `resize_and_crop`."""
    height, width = array.shape[:2]
    if (width, height) == size:
        return array
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if interpolation in ("lanczos", "box"):
        resampling = Image.Resampling.LANCZOS if interpolation == "lanczos" else Image.Resampling.BOX
        return np.asarray(Image.fromarray(array).resize(size, resampling))
    cv2 = opencv()
    filters = {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    return cv2.resize(array, size, interpolation=filters[interpolation])


def latent_mask(alpha: np.ndarray, factor: int) -> np.ndarray:
    """An alpha channel at the size of latents: the mean over factor x factor pixels.

    Args:
        alpha: (H, W) uint8, H and W multiples of `factor`.

    Returns:
        (H / factor, W / factor) fp32, 0..1.
    """
    height, width = alpha.shape
    blocks = alpha.reshape(height // factor, factor, width // factor, factor)
    return (blocks.mean(axis=(1, 3), dtype=np.float64) / 255).astype(np.float32)


def shift_hue(rgb: np.ndarray, steps: float) -> np.ndarray:
    """Turn all hues by steps of two degrees, OpenCV's unit for 8-bit hues (0..179)."""
    cv2 = opencv()
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = np.mod(np.rint(hsv[..., 0].astype(np.float32) + steps), 180).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def apply_gamma(rgb: np.ndarray, gamma: float) -> np.ndarray:
    """x ** gamma on values scaled to 0..1."""
    table = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return table[rgb]


@lru_cache(maxsize=1)
def opencv() -> Any:
    """cv2 with threads of its own switched off: the parallelism is ours, and its threads do not survive a fork."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def eight_bits(image: Image.Image) -> Image.Image:
    """Images of 16 or more bits a channel scaled to 8; all others as they are. Transparency becomes an alpha channel."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    transparent = image.info.get("transparency")
    scaled = Image.fromarray(np.rint(np.clip(values, 0, 65535) / 257).astype(np.uint8))
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB by way of the embedded profile; a broken profile, or one of another colour space, is left aside, as viewers do."""
    if profile and not _is_srgb(profile):
        mode = _PROFILE_SPACES.get(profile_space(profile))
        if mode == "L" and image.mode in ("1", "L", "LA"):
            image = image.convert("L")
        elif mode == "RGB" and image.mode not in ("CMYK", "LAB"):
            image = image.convert("RGB")
        transform = _transform(profile, mode) if mode == image.mode else None
        if transform is not None:
            return ImageCms.applyTransform(image, transform) or image
    return image.convert("RGB")


@lru_cache(maxsize=64)
def profile_space(profile: bytes) -> str:
    """The colour space that a profile describes ("RGB ", "GRAY", "CMYK"); "" for what is no profile."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return ""


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes) -> bool:
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip().startswith("sRGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return False


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where lcms cannot."""
    try:
        return ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), _srgb(), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _looks_cut_off(file: Any, kind: str) -> bool:
    """Whether the end of the file is not how its format ends; such a file is decoded to be sure."""
    ending = _ENDINGS.get(kind)
    length = file.seek(0, io.SEEK_END)
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 > length
    if ending is None:
        return False
    file.seek(max(0, length - 64))
    return ending not in file.read()


def decoding_error(error: Exception, path: Path) -> BadImageError:
    """Why an image cannot be read, short."""
    if isinstance(error, BadImageError):
        return error
    if isinstance(error, FileNotFoundError):
        return BadImageError("is not there")
    if isinstance(error, UnidentifiedImageError):
        return BadImageError("is empty" if path.stat().st_size == 0 else "is not an image")
    return BadImageError(f"cannot be decoded ({str(error) or type(error).__name__})")
