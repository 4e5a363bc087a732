"""Reading text, TOML and JSON, with mistakes as sentences that name the file and the place in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from library.errors import UserError


def read_text(path: Path, *, where: str) -> str:
    """The content of a UTF-8 file, without the mark that editors on Windows put in front.

    Args:
        where: how a sentence names the file, usually the option it came with.

    Raises:
        UserError: missing, not readable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", where=where) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as text ({error})", where=where) from None


def read_toml(path: Path, *, where: str) -> dict[str, Any]:
    """The content of a TOML file; see `read_text`.

    Raises:
        UserError: also for what is not TOML, with line and column.
    """
    import tomllib

    try:
        return tomllib.loads(read_text(path, where=where))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"is not valid TOML: {error}", where=where) from None


def read_json(path: Path, *, where: str) -> Any:
    """The content of a JSON file; see `read_text`.

    Raises:
        UserError: also for what is not JSON, with line and column.
    """
    try:
        return json.loads(read_text(path, where=where))
    except json.JSONDecodeError as error:
        place = f"at line {error.lineno}, column {error.colno}"
        raise UserError(f"is not valid JSON: {error.msg} ({place})", where=where) from None


def read_json_object(path: Path, *, where: str) -> dict[str, Any]:
    """The content of a JSON file that holds one object, such as a configuration."""
    content = read_json(path, where=where)
    if not isinstance(content, dict):
        raise UserError("does not hold a JSON object", where=where)
    return content
