"""What lies in the folders: images, their sizes from headers alone, their captions. Nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from library.dataset.buckets import Size
from library.dataset.captions import join_caption_and_tags
from library.dataset.images import BadImageError, Header, image_extensions, read_header
from library.dataset.metadata_files import ImageFinder, MetadataEntry, read_metadata
from library.dataset.options import DEFAULT_CAPTION_EXTENSION, SubsetSettings
from library.dataset.sources import Findings
from library.errors import UserError, attempt, some_names

READERS = 16  # threads; reading headers waits for the disk most of the time
OTHER_CAPTION_EXTENSIONS = (".txt", ".caption", ".cap")
UNREAD_EXTENSIONS = (".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".avif", ".jxl", ".psd", ".svg", ".jp2")
_USUAL_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
}


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image of a subset: (width, height) as viewers show it, and its caption before any processing.

    `tags` is what counts for the tag frequency in the saved file: the whole caption, in fine-tuning datasets the tags alone.
    """

    path: Path
    size: Size
    caption: str
    tags: str


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that cannot be used, and why ("is not an image")."""

    path: Path
    reason: str


@dataclass(frozen=True)
class SubsetScan:
    """What one subset holds, sorted by name (folders) or in the order of the metadata file."""

    images: tuple[FoundImage, ...]
    bad_images: tuple[BadImage, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An image file before it is opened, and where its caption is to come from."""

    path: Path
    caption_file: Path | None
    entry: MetadataEntry | None = None


def scan_subsets(subsets: Sequence[SubsetSettings], findings: Findings) -> list[SubsetScan]:
    """Every subset's images; mistakes and remarks go to `findings`."""
    with ThreadPoolExecutor(READERS) as pool:
        return [
            _scan_folder(subset, pool, findings) if subset.metadata_file is None else _scan_metadata(subset, pool, findings)
            for subset in subsets
        ]


def _scan_folder(subset: SubsetSettings, pool: Executor, findings: Findings) -> SubsetScan:
    """A DreamBooth subset: the images of one folder, not of its subfolders."""
    folder = subset.image_dir
    assert folder is not None
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    extensions = image_extensions()
    image_names = [name for name in names if os.path.splitext(name)[1].lower() in extensions]
    if not image_names:
        _report_empty_folder(subset, folder, extensions, findings)
        return SubsetScan(())
    unread = [name for name in names if os.path.splitext(name)[1].lower() in set(UNREAD_EXTENSIONS) - set(extensions)]
    if unread:
        findings.notice(subset.where, f"not read, because of their kind: {some_names(unread)}")
    files = set(names)
    extension = _caption_extension(subset, image_names, files, findings)
    candidates = [_Candidate(folder / name, _caption_file(folder, name, extension, files)) for name in image_names]
    uncaptioned = [candidate.path.name for candidate in candidates if candidate.caption_file is None]
    if uncaptioned and subset.class_tokens is None:
        others = [
            other for other in OTHER_CAPTION_EXTENSIONS if other != extension and _any_caption(image_names, other, files)
        ]
        hint = f" (there are {' and '.join(others)} files; caption_extension?)" if others else ""
        findings.notice(subset.where, f"no {extension} file, so an empty caption{hint}: {some_names(uncaptioned)}")
    elif uncaptioned:
        what = f"no {extension} file, so the caption is {subset.class_tokens!r}: {some_names(uncaptioned)}"
        findings.notice(subset.where, what)
    return _open_all(subset, candidates, pool, findings)


def _scan_metadata(subset: SubsetSettings, pool: Executor, findings: Findings) -> SubsetScan:
    """A fine-tuning subset: the images that its metadata file names."""
    metadata_file = subset.metadata_file
    assert metadata_file is not None
    entries = attempt(lambda: read_metadata(metadata_file), findings.problems)
    if entries is None:
        return SubsetScan(())
    if not entries:
        findings.problem(f"metadata_file {metadata_file} names no images", where=subset.where)
    finder = ImageFinder(subset.image_dir or metadata_file.parent, image_extensions())
    candidates: dict[Path, _Candidate] = {}
    missing = []
    for entry in entries:
        try:
            path = finder.find(entry.key)
        except LookupError as error:
            missing.append(BadImage(Path(entry.key), str(error)))
            continue
        if path in candidates:
            findings.problem(f"{path} is named twice", where=f"{metadata_file}: entry {entry.key!r}")
        candidates[path] = _Candidate(path, None, entry)
    uncaptioned = [entry.key for entry in entries if not (entry.caption.strip() or entry.tags.strip())]
    if uncaptioned:
        findings.notice(subset.where, f"neither caption nor tags, so an empty caption: {some_names(uncaptioned)}")
    scan = _open_all(subset, list(candidates.values()), pool, findings)
    return SubsetScan(scan.images, (*missing, *scan.bad_images))


