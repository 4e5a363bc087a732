#!/usr/bin/env python3
"""Show, edit, clean and compare the metadata of LoRA files and checkpoints.

    python tools/show_metadata.py --model lora.safetensors
    python tools/show_metadata.py --model lora.safetensors --set author=me "title=My cat" --remove ss_training_comment
    python tools/show_metadata.py --model lora.safetensors --strip_private --save_to clean.safetensors
    python tools/show_metadata.py --model lora.safetensors --compare other.safetensors

An edit changes the header only; the tensors are copied as they are and compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.show_metadata_options import MetadataOptions, parse_metadata_options
from library.errors import UserError, counted

if TYPE_CHECKING:
    from library.checkpoints.tensor_places import TensorFile


def work(argv: Sequence[str]) -> int:
    options = parse_metadata_options(argv, description=__doc__ or "")
    from library.checkpoints.metadata_view import comparison, comparison_lines, decoded, view_lines
    from library.checkpoints.tensor_files import open_tensor_file

    file = open_tensor_file(options.path)
    if options.edits:
        edit(file, options)
    elif options.compare is not None:
        other = open_tensor_file(options.compare)
        found = comparison(file, other)
        print(json.dumps(found, indent=4) if options.as_json else "\n".join(comparison_lines(file, other, found)))
    elif options.as_json:
        print(json.dumps(decoded(file.metadata), indent=4, ensure_ascii=False))
    else:
        print("\n".join(view_lines(file)))
    return 0


def edit(file: TensorFile, options: MetadataOptions) -> None:
    """Write the edited file and say what became of it."""
    from library.checkpoints.metadata_editing import changes, with_fields, without_fields, without_private, write_metadata
    from library.checkpoints.metadata_view import is_safetensors, shown

    if not is_safetensors(file):
        raise UserError("only .safetensors files hold metadata", where=str(file.path), remedy="convert it first")
    metadata = without_fields(file.metadata, options.remove, where="--remove")
    metadata = without_private(metadata) if options.strip_private else metadata
    metadata = with_fields(metadata, _with_thumbnail(options.fields), where="--set")
    target = options.target or file.path
    edited = changes(file.metadata, metadata)
    if not edited and options.target is None:
        print(f"{target}: all is so already")
        return
    hashed = write_metadata(file, metadata, target)
    for change in edited:
        sign = "+" if change.before is None else "-" if change.after is None else "~"
        value = " / ".join(shown(change.key, change.after)) if change.after is not None else ""
        print(f"{sign} {change.key} {value}".rstrip())
    print(f"{target}: {counted(len(edited), 'field')} changed; the tensors are the same (SHA-256 {hashed})")


def _with_thumbnail(fields: Mapping[str, str]) -> dict[str, str]:
    from library.training.metadata import thumbnail_url

    pictures = {name: value for name, value in fields.items() if name in ("thumbnail", "modelspec.thumbnail")}
    return {**fields, **{name: thumbnail_url(value, where=f"--set {name}={value}") for name, value in pictures.items()}}


if __name__ == "__main__":
    sys.exit(run_door("show_metadata", work))
