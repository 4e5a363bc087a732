"""The `parameters` text of A1111's web UI and its kin, both ways.

The prompt, a line "Negative prompt: ...", then one line of `Name: value` pairs parted by commas; a value with a comma, a
colon or a line break in it is quoted as JSON (modules/infotext_utils.py and create_infotext in modules/processing.py there,
v1.9 to v1.10).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError, attempt, some_names
from library.generation.requests import ImageRequest, floored_size
from library.generation.samplers import SCHEDULES, canonical, find_sampler
from library.prompts.tag_editing import with_bare_names

_NEGATIVE = "Negative prompt:"
_LATENTS, _PIXELS = "Latent (bicubic)", "Lanczos"
"""A1111's names for how a first stage is enlarged here."""


def web_parameters(request: ImageRequest, made_with: Mapping[str, Any]) -> str:
    """The text that web UIs read back.

    The networks of the command line stand as tags behind the prompt, since web UIs know no other way to ask for them. Size
    and steps are the first stage's where there are two, as A1111 has it.

    Args:
        made_with: what the request does not hold, each where it is known: "model", "model_hash", "vae" (a path), "networks"
            (a list of {"name", "strength", "hash"}), "lora_hashes" (name -> hash, of those in the prompt's tags), "version".
    """
    networks = made_with.get("networks") or []
    strengths = request.network_strengths or [network["strength"] for network in networks]
    tags = [f"<lora:{network['name']}:{strength:g}>" for network, strength in zip(networks, strengths, strict=False)]
    lines = [" ".join([with_bare_names(request.prompt), *tags]).strip()]
    if request.negative_prompt:
        lines.append(f"{_NEGATIVE} {request.negative_prompt}")
    pairs = {name: value for name, value in _pairs(request, made_with).items() if value not in (None, "")}
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items()))
    return "\n".join(lines)