def _open_all(subset: SubsetSettings, candidates: list[_Candidate], pool: Executor, findings: Findings) -> SubsetScan:
    """Read all headers and captions, in threads."""
    images, bad_images, mistyped, empty, long = [], [], [], [], []
    for candidate, (header, caption) in zip(candidates, pool.map(_read(subset), candidates), strict=True):
        name = candidate.path.name
        if isinstance(caption, UserError):
            findings.problems.append(caption)
            continue
        if isinstance(header, BadImage):
            bad_images.append(header)
            continue
        if candidate.path.suffix.lower() not in _USUAL_EXTENSIONS.get(header.format, (candidate.path.suffix.lower(),)):
            mistyped.append(f"{name} ({header.format})")
        if candidate.caption_file is not None and not caption:
            empty.append(name)
        if candidate.caption_file is not None and "\n" in caption and not subset.captions.enable_wildcard:
            long.append(name)
        tags = caption if candidate.entry is None else candidate.entry.tags
        images.append(FoundImage(candidate.path, header.size, caption, tags))
    remarks = {
        "read by their content, which their names do not fit": mistyped,
        "the caption file is empty": empty,
        "only the first line of the caption is used (enable_wildcard uses all)": long,
    }
    for what, names in remarks.items():
        if names:
            findings.notice(subset.where, f"{what}: {some_names(names)}")
    return SubsetScan(tuple(images), tuple(bad_images))


def _read(subset: SubsetSettings) -> Callable[[_Candidate], tuple[Header | BadImage, str | UserError]]:
    """What a thread does for one image: header and caption, or what is wrong with each."""

    def read(candidate: _Candidate) -> tuple[Header | BadImage, str | UserError]:
        header: Header | BadImage
        try:
            header = read_header(candidate.path)
        except BadImageError as error:
            header = BadImage(candidate.path, str(error))
        if candidate.entry is not None:
            entry = candidate.entry
            return header, join_caption_and_tags(entry.caption, entry.tags, subset.captions.caption_separator)
        if candidate.caption_file is None:
            return header, subset.class_tokens or ""
        try:
            return header, read_caption(candidate.caption_file)
        except UserError as error:
            return header, error

    return read


def read_caption(path: Path) -> str:
    """The lines of a caption file that hold something.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors on Windows put a mark in front, which is not part of the text
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", where=str(path), remedy="save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _caption_extension(subset: SubsetSettings, image_names: list[str], files: set[str], findings: Findings) -> str:
    """The subset's extension; where the default finds nothing at all and .txt files lie there, .txt."""
    wanted = subset.caption_extension
    if wanted != DEFAULT_CAPTION_EXTENSION or _any_caption(image_names, wanted, files):
        return wanted
    if not _any_caption(image_names, ".txt", files):
        return wanted
    findings.notice(
        subset.where,
        'captions are read from the .txt files, as there are no .caption files (say caption_extension = ".txt")',
    )
    return ".txt"


def _any_caption(image_names: list[str], extension: str, files: set[str]) -> bool:
    return any(_caption_name(name, extension, files) is not None for name in image_names)


def _caption_file(folder: Path, image_name: str, extension: str, files: set[str]) -> Path | None:
    name = _caption_name(image_name, extension, files)
    return None if name is None else folder / name


def _caption_name(image_name: str, extension: str, files: set[str]) -> str | None:
    """The caption file of an image: its stem, or its stem without the four numbers of a face-crop name."""
    stem = os.path.splitext(image_name)[0]
    for candidate in (stem + extension, "_".join(stem.split("_")[:-4]) + extension):
        if candidate in files and candidate != extension:
            return candidate
    return None


def _report_empty_folder(subset: SubsetSettings, folder: Path, extensions: Sequence[str], findings: Findings) -> None:
    """A folder without images is a mistake; the most frequent reason is that they lie one level down."""
    below = [
        child.name
        for child in sorted(folder.iterdir())
        if child.is_dir() and any(file.suffix.lower() in extensions for file in child.iterdir())
    ]
    remedy = f"name its subfolders, which have some: {some_names(below)}" if below else f"read are {', '.join(extensions)}"
    findings.problem(f"no images in {folder}", where=subset.where, remedy=remedy)
