"""From a dataset file, folders or a metadata file to complete settings: the lookup through the levels, and its mistakes.

Every value is looked up in the subset, the dataset, [general] and the command line, in that order; the last always has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from library.dataset import schema
from library.dataset.buckets import BucketSettings, bucket_problems
from library.dataset.captions import CaptionSettings
from library.dataset.options import DatasetOptions, DatasetSettings, SubsetSettings
from library.errors import UserError, attempt, raise_all

_CAPTION_KEYS = tuple(spec.name for spec in fields(CaptionSettings))
_BUCKET_KEYS = {
    "resolution": "resolution",
    "enable_bucket": "enabled",
    "min_bucket_reso": "min_reso",
    "max_bucket_reso": "max_reso",
    "bucket_reso_steps": "step",
    "bucket_no_upscale": "no_upscale",
}


@dataclass
class Findings:
    """What one pass over the settings found: mistakes, and things a user should be told."""

    problems: list[UserError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def problem(self, what: str, *, where: str, remedy: str | None = None) -> None:
        self.problems.append(UserError(what, where=where, remedy=remedy))

    def notice(self, where: str, what: str) -> None:
        self.notices.append(f"{where}: {what}")


def read_settings(options: DatasetOptions, *, size_multiple: int) -> tuple[list[DatasetSettings], list[str]]:
    """All datasets of a run, and notices.

    Args:
        size_multiple: what the model asks of image sides, pixels.

    Raises:
        UserError: all mistakes at once.
    """
    findings = Findings()
    fallbacks = _fallbacks(options, findings)
    if options.dataset_config is not None:
        datasets = _from_file(options, fallbacks, findings)
    elif options.in_json is not None:
        datasets = [_from_metadata(options, fallbacks, findings)]
    elif options.train_data_dir is not None:
        datasets = [_from_folders(options, fallbacks, findings)]
    else:
        raise UserError("no training data is named", remedy="give --dataset_config, or --train_data_dir")
    for dataset in datasets:
        _check_dataset(dataset, options, findings, size_multiple)
    raise_all(findings.problems)
    return datasets, findings.notices


def _fallbacks(options: DatasetOptions, findings: Findings) -> dict[str, Any]:
    """The command line under the names of the file's keys; what is wrong there gives way to the default, to look on."""
    for what, least in (("prior_loss_weight", 0), ("vae_batch_size", 1)):
        if getattr(options, what) < least:
            findings.problem(f"should be {least} or more", where=f"--{what} {getattr(options, what)}")
    given, problems = schema.check_command_line(_by_key(options))
    findings.problems.extend(problems)
    defaults, _ = schema.check_command_line(_by_key(DatasetOptions()))
    return {**defaults, **given}


def _by_key(options: DatasetOptions) -> dict[str, Any]:
    """The fall-backs among the options, by key of the dataset file."""
    names = {key: schema.COMMAND_LINE_NAMES.get(key, key) for key in schema.CommandLine.model_fields}
    known = {spec.name for spec in fields(DatasetOptions)}
    return {key: getattr(options, name) for key, name in names.items() if name in known}


def _from_file(options: DatasetOptions, fallbacks: dict[str, Any], findings: Findings) -> list[DatasetSettings]:
    """Every dataset of --dataset_config."""
    path = options.dataset_config
    assert path is not None
    ignored = [name for name in ("train_data_dir", "reg_data_dir", "in_json") if getattr(options, name) is not None]
    for name in ignored:
        findings.notice(f"--{name}", "not used, because --dataset_config names the data")
    file = attempt(lambda: schema.read_dataset_file(path), findings.problems)
    if file is None:
        raise_all(findings.problems)
        return []
    _note_overridden(options, file, findings)
    datasets = []
    for number, table in enumerate(file.datasets, start=1):
        where = schema.place(path, number)
        levels = {**fallbacks, **file.general.given(), **table.given()}
        subsets = []
        for subset_number, subset in enumerate(table.subsets, start=1):
            values = {**levels, **subset.given()}
            place = schema.place(path, number, subset_number)
            _check_subset_kind(subset.given(), place, findings)
            subsets.append(_subset(values, place))
        _note_idle_keys(levels, where, findings)
        datasets.append(_dataset(levels, where, _without_doubles(subsets, findings), findings))
    return datasets


