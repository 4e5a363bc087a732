"""Pictures again, from what they say of themselves: the options of a run as their recipes have them.

What the command line says comes before what a recipe says, so that a picture can also be varied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from library.errors import UserError, attempt, counted, raise_all
from library.generation.controls import ControlUse
from library.generation.made_with import APART, adapter_hash, not_default
from library.generation.options import AdapterOptions, GenerationOptions, ModelOptions, NetworkUse, PictureOptions
from library.generation.planning import image_seed
from library.generation.png_info import read_picture
from library.generation.prompt_options import PromptLine
from library.prompts.tag_editing import first_tag


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What one picture says."""

    path: Path
    fields: Mapping[str, Any]
    made_with: Mapping[str, Any]
    notes: tuple[str, ...]


def with_recipes(options: GenerationOptions) -> tuple[GenerationOptions, list[str]]:
    """The options with the model and the adapters that pictures were drawn with, and what a user should know.

    Raises:
        UserError: pictures without recipes, with different models or adapters, or whose files are not there any more; all
            at once.
    """
    problems: list[UserError] = []
    recipes = [attempt(partial(_read, path), problems) for path in options.pictures.recipes]
    read = [recipe for recipe in recipes if recipe is not None]
    if len(read) == len(recipes):
        for what, remedy, part in _SHARED:
            attempt(partial(_require_same, read, what, remedy, partial(part, options)), problems)
        attempt(partial(_require_one_style, read), problems)
        problems += _missing_pictures(read, options)
    raise_all(problems)
    model = attempt(partial(_model, options.model, read[0]), problems)
    adapters = attempt(partial(_adapters, options.adapters, read), problems)
    uses = attempt(partial(_controls, options, read[0]), problems)
    if adapters is not None:
        attempt(partial(_check_strengths, options.pictures, adapters), problems)
    raise_all(problems)
    assert model is not None  # for the type checker: without these there was a problem
    assert adapters is not None
    control = replace(options.control, uses=uses or ())
    changed = replace(options, model=model, adapters=adapters, control=control)
    notes = [f"{recipe.path}: {note}" for recipe in read for note in recipe.notes]
    return changed, [*notes, *_changes(read, adapters)]


def recipe_lines(options: PictureOptions) -> list[PromptLine]:
    """A line for each picture, with all it says but what the command line says instead."""
    lines = []
    for path in options.recipes:
        fields = read_picture(path).fields
        own = {name: value for name, value in fields.items() if name not in {"prompt", "seed"} | options.given}
        seeds: tuple[int, ...] = ()
        if options.seed is None and "seed" in fields:
            seeds = tuple(image_seed(fields["seed"], number) for number in range(options.images_per_prompt))
        lines.append(PromptLine(prompt=fields["prompt"], settings=own, seeds=seeds, where=str(path), literal=True))
    return lines


def _read(path: Path) -> _Recipe:
    found = read_picture(path)
    return _Recipe(path=path, fields=found.fields, made_with=found.made_with, notes=found.notes)


# What the recipes of one command share


def _model_part(options: GenerationOptions, recipe: _Recipe) -> Any:
    own = recipe.made_with.get("model_file") or recipe.made_with.get("model")
    others = [None if getattr(options.model, name) else recipe.made_with.get(name) for name in APART[1:]]
    return None if options.model.path else own, others


def _settings_part(options: GenerationOptions, recipe: _Recipe) -> Any:
    given = not_default(options.model)
    return {name: value for name, value in recipe.made_with.get("computed", {}).items() if name not in given}


def _adapter_part(options: GenerationOptions, recipe: _Recipe) -> Any:
    if options.adapters.networks:
        return None
    return recipe.made_with.get("networks") or [], recipe.made_with.get("merged"), recipe.made_with.get("merge_for_batches")


def _control_part(options: GenerationOptions, recipe: _Recipe) -> Any:
    return None if options.control.uses else recipe.made_with.get("control")


_TWICE = "draw them in two commands"
_SHARED = (
    ("base models", f"{_TWICE}, or give one for all with --ckpt", _model_part),
    ("precision or other settings of the model", _TWICE, _settings_part),
    ("adapters", f"{_TWICE}, or give those for all with --network_weights", _adapter_part),
    ("ControlNets", f"{_TWICE}, or give those for all with --control_net_models", _control_part),
)


def _require_same(recipes: Sequence[_Recipe], what: str, remedy: str, part: Callable[[_Recipe], Any]) -> None:
    """Refuse recipes that differ in what a run has only once."""
    first = recipes[0]
    for other in recipes[1:]:
        if part(other) != part(first):
            pair = f"{first.path} and {other.path}"
            raise UserError(f"{pair} were drawn with different {what}", where="--from_png", remedy=remedy)


def _styles(recipes: Sequence[_Recipe]) -> list[str]:
    """The rules by which the tags of prompts are read, where there are tags."""
    tagged = [recipe for recipe in recipes if first_tag(recipe.fields["prompt"])]
    return list(dict.fromkeys(recipe.fields.get("lora_tag_style", "sdnext") for recipe in tagged))


def _require_one_style(recipes: Sequence[_Recipe]) -> None:
    if len(styles := _styles(recipes)) > 1:
        what = f"tags in their prompts are read by different rules ({', '.join(styles)})"
        raise UserError(what, where="--from_png", remedy=_TWICE)


