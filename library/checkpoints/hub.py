"""From what the user writes to a path: something local, or else a model of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from library.checkpoints.tensor_files import nearby_files
from library.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".zip", ".json", ".toml")
_SMALL_FILES = ("model_index.json", "*/*.json", "*/*.txt", "config.json")


def resolve_model_path(given: Path | str) -> Path:
    """The existing path that `given` names. The network is used only for ids ("owner/name") that no local path explains.

    Raises:
        UserError: for a local path that does not exist (with near names), and for a model that cannot be fetched.
    """
    path = Path(os.path.expanduser(given))
    if path.exists():
        return path
    if not _looks_like_hub_id(str(given)):
        raise UserError("no such file or folder", where=str(given), remedy=nearby_files(path))
    return _fetch(str(given))


def _looks_like_hub_id(text: str) -> bool:
    if not _HUB_ID.fullmatch(text) or text.lower().endswith(_FILE_SUFFIXES):
        return False
    owner, slash, _ = text.partition("/")
    return not (slash and Path(owner).is_dir())  # "models/missing" beside a folder "models" is a mistyped path


def _fetch(hub_id: str) -> Path:
    """Download a model folder, or find it in the Hub's cache; weights as safetensors where there are any."""
    from huggingface_hub import snapshot_download

    try:
        for suffix in ("safetensors", "bin"):
            patterns = [*_SMALL_FILES, f"*/*model.{suffix}", f"*model.{suffix}"]
            folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
            if any(folder.rglob(f"*.{suffix}")):
                return folder
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no such file or folder, and it could not be fetched from the Hugging Face Hub ({reason})",
            where=hub_id,
            remedy="check the spelling, or give the path of a file or folder",
        ) from None
    raise UserError("that model of the Hugging Face Hub has no weights in diffusers' layout", where=hub_id)
