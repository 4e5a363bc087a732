"""One image at smaller sizes: decoded once, scaled to each area, cut to multiples, encoded.

Images are PIL's in the modes L, LA, RGB, RGBA or I;16 (16-bit grey); sizes are (width, height) in pixels. A picture keeps
its embedded colour profile. It is turned as its EXIF orientation says, and the result carries no EXIF.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.dataset.buckets import Size
from library.dataset.images import (
    BadImageError,
    decoding_error,
    eight_bits,
    opencv,
    orientation_of,
    profile_space,
    to_srgb,
    turned,
    upright_size,
)

# All but "nearest" take the mean over the pixels that a new one covers, so that fine patterns do not turn into false ones.
PIL_FILTERS = {
    "cubic": Image.Resampling.BICUBIC,
    "lanczos4": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "linear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
# Halving first saves most of the time. What is left to the filter is at least so many times the result's side; at 1.5 the
# area filter's values for photos differ by 0.7 of 255 on average from those without halving (Pillow's box filter's: 0.8).
_AREA_MARGIN = 1.5
_JPEG_MARGINS = {"area": _AREA_MARGIN, "nearest": math.inf}  # others: 3
_PNG_EFFORT = 2  # zlib's level: a third of the time of its usual 6 for a seventh more bytes
_PROFILE_MODES = {"RGB ": ("RGB", "RGBA"), "GRAY": ("L", "LA", "I;16")}
_STORED_MODES = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB"}
_WEIGHTED = {"LA": "La", "RGBA": "RGBa"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a picture of a size is made.

    Attributes:
        area: (width, height) whose product the result's area equals; a smaller image keeps its size.
        divisible_by: both sides are cut to multiples of this, equally on both ends.
        interpolation: area, cubic, lanczos4, nearest, linear or box.
        png: as PNG; else as JPEG of quality 100 without colour subsampling.
    """

    area: Size
    divisible_by: int = 1
    interpolation: str = "area"
    png: bool = False

    @property
    def name(self) -> str:
        """ "512x512", as in the names of files."""
        return f"{self.area[0]}x{self.area[1]}"

    @property
    def extension(self) -> str:
        return ".png" if self.png else ".jpg"

    def scaled_size(self, size: Size) -> Size:
        """The size before cutting, for an image of a size.

        >>> Recipe(area=(512, 512)).scaled_size((1200, 600))
        (724, 362)
        """
        scale = self.scale(size)
        return (size[0], size[1]) if scale == 1 else tuple(max(1, round(side * scale)) for side in size)  # type: ignore[return-value]

    def scale(self, size: Size) -> float:
        """How much smaller each side becomes; 1 for images that are small enough."""
        return min(1.0, math.sqrt(math.prod(self.area) / math.prod(size)))


@dataclass(frozen=True)
class Original:
    """A decoded image, upright, and ready for its recipes: without transparency and in 8 bits where they make JPEG.

    Attributes:
        image: perhaps smaller than the file's, where no more is needed.
        size: of the file's own picture, upright.
        profile: the colour profile that describes its numbers; None where sRGB is meant.
        flattened: it was transparent.
    """

    image: Image.Image
    size: Size
    profile: bytes | None
    flattened: bool
    _halves: list[np.ndarray] = field(default_factory=list)

    def at_least(self, size: Size) -> np.ndarray:
        """Pixels (H, W[, channels]), halved as often as leaves at least a size; colours weighted by opacity."""
        if not self._halves:
            weighted = _WEIGHTED.get(self.image.mode)
            self._halves.append(np.asarray(self.image.convert(weighted) if weighted else self.image))
        level = 0
        while _half_is_enough(self._halves[level], size):
            level += 1
            if level == len(self._halves):
                self._halves.append(_half(self._halves[-1]))
        return self._halves[level]


def _half_is_enough(pixels: np.ndarray, size: Size) -> bool:
    height, width = pixels.shape[:2]
    return width % 2 == height % 2 == 0 and width >= 2 * size[0] and height >= 2 * size[1]


def _half(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    cv2 = opencv()
    return cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA)


