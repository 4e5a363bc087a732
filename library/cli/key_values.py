"""Items written as key=value, as --network_args, --optimizer_args and --lr_scheduler_args take them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from library.errors import UserError


def key_values(items: Sequence[str] | None, where: str) -> dict[str, str]:
    """["conv_dim=4", "conv_alpha=1"] as a mapping.

    Raises:
        UserError: an item without "=", or a key given twice.
    """
    pairs: dict[str, str] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{item!r} is not key=value", where=where)
        if key.strip() in pairs:
            raise UserError(f"{key.strip()!r} is given twice", where=where, remedy="keep one of them")
        pairs[key.strip()] = value.strip()
    return pairs


def key_literals(items: Sequence[str] | None, where: str) -> dict[str, Any]:
    """The same with values as Python literals: 0.01, True, (0.9, 0.999), 'text'; nothing is evaluated.

    Raises:
        UserError: a value that is none.
    """
    values: dict[str, Any] = {}
    for key, text in key_values(items, where).items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            remedy = f"write numbers as 0.01, switches as True, texts in quotes ({key}='{text}')"
            raise UserError(f"{key}={text} is no Python literal", where=where, remedy=remedy) from None
    return values
