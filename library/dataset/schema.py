"""The dataset file: which keys it has at which level, of which type, and where its mistakes are.

Two top-level keys, `general` (a table) and `datasets` (an array of tables, each with an array `subsets`); TOML or JSON.
Every key is optional here, None meaning "not set": the lookup through the levels is in `sources.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from library.dataset.options import INTERPOLATIONS
from library.errors import UserError, near_names, raise_all
from library.text_files import read_json, read_toml


def parse_resolution(value: object) -> tuple[int, int]:
    """512, [512, 768], "512" or "512,768" as (width, height)."""
    sides: list[Any] = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        numbers = [int(side) if isinstance(side, str) else side for side in sides]
    except ValueError:
        numbers = []
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers)
    if not whole or len(numbers) not in (1, 2):
        raise ValueError("should be a size or a width and a height in pixels (512 or [512, 768])")
    return numbers[0], numbers[-1]


def parse_range(value: object) -> tuple[float, float]:
    """[1.5, 3], or "1.5,3" as on the command line."""
    ends = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(end) for end in ends)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not 0 < low <= high:
        raise ValueError("should be two numbers above 0, the smaller first ([1.5, 3])")
    return low, high


Rate = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Resolution = Annotated[Any, BeforeValidator(parse_resolution)]
Range = Annotated[Any, BeforeValidator(parse_range)]


class Table(BaseModel):
    """A table of the file: types are meant literally, except that a whole number does for a float."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def given(self) -> dict[str, Any]:
        """What the file sets in this table."""
        return {name: value for name, value in self if value is not None and name not in ("subsets", "datasets")}


class DatasetKeys(Table):
    """Keys of [general] and [[datasets]]."""

    batch_size: Positive | None = None
    resolution: Resolution | None = None
    enable_bucket: bool | None = None
    min_bucket_reso: Positive | None = None
    max_bucket_reso: Positive | None = None
    bucket_reso_steps: Positive | None = None
    bucket_no_upscale: bool | None = None
    network_multiplier: float | None = None
    validation_split: Rate | None = None
    validation_seed: int | None = None


class SubsetKeys(Table):
    """Keys of all three levels."""

    num_repeats: Count | None = None
    shuffle_caption: bool | None = None
    caption_separator: Annotated[str, Field(min_length=1)] | None = None
    keep_tokens: Count | None = None
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    token_warmup_min: Count | None = None
    token_warmup_step: Annotated[float, Field(ge=0)] | None = None
    caption_dropout_rate: Rate | None = None
    caption_dropout_every_n_epochs: Count | None = None
    caption_tag_dropout_rate: Rate | None = None
    color_aug: bool | None = None
    flip_aug: bool | None = None
    random_crop: bool | None = None
    face_crop_aug_range: Range | None = None
    resize_interpolation: Literal[INTERPOLATIONS] | None = None  # type: ignore[valid-type]
    custom_attributes: dict[str, Any] | None = None
    caption_extension: Annotated[str, Field(min_length=1)] | None = None
    class_tokens: str | None = None
    cache_info: bool | None = None


class SubsetTable(SubsetKeys):
    """[[datasets.subsets]]"""

    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    is_reg: bool | None = None
    alpha_mask: bool | None = None


class DatasetTable(DatasetKeys, SubsetKeys):
    """[[datasets]]"""

    subsets: Annotated[list[SubsetTable], Field(min_length=1)]


class GeneralTable(DatasetKeys, SubsetKeys):
    """[general]"""


class DatasetFile(Table):
    """The whole file."""

    general: GeneralTable = Field(default_factory=GeneralTable)
    datasets: Annotated[list[DatasetTable], Field(min_length=1)]


class CommandLine(DatasetKeys, SubsetKeys):
    """The fall-backs of the command line, held to the same rules."""

    alpha_mask: bool | None = None


COMMAND_LINE_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # key -> option


def read_dataset_file(path: Path) -> DatasetFile:
    """Read and check the file.

    Raises:
        UserError: it is missing, not TOML or JSON, or has mistakes; every one is named with its place.
    """
    tables = load_tables(path)
    try:
        return DatasetFile.model_validate(tables)
    except ValidationError as error:
        raise_all([_sentence(problem, path) for problem in error.errors()])
        raise


