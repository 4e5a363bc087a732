"""Prompts with another first tag: what `<lora:name:0.8>` says, said otherwise, and all other text as it is."""

from __future__ import annotations

import re
from pathlib import PurePath

from library.errors import UserError
from library.prompts.lora_tags import ARGUMENTS, KINDS, SUFFIXES, TAG, read_tags

_STRENGTHS = ("te", "unet", "in", "mid", "out")


def first_tag(prompt: str) -> str | None:
    """The first tag of an adapter as it is written; None where there is none."""
    found = _find(prompt)
    return found[0] if found else None


def with_adapter(prompt: str, name: str | None, *, where: str) -> str:
    """With this adapter in the place of that of the first tag, at the same strength; without a tag, one more at its end.

    Args:
        name: the adapter; None takes the first tag out.
        where: names the adapter in a sentence.

    Raises:
        UserError: a name that no tag can hold.
    """
    found = _find(prompt)
    if name is None:
        return prompt if found is None else prompt[: found.start()] + prompt[found.end() :]
    tag = f"<lora:{name}:1>" if found is None else _written(found[1], name, *_pieces(found)[1:])
    try:
        _, read = read_tags(tag, where=where)
    except UserError:
        read = ()
    if [each.name for each in read] != [name.strip()]:
        raise UserError("cannot stand in a tag", where=where, remedy="rename the file: without < > : and =")
    return f"{prompt} {tag}" if found is None else prompt[: found.start()] + tag + prompt[found.end() :]


def with_bare_names(prompt: str) -> str:
    """With the names of files in tags as web UIs know them: without folder and suffix."""

    def bare(found: re.Match[str]) -> str:
        if found[1] not in KINDS or not found[3]:
            return found[0]
        name, *rest = found[2].split(":")
        path = PurePath(name.strip())
        return f"<{':'.join([found[1], path.stem if path.suffix in SUFFIXES else path.name, *rest])}>"

    return TAG.sub(bare, prompt)


def without_adapters(prompt: str) -> str:
    """Without any tag of an adapter."""
    while (found := _find(prompt)) is not None:
        prompt = prompt[: found.start()] + prompt[found.end() :]
    return prompt


def with_strength(prompt: str, strength: float) -> str:
    """With the first tag at one strength everywhere; its block weights and its steps stay."""
    found = _find(prompt)
    if found is None:
        return prompt
    name, numbers, arguments = _pieces(found)
    kept = {key: value for key, value in arguments.items() if key not in _STRENGTHS}
    if len(numbers) > 2:  # A1111's third number
        kept.setdefault("dyn", numbers[2])
    return prompt[: found.start()] + _written(found[1], name, [f"{strength:g}"], kept) + prompt[found.end() :]


def with_argument(prompt: str, key: str, value: str) -> str:
    """With an argument of the first tag set.

    Args:
        key: a name of `lora_tags.ARGUMENTS` that says nothing of strengths.
    """
    found = _find(prompt)
    if found is None:
        return prompt
    name, numbers, arguments = _pieces(found)
    if key == "dyn":
        numbers = numbers[:2]
    return prompt[: found.start()] + _written(found[1], name, numbers, {**arguments, key: value}) + prompt[found.end() :]


def _find(prompt: str) -> re.Match[str] | None:
    return next((found for found in TAG.finditer(prompt) if found[1] in KINDS and found[3]), None)


def _pieces(found: re.Match[str]) -> tuple[str, list[str], dict[str, str]]:
    """Name, numbers, and argument -> value, all as written."""
    name, *pieces = found[2].split(":")
    parted = [(piece, *piece.partition("=")) for piece in pieces]
    numbers = [piece for piece, _, sign, _ in parted if not sign]
    return name, numbers, {key.strip(): value for _, key, sign, value in parted if sign and key.strip() in ARGUMENTS}


def _written(kind: str, name: str, numbers: list[str], arguments: dict[str, str]) -> str:
    return f"<{':'.join([kind, name, *numbers, *(f'{key}={value}' for key, value in arguments.items())])}>"