def _missing_pictures(recipes: Sequence[_Recipe], options: GenerationOptions) -> list[UserError]:
    problems = []
    sources = (
        ("image", "--image_path", options.pictures.images),
        ("mask", "--mask_path", options.pictures.masks),
        ("regions", "--mask_path", options.pictures.masks),
        ("control_images", "--guide_image_path", options.control.hints),
    )
    for recipe in recipes:
        for name, option, instead in sources:
            files = recipe.fields.get(name) or ()
            for file in (files,) if isinstance(files, str) else files:
                if not instead and not Path(file).is_file():
                    what = f"it was drawn with the picture {file}, which is not there"
                    problems.append(UserError(what, where=str(recipe.path), remedy=f"give it with {option}"))
    return problems


# The parts of a run's options


def _model(options: ModelOptions, recipe: _Recipe) -> ModelOptions:
    made_with = recipe.made_with
    path = options.path or made_with.get("model_file")
    if not path:
        name = f" but the name {made_with['model']}" if made_with.get("model") else ""
        what = f"it does not say which file its base model is{name}"
        raise UserError(what, where=str(recipe.path), remedy="give it with --ckpt")
    others = {name: getattr(options, name) for name in APART[1:]}
    if "model_file" in made_with:
        others = {name: given or made_with.get(name) for name, given in others.items()}
    chosen = [getattr(options, name) for name in APART]
    for file, option in ((path, "--ckpt"), *((file, f"--{name}") for name, file in others.items())):
        if file and Path(file).is_absolute() and not Path(file).exists() and file not in chosen:
            what = f"it was drawn with {file}, which is not there"
            raise UserError(what, where=str(recipe.path), remedy=f"give it with {option}")
    computed = {
        name: tuple(map(Path, value)) if isinstance(value, list) else value
        for name, value in made_with.get("computed", {}).items()
    }
    given = {name: value for name, value in not_default(options).items() if name not in APART}
    with _readable(recipe):
        return replace(options, **{**computed, **given, "path": path, **others})


def _adapters(options: AdapterOptions, recipes: Sequence[_Recipe]) -> AdapterOptions:
    problems: list[UserError] = []
    first = recipes[0]
    networks, merged, merges = options.networks, options.merged, options.merge_for_batches
    if not networks:
        entries = first.made_with.get("networks") or []
        uses = [attempt(partial(_network, entry, first), problems) for entry in entries]
        networks = tuple(use for use in uses if use is not None)
        merged = merged or first.made_with.get("merged", 0)
    known = {} if options.folder is not None else _known_files(recipes, problems)
    raise_all(problems)
    return replace(
        options,
        networks=networks,
        merged=merged,
        merge_for_batches=merges or bool(first.made_with.get("merge_for_batches")),
        known=known,
        tag_style=next(iter(_styles(recipes)), options.tag_style),
    )


def _check_strengths(options: PictureOptions, adapters: AdapterOptions) -> None:
    """--network_mul is for the adapters beside tags; refuse more strengths than there are of them."""
    strengths, number = options.settings.get("network_strengths", ()), len(adapters.networks) - adapters.merged
    if len(strengths) > number:
        raise UserError(
            f"{counted(len(strengths), 'strength')} for {counted(number, 'adapter')} beside those in tags",
            where=f"--network_mul {' '.join(f'{strength:g}' for strength in strengths)}",
            remedy="give one for each, or change the first tag's with --grid strength:0.5",
        )


def _known_files(recipes: Sequence[_Recipe], problems: list[UserError]) -> dict[str, Path]:
    """Name in a tag -> the file that it meant."""
    known: dict[str, Path] = {}
    for recipe in recipes:
        for name, file in (recipe.made_with.get("tag_files") or {}).items():
            if known.setdefault(name, Path(file)) != Path(file):
                what = f"<lora:{name}> means {file}, and in another picture {known[name]}"
                problems.append(UserError(what, where=str(recipe.path), remedy=_TWICE))
            elif not Path(file).is_file():
                what = f"its <lora:{name}> was {file}, which is not there"
                remedy = "give the folder where it is with --lora_dir"
                problems.append(UserError(what, where=str(recipe.path), remedy=remedy))
    return known


def _network(entry: Mapping[str, Any], recipe: _Recipe) -> NetworkUse:
    with _readable(recipe):
        file = Path(entry["file"])
        use = NetworkUse(file=file, strength=float(entry["strength"]), module=entry["module"], args=dict(entry["args"]))
    if not file.is_file():
        what = f"it was drawn with the adapter {file}, which is not there"
        raise UserError(what, where=str(recipe.path), remedy="give it with --network_weights")
    return use


def _controls(options: GenerationOptions, recipe: _Recipe) -> tuple[ControlUse, ...]:
    if options.control.uses:
        return options.control.uses
    with _readable(recipe):
        return tuple(ControlUse(**entry) for entry in recipe.made_with.get("control") or [])


@contextlib.contextmanager
def _readable(recipe: _Recipe) -> Iterator[None]:
    """Turns what is wrong with a recipe's own entries into a sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"holds a recipe that cannot be read ({error})", where=str(recipe.path)) from None


def _changes(recipes: Sequence[_Recipe], adapters: AdapterOptions) -> list[str]:
    """A sentence for each adapter file that is not what it was."""
    notes = []
    used = {str(use.file) for use in adapters.networks}
    for recipe in recipes:
        made_with = recipe.made_with
        hashes = made_with.get("lora_hashes") or {}
        then = {
            file: hashes.get(name) for name, file in (made_with.get("tag_files") or {}).items() if name in adapters.known
        }
        then |= {entry["file"]: entry.get("hash") for entry in made_with.get("networks") or [] if entry["file"] in used}
        notes += [
            f"{file} has changed since {recipe.path} was drawn, so its picture will be another one"
            for file, short in then.items()
            if short and adapter_hash(Path(file)) != short
        ]
    return notes