def _note_overridden(options: DatasetOptions, file: schema.DatasetFile, findings: Findings) -> None:
    """Name options of the command line that the file sets everywhere, so that they reach nothing."""
    defaults = DatasetOptions()
    for key in schema.CommandLine.model_fields:
        option = schema.COMMAND_LINE_NAMES.get(key, key)
        if getattr(options, option, None) == getattr(defaults, option, None):
            continue
        everywhere = key in file.general.given() or all(
            key in table.given() or all(key in subset.given() for subset in table.subsets) for table in file.datasets
        )
        if everywhere:
            findings.notice(f"--{option}", f"not used, because the dataset file sets {key} everywhere")


def _from_metadata(options: DatasetOptions, fallbacks: dict[str, Any], findings: Findings) -> DatasetSettings:
    """--in_json, with --train_data_dir for the images."""
    where = f"--in_json {options.in_json}"
    values = {**fallbacks, "metadata_file": str(options.in_json)}
    if options.train_data_dir is not None:
        values["image_dir"] = str(options.train_data_dir)
    if options.reg_data_dir is not None:
        findings.notice("--reg_data_dir", "not used: regularisation images have no place beside --in_json")
    return _dataset(fallbacks, where, [_subset(values, where)], findings)


def _from_folders(options: DatasetOptions, fallbacks: dict[str, Any], findings: Findings) -> DatasetSettings:
    """The folders of --train_data_dir and --reg_data_dir."""
    assert options.train_data_dir is not None
    where = f"--train_data_dir {options.train_data_dir}"
    subsets = _numbered_folders("--train_data_dir", options.train_data_dir, fallbacks, findings, is_reg=False)
    if options.reg_data_dir is not None:
        subsets += _numbered_folders("--reg_data_dir", options.reg_data_dir, fallbacks, findings, is_reg=True)
    return _dataset(fallbacks, where, subsets, findings)