def _pairs(request: ImageRequest, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value in A1111's order; None and "" are left out."""
    sampler = find_sampler(request.sampler)
    two_stages = request.first_stage is not None
    width, height = request.first_stage or (request.width, request.height)
    return {
        "Steps": request.highres_steps if two_stages else request.steps,
        "Sampler": sampler.title,
        "Schedule type": sampler.schedule or ("Uniform" if sampler.automatic else "Automatic"),
        "CFG scale": f"{request.scale:g}",
        "Seed": request.seed,
        "Size": f"{width}x{height}",
        "Model hash": made_with.get("model_hash"),
        "Model": made_with.get("model"),
        "VAE": Path(made_with["vae"]).name if made_with.get("vae") else None,
        "Denoising strength": f"{request.strength:g}" if two_stages or request.image else None,
        "Clip skip": request.clip_skip if request.clip_skip != 1 else None,
        "CFG rescale": f"{request.guidance_rescale:g}" if request.guidance_rescale else None,
        **(_second_stage(request, width, height) if two_stages else {}),
        "Lora hashes": ", ".join(f"{name}: {short}" for name, short in _lora_hashes(made_with).items()),
        "Version": made_with.get("version"),
    }


def _second_stage(request: ImageRequest, width: int, height: int) -> dict[str, Any]:
    ratio = f"{request.width / width:g}"
    exact = (int(width * float(ratio)), int(height * float(ratio))) == (request.width, request.height)
    resize = {"Hires upscale": ratio} if exact else {"Hires resize": f"{request.width}x{request.height}"}
    return {**resize, "Hires steps": request.steps, "Hires upscaler": _LATENTS if request.highres_latents else _PIXELS}


def _lora_hashes(made_with: Mapping[str, Any]) -> dict[str, str]:
    """Name, without what parts names -> hash, of the adapters whose hash is known."""
    networks = {network["name"]: network.get("hash") for network in made_with.get("networks") or []}
    known = networks | dict(made_with.get("lora_hashes") or {})
    return {re.sub("[:,]", "", name): short for name, short in known.items() if short}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


@dataclass(frozen=True, kw_only=True)
class FoundRecipe:
    """How a picture was made, as far as its texts say it.

    Attributes:
        fields: of an `ImageRequest`, all that were found; checked, each alone.
        made_with: what a request does not hold ("model", ...).
        notes: what could not be read or is drawn otherwise here, one sentence each.
    """

    fields: dict[str, Any]
    made_with: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_PAIR = re.compile(r'\s*([\w][^:,"]*):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_LEAST_PAIRS = 3  # fewer are a line of the prompt, as A1111 takes it
_NUMBERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int),
    "CFG scale": ("scale", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
    "Clip skip": ("clip_skip", int),
    "CFG rescale": ("guidance_rescale", float),
}
_MADE_WITH = {"Model": "model", "Model hash": "model_hash", "VAE": "vae", "Version": "version"}
_READ_TOGETHER = {"Size", "Sampler", "Schedule type", "Hires upscale", "Hires resize", "Hires steps", "Hires upscaler"}
_WITHOUT_EFFECT = {"VAE hash", "Lora hashes", "TI hashes", "Hashes", "User", "App", "Backend", "Pipeline", "Operations"}
_AS_PLAIN = ("", "automatic", "uniform", "normal")
_EDITING = re.compile(r"(?<!\\)\[[^\[\]]*(?<!\\)[:|][^\[\]]*\]")


def read_parameters(text: str) -> FoundRecipe:
    """The fields of a request from the text of a web UI. What is not understood is left out, with a note."""
    prompt, negative_prompt, pairs = _parted(text)
    notes: list[str] = []
    style = "sdnext" if pairs.get("App", "").startswith("SD.Next") else "a1111"
    fields: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "lora_tag_style": style}
    if not pairs:
        notes.append("the text names no settings, only a prompt")
    for name, (own, convert) in _NUMBERS.items():
        if name in pairs:
            fields |= _accepted(own, pairs[name], convert, name, notes)
    fields |= _sampler(pairs, notes)
    fields |= _sizes(pairs, fields, notes)
    unread = [name for name in pairs if name not in _READ_TOGETHER | _WITHOUT_EFFECT | _NUMBERS.keys() | _MADE_WITH.keys()]
    if unread:
        notes.append(f"not read: {some_names(unread)}")
    if any(_EDITING.search(each) for each in (prompt, negative_prompt)):
        notes.append("the prompt is edited while it is drawn ([a:b:0.5], [a|b]); here brackets are weights alone")
    made_with = {own: pairs[name] for name, own in _MADE_WITH.items() if name in pairs}
    return FoundRecipe(fields=fields, made_with=made_with, notes=tuple(notes))


