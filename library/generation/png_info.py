"""How a picture was made, written into its PNG: for web interfaces, for sd-scripts, and exactly.

Three readers, three forms: `parameters`, one text as A1111's web UI writes it; the separate texts of sd-scripts; and
`recipe`, JSON with every field of the request, from which the same picture can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.atomic import atomic_write
from library.errors import UserError
from library.generation.prompt_options import PromptLine
from library.generation.requests import ImageRequest
from library.generation.samplers import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = "recipe"


def png_texts(request: ImageRequest, made_with: Mapping[str, Any]) -> dict[str, str]:
    """Keyword -> text of everything that is written.

    Args:
        made_with: what the request does not hold: "model" (a name), "networks" (a list of {"name", "strength"}), and so on.
    """
    return {
        "parameters": web_parameters(request, made_with),
        "prompt": request.prompt,
        "negative-prompt": request.negative_prompt,
        "seed": str(request.seed),
        "sampler": request.sampler,
        "steps": str(request.steps),
        "scale": str(request.scale),
        RECIPE: json.dumps({"image": asdict(request), "made_with": dict(made_with)}, ensure_ascii=False),
    }


def web_parameters(request: ImageRequest, made_with: Mapping[str, Any]) -> str:
    """The text that A1111's web UI and its kin read back: prompt, negative prompt, then `Name: value` pairs."""
    pairs: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "CFG scale": f"{request.scale:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
    }
    if made_with.get("model"):
        pairs["Model"] = made_with["model"]
    if request.clip_skip and request.clip_skip > 1:
        pairs["Clip skip"] = request.clip_skip
    networks = made_with.get("networks") or []
    if networks:
        pairs["Networks"] = '"' + ", ".join(f"{network['name']}: {network['strength']:g}" for network in networks) + '"'
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)


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
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(RECIPE)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"is no readable picture ({error})", where=str(path)) from None
    if text is None:
        raise UserError("holds no recipe", where=str(path), remedy="give a PNG that gen_img_diffusers.py has written")
    try:
        content = json.loads(text)
        image = {name: tuple(value) if isinstance(value, list) else value for name, value in content["image"].items()}
        return ImageRequest(**image), content["made_with"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"holds a recipe that cannot be read ({error})", where=str(path)) from None


def read_prompts(path: Path) -> PromptLine:
    """The prompt that a picture was made with, from our recipe or sd-scripts' texts, with its negative prompt.

    Raises:
        UserError: it holds none.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            texts = dict(image.info)
    except OSError as error:
        raise UserError(f"is no readable picture ({error})", where=str(path)) from None
    if not isinstance(texts.get("prompt"), str):
        remedy = "give --prompt or --from_file, or pictures that gen_img_diffusers.py has written"
        raise UserError("does not say with which prompt it was made", where=str(path), remedy=remedy)
    settings = {"negative_prompt": texts["negative-prompt"]} if texts.get("negative-prompt") else {}
    return PromptLine(prompt=texts["prompt"], settings=settings, where=str(path))
