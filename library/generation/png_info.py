"""How a picture was made, written into its PNG: for web interfaces, for sd-scripts, and exactly.

Three readers, three forms: `parameters`, one text as A1111's web UI writes it; the separate texts of sd-scripts; and
`recipe`, JSON from which the same picture can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.atomic import atomic_write
from library.errors import UserError
from library.generation.requests import ImageRequest
from library.generation.samplers import canonical
from library.generation.web_parameters import FoundRecipe, read_parameters, read_separate, web_parameters

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = "recipe"


def png_texts(request: ImageRequest, made_with: Mapping[str, Any]) -> dict[str, str]:
    """Keyword -> text of everything that is written.

    Args:
        made_with: what the request does not hold, JSON-able; see `web_parameters` for what has a meaning to web UIs.
    """
    separate = {
        "prompt": request.prompt,
        "negative-prompt": request.negative_prompt,
        "seed": str(request.seed),
        "sampler": canonical(request.sampler),
        "steps": str(request.steps),
        "scale": str(request.scale),
    }
    if request.negative_scale is not None:
        separate["negative-scale"] = str(request.negative_scale)
    return {"parameters": web_parameters(request, made_with), **separate, RECIPE: recipe_text(request, made_with)}


def recipe_text(request: ImageRequest, made_with: Mapping[str, Any]) -> str:
    """The recipe as it stands in a PNG: equal for pictures that are drawn alike."""
    return json.dumps({"image": _recipe_fields(request), "made_with": dict(made_with)}, ensure_ascii=False)


_ALWAYS = ("prompt", "negative_prompt", "width", "height", "seed", "steps", "scale", "sampler", "clip_skip")


def _recipe_fields(request: ImageRequest) -> dict[str, Any]:
    """What every picture has, and the rest where it is not as it is by default."""
    default = ImageRequest(prompt="", seed=0)
    values = asdict(request).items()
    return {name: value for name, value in values if name in _ALWAYS or value != getattr(default, name)}


def write_png(path: Path, image: Image, request: ImageRequest, made_with: Mapping[str, Any]) -> None:
    """Save a picture with its texts; whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written to.
    """
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for keyword, text in png_texts(request, made_with).items():
        texts.add_text(keyword, text)
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=texts)


def read_recipe(path: Path) -> tuple[ImageRequest, dict[str, Any]]:
    """The request a PNG was made from, and what else it was made with.

    Raises:
        UserError: not a picture, or one without our recipe.
    """
    texts, _ = _texts_of(path)
    if RECIPE not in texts:
        raise UserError("holds no recipe", where=str(path), remedy="give a PNG that gen_img_diffusers.py has written")
    return _own_recipe(texts[RECIPE], path)


def own_recipe_of(path: Path) -> str | None:
    """The recipe of a PNG as it stands there; None where there is none, or no readable picture."""
    try:
        return _texts_of(path)[0].get(RECIPE)
    except UserError:
        return None


def read_picture(path: Path) -> FoundRecipe:
    """What the texts of any picture say: our recipe exactly, those of web UIs and sd-scripts as well as they can be read.

    Raises:
        UserError: not a picture, one without such texts, or one with a workflow of ComfyUI's instead.
    """
    texts, size = _texts_of(path)
    if RECIPE in texts:
        request, made_with = _own_recipe(texts[RECIPE], path)
        return FoundRecipe(fields=_fields(request), made_with=made_with)
    if "parameters" in texts:
        found = read_parameters(texts["parameters"])
    elif "workflow" in texts or texts.get("prompt", "").lstrip().startswith("{"):
        raise UserError("holds a workflow of ComfyUI, which is not read", where=str(path), remedy="write its prompt anew")
    elif "prompt" in texts:
        found = read_separate(texts, size)
    else:
        remedy = "give a picture as gen_img_diffusers.py, a web UI or sd-scripts has written it"
        raise UserError("does not say how it was made", where=str(path), remedy=remedy)
    return replace(found, notes=(*found.notes, _OTHER_PROGRAM))


_OTHER_PROGRAM = "another program drew the picture, from noise of its own: what is drawn here is like it, and not the same"
_EXIF, _USER_COMMENT = 0x8769, 0x9286


def _texts_of(path: Path) -> tuple[dict[str, str], tuple[int, int]]:
    """Keyword -> text of a picture, and its size; the one text of a JPEG or WebP is `parameters`."""
    from PIL import Image

    if not path.is_file():
        if path.is_dir():
            raise UserError("is a folder", where=str(path), remedy=f"give its pictures: {path / '*.png'}")
        raise UserError("no such file", where=str(path))
    try:
        with Image.open(path) as image:
            image.load()
            texts = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
            comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
            size = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"is no readable picture ({error})", where=str(path)) from None
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        texts.setdefault("parameters", comment[8:].decode("utf-16-be", errors="replace"))
    return texts, size


def _own_recipe(text: str, path: Path) -> tuple[ImageRequest, dict[str, Any]]:
    try:
        content = json.loads(text)
        image: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content["image"].items()
        }
        return ImageRequest(**image), dict(content["made_with"])
    except UserError as error:
        raise UserError(f"holds a recipe that cannot be drawn ({error})", where=str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"holds a recipe that cannot be read ({error})", where=str(path)) from None


def _fields(request: ImageRequest) -> dict[str, Any]:
    return {each.name: getattr(request, each.name) for each in fields(request)}