def _parted(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt, and the pairs, their values as they were before they were quoted."""
    lines = text.strip().splitlines()
    pairs = _PAIR.findall(lines[-1]) if lines else []
    if len(pairs) >= _LEAST_PAIRS:
        lines.pop()
    else:
        pairs = []
    start = next((number for number, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).strip().removeprefix(_NEGATIVE)
    return "\n".join(lines[:start]).strip(), negative.strip(), {name.strip(): _unquoted(value) for name, value in pairs}


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value.strip()


def _accepted(own: str, value: str, convert: Callable[[str], Any], name: str, notes: list[str]) -> dict[str, Any]:
    """One field, where its value is one that a request can have; else nothing, and a note."""
    try:
        converted = convert(value)
    except ValueError:
        notes.append(f"not read: {name} {value!r}")
        return {}
    problems: list[UserError] = []
    attempt(lambda: ImageRequest(**{"prompt": "", "seed": 0, own: converted}), problems)
    notes += [f"not taken: {name} {value} ({problem.what})" for problem in problems]
    return {} if problems else {own: converted}


def _sampler(pairs: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    name, schedule = pairs.get("Sampler"), pairs.get("Schedule type", "")
    if name is None:
        return {}
    try:
        plain = canonical(name)
    except UserError as error:
        notes.append(f"not taken: {error}")
        return {}
    if schedule.lower() == "automatic":
        schedule = find_sampler(plain).automatic
    if schedule.lower() in _AS_PLAIN or schedule.lower() == find_sampler(plain).schedule.lower():
        return {"sampler": plain}
    try:
        return {"sampler": canonical(f"{name} {schedule}")}
    except UserError:
        known = ", ".join(title for title, _ in SCHEDULES.values())
        notes.append(
            f"not taken: Schedule type {schedule}, which {name} has not here (there are {known}); it is drawn without"
        )
        return {"sampler": plain}


def _sizes(pairs: Mapping[str, str], fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Width and height, and what a second stage changes."""
    size = _size(pairs, "Size", notes)
    if size is None:
        return {}
    width, height = size
    target = _size(pairs, "Hires resize", notes)
    ratio = _ratio(pairs, notes)
    if target is None and ratio is not None:
        target = floored_size(int(width * ratio)), floored_size(int(height * ratio))
    if target is None or target == size:
        if "strength" in fields:
            notes.append("the picture was drawn from another one, which its text does not name")
        return {"width": width, "height": height}
    upscaler = pairs.get("Hires upscaler", _PIXELS)
    found: dict[str, Any] = {
        "width": target[0],
        "height": target[1],
        # Rounded up, so that what was a whole number of pixels stays one when it is rounded down.
        "highres_scale": math.ceil(max(width / target[0], height / target[1]) * 1e6) / 1e6,
        "highres_latents": upscaler.startswith("Latent"),
    }
    if "steps" in fields:
        found["highres_steps"] = fields["steps"]
    if pairs.get("Hires steps", "0") != "0":  # A1111 writes none, or 0, for as many as in the first stage
        found |= _accepted("steps", pairs["Hires steps"], int, "Hires steps", notes)
    if not upscaler.startswith(("Latent", _PIXELS)):
        notes.append(f"not taken: Hires upscaler {upscaler}; the first stage is enlarged by {_PIXELS}")
    problems: list[UserError] = []
    request = attempt(lambda: ImageRequest(prompt="", seed=0, **found), problems)
    if request is None:
        notes += [f"not taken: the second stage ({problem.what})" for problem in problems]
        return {"width": width, "height": height}
    if request.first_stage != size:
        first = "x".join(map(str, request.first_stage or ()))
        notes.append(f"the first stage is drawn at {first} instead of {width}x{height}")
    return found


def _size(pairs: Mapping[str, str], name: str, notes: list[str]) -> tuple[int, int] | None:
    """A pair of sides, rounded down to what a picture can have; None where it is missing or cannot be."""
    if name not in pairs:
        return None
    sides = re.fullmatch(r"(\d+)x(\d+)", pairs[name])
    if not sides:
        notes.append(f"not read: {name} {pairs[name]!r}")
        return None
    width, height = (floored_size(int(side)) for side in sides.groups())
    problems: list[UserError] = []
    if attempt(lambda: ImageRequest(prompt="", seed=0, width=width, height=height), problems) is None:
        notes.append(f"not taken: {name} {pairs[name]} ({problems[0].what})")
        return None
    return width, height


def _ratio(pairs: Mapping[str, str], notes: list[str]) -> float | None:
    if "Hires upscale" not in pairs:
        return None
    try:
        ratio = float(pairs["Hires upscale"])
    except ValueError:
        ratio = math.nan
    if 1 <= ratio <= 20:
        return ratio
    notes.append(f"not read: Hires upscale {pairs['Hires upscale']!r}")
    return None


def read_separate(texts: Mapping[str, str], size: Iterable[int]) -> FoundRecipe:
    """The same from the texts that sd-scripts writes one by one.

    Args:
        texts: keyword -> text of a PNG.
        size: (width, height) of the picture.
    """
    notes: list[str] = []
    fields: dict[str, Any] = {"prompt": texts["prompt"], "negative_prompt": texts.get("negative-prompt", "")}
    numbers = {"seed": int, "steps": int, "scale": float, "negative-scale": float}
    for name, convert in numbers.items():
        if texts.get(name) not in (None, "None"):
            fields |= _accepted(name.replace("-", "_"), texts[name], convert, name, notes)
    fields |= _sampler({"Sampler": texts["sampler"]} if "sampler" in texts else {}, notes)
    found = _size({"size": "x".join(map(str, size))}, "size", notes)
    if found is not None:
        fields["width"], fields["height"] = found
    return FoundRecipe(fields=fields, notes=tuple(notes))