def read_original(path: Path, recipes: Sequence[Recipe]) -> Original:
    """Decode an image as far as the recipes need it; all have one filter and one format.

    Raises:
        BadImageError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            size, orientation = image.size, orientation_of(image)
            if image.format in ("JPEG", "MPO"):
                margin = _JPEG_MARGINS.get(recipes[0].interpolation, 3)
                needed = min(1.0, margin * max(recipe.scale(size) for recipe in recipes))
                image.draft(None, (math.ceil(size[0] * needed), math.ceil(size[1] * needed)))
            plain, profile = _plain(_loaded(image, path), image.info.get("icc_profile"))
            flattened = plain.mode in _WEIGHTED and not recipes[0].png
            ready = plain if recipes[0].png else on_white(eight_bits(plain))
            return Original(turned(ready, orientation), upright_size(size, orientation), profile, flattened)
    except Exception as error:  # decoders raise whatever they like on broken data
        raise decoding_error(error, path) from error


def _loaded(image: Image.Image, path: Path) -> Image.Image:
    """Decoded; common PNG files by OpenCV, which takes three quarters of Pillow's time for the same pixels."""
    if image.format == "PNG" and image.mode in ("L", "RGB") and "transparency" not in image.info:
        cv2 = opencv()
        colour = cv2.IMREAD_GRAYSCALE if image.mode == "L" else cv2.IMREAD_COLOR_RGB
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), colour | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is not None and pixels.shape[:2] == image.size[::-1]:
            return Image.fromarray(pixels)
    image.load()
    return image


def _plain(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bytes | None]:
    """A decoded image in one of this module's modes, and the profile that still describes it."""
    if image.mode in ("I", "F") or (image.mode.startswith("I;16") and "transparency" in image.info):
        image = eight_bits(image)
    if image.mode.startswith("I;16"):
        image = image if image.mode == "I;16" else Image.fromarray(np.asarray(image).astype(np.uint16))
    elif "transparency" in image.info:
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    elif image.mode in _STORED_MODES:
        image = image.convert(_STORED_MODES[image.mode])
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
        return to_srgb(image, profile), None
    describes = profile is not None and image.mode in _PROFILE_MODES.get(profile_space(profile), ())
    return image, profile if describes else None


def make_picture(original: Original, recipe: Recipe) -> Image.Image:
    """Scale and cut.

    Raises:
        BadImageError: a side of the result would be below `divisible_by`.
    """
    size = recipe.scaled_size(original.size)
    width, height = (side // recipe.divisible_by * recipe.divisible_by for side in size)
    if not (width and height):
        raise BadImageError(
            f"at {recipe.name} it would be {size[0]}x{size[1]}, which cannot be cut to multiples of {recipe.divisible_by}"
        )
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = _scaled(original, size, recipe.interpolation)
    return picture if (width, height) == size else picture.crop((left, top, left + width, top + height))


def _scaled(original: Original, size: Size, interpolation: str) -> Image.Image:
    """Colours count by their opacity, so that those of invisible pixels do not show at the rim."""
    image = original.image
    if image.size == size:
        return image
    if interpolation != "area":
        return image.resize(size, PIL_FILTERS[interpolation])
    cv2 = opencv()
    enough = (math.ceil(size[0] * _AREA_MARGIN), math.ceil(size[1] * _AREA_MARGIN))
    pixels = cv2.resize(original.at_least(enough), size, interpolation=cv2.INTER_AREA)
    mode = _WEIGHTED.get(image.mode, image.mode)
    picture = Image.frombytes(mode, size, pixels.tobytes())
    return picture if mode == image.mode else picture.convert(image.mode)


def on_white(image: Image.Image) -> Image.Image:
    """Without transparency, as a viewer with a white page shows it."""
    if image.mode not in ("LA", "RGBA"):
        return image
    opaque = image.convert(image.mode[:-1])
    return Image.composite(opaque, Image.new(opaque.mode, image.size, "white"), image.getchannel("A"))


def encode(picture: Image.Image, recipe: Recipe, profile: bytes | None, note: str) -> bytes:
    """The content of the file: the picture, its profile, and a note in the file's comment."""
    content = io.BytesIO()
    if recipe.png:
        texts = PngInfo()
        texts.add_text("Comment", note)
        picture.save(content, "PNG", icc_profile=profile, pnginfo=texts, compress_level=_PNG_EFFORT)
    else:
        picture.save(content, "JPEG", quality=100, subsampling=0, icc_profile=profile, comment=note.encode())
    return content.getvalue()


def note_in(path: Path) -> str | None:
    """The note that `encode` left in a file; None for other files, and where there is none."""
    try:
        with Image.open(path) as image:
            note = image.info.get("Comment") or image.info.get("comment")
    except Exception:  # whatever is wrong with it, it is not what we wrote
        return None
    return note.decode("utf-8", "replace") if isinstance(note, bytes) else note
