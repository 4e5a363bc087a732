"""Reading TOML, with mistakes as sentences that name the file and the line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from library.errors import UserError


def read_toml(path: Path, *, where: str) -> dict[str, Any]:
    """The content of a TOML file.

    Args:
        where: how a sentence names the file, usually the option it came with.

    Raises:
        UserError: missing, not UTF-8, or not TOML (with line and column).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", where=where) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as text ({error})", where=where) from None
    return parse_toml(text, where=where)


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The content of a TOML text; see `read_toml`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"is not valid TOML: {error}", where=where) from None
