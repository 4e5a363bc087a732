"""What can be found out about a run before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError, attempt, raise_all
from library.generation.options import AdapterOptions, GenerationOptions, ModelOptions

if TYPE_CHECKING:
    from library.checkpoints.base_model import BaseModelFiles
    from library.families.family import ModelFamily
    from library.generation.lora_shelf import LoraShelf
    from library.prompts.lora_tags import LoraTag


def checked_model(options: GenerationOptions, problems: list[UserError]) -> BaseModelFiles | None:
    """The base model's headers, with the files that go with it checked; what is wrong is added to `problems`."""
    attempt(lambda: check_output_folder(options.output.folder), problems)
    attempt(lambda: _check_precision(options.model), problems)
    base_model = attempt(lambda: _open_base_model(options.model), problems)
    if base_model is not None:
        clip_skip = options.pictures.settings.get("clip_skip")
        attempt(lambda: base_model.check_clip_skip(clip_skip), problems)
        attempt(partial(_check_control, options, base_model), problems)
        attempt(partial(open_refiner, options.model, base_model), problems)
    for file in options.model.embeddings:
        attempt(partial(_check_embedding, file), problems)
    family = None if base_model is None else base_model.family
    for network in options.adapters.networks:
        attempt(partial(check_adapter, network.file, family, f"--network_weights {network.file}"), problems)
    return base_model


def check_output_folder(folder: Path) -> None:
    """Make the folder, and see that it can be written to.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made ({error.strerror})", where=f"--outdir {folder}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError("cannot be written to", where=f"--outdir {folder}", remedy="name another folder")


def _check_precision(model: ModelOptions) -> None:
    from library.devices import best_device, compute_dtype

    compute_dtype(model.precision, best_device(), where=f"--{model.precision}")


def _check_control(options: GenerationOptions, base_model: BaseModelFiles) -> None:
    from library.generation.controls import open_control_nets

    open_control_nets(options.control.uses, base_model)


def _check_embedding(file: Path) -> None:
    from library.conditioning.embeddings import read_embedding

    read_embedding(file)


def _open_base_model(model: ModelOptions) -> BaseModelFiles:
    from library.checkpoints.base_model import open_base_model

    return open_base_model(
        model.path,
        vae_path=model.vae,
        v2=model.v2,
        v_parameterization=model.v_parameterization,
        family=model.family,
    )


def open_refiner(model: ModelOptions, base_model: BaseModelFiles) -> BaseModelFiles | None:
    """The refiner's headers; None where none is wanted.

    Raises:
        UserError: it cannot be read, or does not finish pictures of the base model.
    """
    from library.checkpoints.base_model import open_base_model

    if model.refiner is None:
        return None
    where = f"--refiner {model.refiner}"
    refiner = open_base_model(model.refiner, refiner=True)
    if refiner.family.refines != base_model.family.name:
        what = f"is {refiner.family.title}, and the base model is {base_model.family.title}"
        raise UserError(what, where=where, remedy="leave it out")
    return refiner


def check_adapter(file: Path, family: ModelFamily | None, where: str) -> None:
    """Refuse what is no adapter for a family by its header.

    Args:
        family: of the base model; None where that is not known.

    Raises:
        UserError: no such file, a damaged one, or an adapter for another family.
    """
    from library.checkpoints.tensor_files import open_tensor_file
    from library.families.detect import adapter_origin

    if not file.is_file():
        raise UserError("no such file", where=where)
    adapter = open_tensor_file(file)
    origin = adapter_origin(adapter.shapes(), adapter.metadata)
    # One that says nothing is taken to be for this model; its layers then decide when it is loaded.
    if family is None or origin is None or origin == family:
        return
    title = origin if isinstance(origin, str) else origin.title
    raise UserError(
        f"is an adapter for {title}, and the base model is {family.title}",
        where=where,
        remedy="give the base model it was trained on",
    )


class PromptAdapters:
    """The adapters that prompts name: found, and fit for the base model.

    Args:
        family: of the base model; None where that is not known.

    Raises:
        UserError: `--lora_dir` is no folder.
    """

    def __init__(self, options: AdapterOptions, family: ModelFamily | None) -> None:
        from library.generation.lora_shelf import LoraShelf

        self._options, self._family = options, family
        self.shelf: LoraShelf = LoraShelf(options.folder)
        self._found: dict[str, Path] = {}

    def find(self, tag: LoraTag) -> Path:
        """The file that a tag names.

        Raises:
            UserError: there is none, or it is of no use here.
        """
        if tag.name not in self._found:
            file = self._options.known.get(tag.name) or self.shelf.find(tag.name, where=tag.text)
            check_adapter(file, self._family, f"{tag.text} ({file})")
            self._found[tag.name] = file
        return self._found[tag.name]

    def files(self) -> list[Path]:
        """Those of the command line, and those that prompts have named so far."""
        return [*(use.file for use in self._options.networks), *self._found.values()]

    def complete(self, prompt: str, where: str) -> str:
        """A prompt whose tags can all be used, with as many trigger words as are wanted.

        They are those of its own adapters and of the command line's.

        Args:
            where: names the prompt in sentences.

        Raises:
            UserError: all that is wrong with its tags.
        """
        from library.prompts.sub_prompts import read_prompt

        problems: list[UserError] = []
        sub_prompts = read_prompt(prompt, where=where, style=self._options.tag_style)
        tags = [tag for sub_prompt in sub_prompts for tag in sub_prompt.tags]
        found = [attempt(partial(self.find, tag), problems) for tag in tags]
        raise_all([UserError(each.what, where=f"{where}, {each.where}", remedy=each.remedy) for each in problems])
        if not self._options.trigger_words:
            return prompt
        from library.checkpoints.tensor_files import open_tensor_file
        from library.generation.trigger_words import chosen_words, with_trigger_words

        files = [*(use.file for use in self._options.networks), *(file for file in found if file is not None)]
        count = self._options.trigger_words
        words = [word for file in files for word in chosen_words(open_tensor_file(file).metadata, count)]
        return with_trigger_words(prompt, words)


def picture_files_of(path: Path, where: str) -> list[str]:
    """A picture, or those of a folder by name.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError("no such file or folder", where=where)
    found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not found:
        raise UserError("holds no .png, .jpg or .webp file", where=where)
    return found


def check_readable(files: Sequence[str]) -> None:
    """See that files are pictures.

    Raises:
        UserError: all that are not.
    """
    from library.generation.picture_files import picture_size

    problems: list[UserError] = []
    for file in dict.fromkeys(files):
        attempt(partial(picture_size, file), problems)
    raise_all(problems)