def _numbered_folders(
    option: str, parent: Path, fallbacks: dict[str, Any], findings: Findings, *, is_reg: bool
) -> list[SubsetSettings]:
    """One subset for each folder "10_sks dog": repeats, then the caption of images that have none. Sorted by name."""
    where = f"{option} {parent}"
    if not parent.is_dir():
        findings.problem("no such folder", where=where)
        return []
    subsets, others = [], []
    for folder in sorted(entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        repeats, _, text = folder.name.partition("_")
        if not repeats.isdecimal():
            others.append(folder.name)
        elif int(repeats) < 1:
            findings.notice(f"{option} {folder}", "left out, because its name says 0 repeats")
        else:
            values = {**fallbacks, "image_dir": str(folder), "is_reg": is_reg, "num_repeats": int(repeats)}
            subsets.append(_subset({**values, "class_tokens": text.strip() or None}, f"{option} {folder}"))
    if others:
        findings.notice(where, f"left out, because the name does not begin with a number and _: {', '.join(others)}")
    if not subsets:
        remedy = f"images go in a folder such as {parent / '10_sks dog'}: repeats, _, and what they show"
        findings.problem("no folder is named like 10_sks dog", where=where, remedy=remedy)
    return subsets


def _subset(values: dict[str, Any], where: str) -> SubsetSettings:
    """A subset from all its levels."""
    extension = values["caption_extension"]
    image_dir, metadata_file = values.get("image_dir"), values.get("metadata_file")
    return SubsetSettings(
        where=where,
        image_dir=Path(image_dir) if image_dir else None,
        metadata_file=Path(metadata_file) if metadata_file else None,
        is_reg=values.get("is_reg", False),
        class_tokens=values.get("class_tokens"),
        num_repeats=values["num_repeats"],
        caption_extension=extension if extension.startswith(".") else f".{extension}",
        captions=CaptionSettings(**{key: values[key] for key in _CAPTION_KEYS if key in values}),
        color_aug=values["color_aug"],
        flip_aug=values["flip_aug"],
        random_crop=values["random_crop"],
        face_crop_aug_range=values.get("face_crop_aug_range"),
        resize_interpolation=values.get("resize_interpolation"),
        alpha_mask=values["alpha_mask"],
        custom_attributes=values.get("custom_attributes", {}),
    )


def _dataset(values: dict[str, Any], where: str, subsets: Iterable[SubsetSettings], findings: Findings) -> DatasetSettings:
    """A dataset from all its levels; subsets with 0 repeats are left out."""
    used = []
    for subset in subsets:
        if subset.num_repeats < 1:
            findings.notice(subset.where, "left out, because num_repeats is 0")
        else:
            used.append(subset)
    if "resolution" not in values and not any(
        (problem.where or "").startswith("--resolution") for problem in findings.problems
    ):
        remedy = "give --resolution, or resolution in the dataset file (512 for most SD 1.x models, 1024 for SDXL)"
        findings.problem("the resolution is missing", where=where, remedy=remedy)
    buckets = {target: values[key] for key, target in _BUCKET_KEYS.items() if key in values}
    return DatasetSettings(
        where=where,
        batch_size=values["batch_size"],
        buckets=BucketSettings(**{"resolution": (0, 0), **buckets}),
        subsets=tuple(used),
        resize_interpolation=values.get("resize_interpolation"),
    )


def _check_subset_kind(given: dict[str, Any], where: str, findings: Findings) -> None:
    """Keys of one kind of subset that another cannot use, and kinds that are not offered."""
    if "conditioning_data_dir" in given:
        remedy = "mark what counts in the images' alpha channel and set alpha_mask = true"
        findings.problem("conditioning_data_dir (masks, ControlNet) is not offered yet", where=where, remedy=remedy)
    elif "metadata_file" in given:
        for key in ("is_reg", "class_tokens", "caption_extension", "cache_info"):
            if key in given:
                findings.problem(f"{key} has no meaning beside metadata_file", where=where, remedy="take it out")
    elif "image_dir" not in given:
        findings.problem("'image_dir' is missing", where=where, remedy="name the folder of the images, or a metadata_file")
    if given.get("custom_attributes", {}).get("diff_output_preservation"):
        findings.problem("custom_attributes.diff_output_preservation is not offered", where=where, remedy="take it out")


def _note_idle_keys(values: dict[str, Any], where: str, findings: Findings) -> None:
    """Keys that are read and change nothing."""
    if values.get("network_multiplier", 1) != 1:
        findings.notice(where, "network_multiplier changes nothing in LoRA training (nor does it in sd-scripts)")
    if values.get("validation_split", 0) > 0:
        findings.problem("validation_split is not offered yet", where=where, remedy="take it out, or set it to 0")


def _without_doubles(subsets: list[SubsetSettings], findings: Findings) -> list[SubsetSettings]:
    """A folder or metadata file named twice in one dataset counts once."""
    kept: dict[tuple[Path | None, Path | None], SubsetSettings] = {}
    for subset in subsets:
        source = (subset.metadata_file, None if subset.metadata_file else subset.image_dir)
        if source == (None, None):
            continue
        if source in kept:
            findings.notice(subset.where, f"left out, because {kept[source].where} names the same images")
        else:
            kept[source] = subset
    return list(kept.values())


def _check_dataset(dataset: DatasetSettings, options: DatasetOptions, findings: Findings, size_multiple: int) -> None:
    """Folders that must be there, and settings that do not go together."""
    kinds = {subset.metadata_file is None for subset in dataset.subsets}
    if len(kinds) > 1:
        remedy = "put them in datasets of their own"
        findings.problem("subsets with and without metadata_file are mixed", where=dataset.where, remedy=remedy)
    for subset in dataset.subsets:
        if subset.image_dir is not None and not subset.image_dir.is_dir():
            findings.problem(f"image_dir {subset.image_dir}: no such folder", where=subset.where)
        if subset.metadata_file is not None and not subset.metadata_file.is_file():
            findings.problem(f"metadata_file {subset.metadata_file}: no such file", where=subset.where)
        changing = [key for key in ("color_aug", "random_crop", "face_crop_aug_range") if getattr(subset, key)]
        if changing and options.caches_latents:
            what = f"{' and '.join(changing)} cannot be used with cached latents, which never change"
            findings.problem(what, where=subset.where, remedy="drop one of the two")
        if subset.face_crop_aug_range and dataset.buckets.enabled:
            findings.notice(subset.where, "face_crop_aug_range changes nothing while enable_bucket is on")
    if dataset.subsets and not any(not subset.is_reg for subset in dataset.subsets):
        findings.problem("all images are regularisation images", where=dataset.where, remedy="add images to learn from")
    if dataset.buckets.resolution == (0, 0):
        return
    for problem in bucket_problems(dataset.buckets, size_multiple):
        findings.problem(problem.what, where=dataset.where, remedy=problem.remedy)
    _note_rounding(dataset.buckets, dataset.where, findings)


def _note_rounding(buckets: BucketSettings, where: str, findings: Findings) -> None:
    """Bucket limits that are no multiples of the step."""
    if buckets.enabled and not buckets.no_upscale and buckets.limits != (buckets.min_reso, buckets.max_reso):
        low, high = buckets.limits
        rounded = replace(buckets, min_reso=low, max_reso=high)
        what = f"bucket sides go from {rounded.min_reso} to {rounded.max_reso}, the multiples of {buckets.step}"
        findings.notice(where, f"{what} round min_bucket_reso {buckets.min_reso} and max_bucket_reso {buckets.max_reso}")
