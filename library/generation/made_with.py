"""What a picture's recipe says beside its request: the model and the adapters, which files and what was in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.hashes import legacy_model_hash, remembered, sha256_of_file, sshs_hashes
from library.checkpoints.tensor_files import open_tensor_file
from library.generation.lora_listing import HASH_DIGITS, short_hash
from library.generation.options import GenerationOptions, NetworkUse
from library.prompts.sub_prompts import read_prompt

if TYPE_CHECKING:
    from library.checkpoints.base_model import BaseModelFiles
    from library.generation.checking import PromptAdapters
    from library.generation.planning import PlannedPicture
    from library.generation.requests import ImageRequest

APART = ("path", "vae", "refiner")
"""Fields of `ModelOptions` that have an entry of their own: files."""
_OF_THE_COMMAND = ("family",)


class RecipeWriter:
    """What the recipes of a run have in common, and what each adds.

    Args:
        adapters: that the prompts name.
    """

    def __init__(self, options: GenerationOptions, base_model: BaseModelFiles, adapters: PromptAdapters) -> None:
        self._adapters = adapters
        model = Path(options.model.path)
        self._common: dict[str, Any] = {
            "model": base_model.name,
            "model_file": _absolute(options.model.path),
            **{name: _absolute(file) for name in APART[1:] if (file := getattr(options.model, name)) is not None},
            "networks": [_network(use) for use in options.adapters.networks],
        }
        if model.is_file():
            self._common["model_hash"] = legacy_model_hash(model)
        computed = {
            name: value for name, value in not_default(options.model).items() if name not in (*APART, *_OF_THE_COMMAND)
        }
        merging = {"merged": options.adapters.merged, "merge_for_batches": options.adapters.merge_for_batches}
        control = [{**asdict(use), "path": _absolute(use.path)} for use in options.control.uses]
        others = {"computed": computed, "control": control, **merging}
        self._common |= {name: value for name, value in others.items() if value}

    def made_with(self, picture: PlannedPicture) -> Mapping[str, Any]:
        """JSON-able; `recipes.with_recipes` reads it, and parts of it `web_parameters`."""
        files = self._tag_files(picture.request)
        named = {"tag_files": files, "lora_hashes": {name: adapter_hash(Path(file)) for name, file in files.items()}}
        return {**self._common, **(named if files else {}), "raw_prompt": picture.raw_prompt}

    def _tag_files(self, request: ImageRequest) -> dict[str, str]:
        """Name in a tag -> the file it means."""
        prompts = read_prompt(request.prompt, where="prompt", style=request.lora_tag_style, extended=request.extended)
        tags = [tag for prompt in prompts for tag in prompt.tags]
        return {tag.name: str(self._adapters.find(tag).absolute()) for tag in tags}


def _network(use: NetworkUse) -> dict[str, Any]:
    return {
        "name": use.file.stem,
        "strength": use.strength,
        "file": str(use.file.absolute()),
        "module": use.module,
        "args": dict(use.args),
        "hash": adapter_hash(use.file),
    }


def _absolute(path: str) -> str:
    """A path as it is from everywhere; the id of a model on the Hub stays one."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def not_default(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are by default, paths as texts."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    changed = {
        field.name: values[field.name]
        for field in fields(options)
        if field.default is MISSING or values[field.name] != field.default
    }
    return {name: [str(each.absolute()) for each in value] if _paths(value) else value for name, value in changed.items()}


def _paths(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, Path) for each in value)


def adapter_hash(file: Path) -> str:
    """The beginning of the hash of a file's tensors, as web UIs write it; of the whole file where it is no safetensors."""
    if file.suffix.lower() != ".safetensors":
        return sha256_of_file(file)[:HASH_DIGITS]
    noted = short_hash(open_tensor_file(file).metadata)
    return noted or remembered("sshs_model_hash", [file], lambda: sshs_hashes(file)["sshs_model_hash"])[:HASH_DIGITS]