def load_tables(path: Path) -> dict[str, Any]:
    """The file's contents as plain dictionaries and lists."""
    where = f"--dataset_config {path}"
    if path.suffix.lower() == ".toml":
        try:
            return read_toml(path, where=where)
        except UserError as error:
            backslashes = any(word in error.what for word in ("\\", "escape", "hex value"))
            remedy = "write folders with / or in 'single quotes'" if backslashes else error.remedy
            raise UserError(error.what, where=where, remedy=remedy) from None
    if path.suffix.lower() != ".json":
        raise UserError("a dataset file ends in .toml or .json", where=where)
    tables = read_json(path, where=where)
    if not isinstance(tables, dict):
        raise UserError("should be a table with the keys general and datasets", where=where)
    return tables


def check_command_line(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[UserError]]:
    """The command line's fall-backs, by the names of the file's keys, held to the rules of the file.

    Returns:
        What is set and right (None means not set), and a sentence for everything else.
    """
    problems = []
    checked = dict(values)
    try:
        return CommandLine.model_validate(checked).given(), []
    except ValidationError as error:
        for problem in error.errors():
            key = str(problem["loc"][0])
            option = f"--{COMMAND_LINE_NAMES.get(key, key)}"
            problems.append(UserError(_fault(problem), where=f"{option} {problem['input']}"))
            checked[key] = None
    return CommandLine.model_validate(checked).given(), problems


def place(path: Path, dataset: int | None = None, subset: int | None = None) -> str:
    """Where in the file, as it is written there: counting from 1."""
    toml = path.suffix.lower() == ".toml"
    parts = []
    if dataset is not None:
        parts.append(f"[[datasets]] {dataset}" if toml else f"datasets {dataset}")
    if subset is not None:
        parts.append(f"[[datasets.subsets]] {subset}" if toml else f"subsets {subset}")
    return f"{path}: {', '.join(parts)}" if parts else str(path)


def _sentence(problem: Any, path: Path) -> UserError:
    """One of pydantic's errors in our words."""
    location = list(problem["loc"])
    numbers = [part + 1 for part in location if isinstance(part, int)]
    names = [part for part in location if isinstance(part, str) and part not in ("datasets", "subsets")]
    where = place(path, *numbers[:2])
    table: type[Table] = DatasetFile
    if location[0] == "general" and len(location) > 1:
        where, table = f"{path}: [general]" if path.suffix.lower() == ".toml" else f"{path}: general", GeneralTable
    elif numbers:
        table = SubsetTable if len(numbers) > 1 else DatasetTable
    key = next((name for name in names if name != "general"), location[-1] if isinstance(location[-1], str) else "it")
    if problem["type"] == "extra_forbidden":
        return UserError(f"unknown key {key!r}", where=where, remedy=_hint(key, table))
    if problem["type"] == "missing":
        named = "[[datasets]]" if key == "datasets" else "[[datasets.subsets]]"
        return UserError(f"{key!r} is missing", where=where, remedy=f"name the images in {named}")
    return UserError(f"{key} {_fault(problem)}, not {_written(problem['input'])}", where=where)


def _hint(key: str, table: type[Table]) -> str:
    """What an unknown key may have meant: a key of another level, or a near name."""
    levels: dict[str, type[Table]] = {
        "[general] or [[datasets]]": DatasetKeys,
        "[[datasets.subsets]]": SubsetTable,
        "[[datasets]]": DatasetTable,
    }
    for level, model in levels.items():
        if key in model.model_fields:
            return f"it belongs in {level}"
    if key in COMMAND_LINE_NAMES.values():
        meant = next(name for name, option in COMMAND_LINE_NAMES.items() if option == key)
        return f"in a dataset file it is {meant}"
    return near_names(key, table.model_fields)


def _fault(problem: Any) -> str:
    """What a value should be."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    fixed = {
        "int_type": "should be a whole number",
        "int_from_float": "should be a whole number",
        "float_type": "should be a number",
        "string_type": "should be text in quotes",
        "bool_type": "should be true or false",
        "list_type": "should be an array of tables",
        "dict_type": "should be a table",
        "model_type": "should be a table",
        "too_short": "should have at least one entry",
        "string_too_short": "should not be empty",
    }
    if kind in fixed:
        return fixed[kind]
    if kind == "greater_than_equal":
        return f"should be {context['ge']:g} or more"
    if kind == "less_than_equal":
        return f"should be {context['le']:g} or less"
    if kind == "literal_error":
        return f"should be one of {context['expected']}"
    return str(problem["msg"])


def _written(value: object) -> str:
    """A value as a dataset file writes it, short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
