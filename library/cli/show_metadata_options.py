"""Options of tools/show_metadata.py, and the way from them to what the tool does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.cli.key_values import key_values
from library.cli.options import FLAG, Option, OptionGroup, ParsedOptions, parse
from library.errors import UserError, attempt, raise_all

SHOW_METADATA_OPTIONS = (
    OptionGroup(
        "view",
        (
            Option(name="model", type=Path, help="the file: a LoRA or a whole model"),
            Option(name="json", type=FLAG, help="print JSON instead of a table, with nothing shortened", extension=True),
            Option(name="compare", type=Path, help="another file: show what differs in texts and tensors", extension=True),
        ),
    ),
    OptionGroup(
        "edit",
        (
            Option(
                name="set",
                many=True,
                help="key=value, several: set fields; those of ModelSpec go by name (author, title, license, tags, ...),"
                " a thumbnail may be an image file",
                extension=True,
            ),
            Option(name="remove", many=True, help="keys to take out; ss_* takes all that begin so", extension=True),
            Option(
                name="strip_private",
                type=FLAG,
                help="take out tag frequencies, names of folders, paths, comments, times and session",
                extension=True,
            ),
            Option(name="save_to", type=Path, help="write the edited file here instead of in place", extension=True),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class MetadataOptions:
    """One call of the tool.

    Attributes:
        compare: the file to compare with; None for none.
        fields: to set, by the names that the user gave.
        remove: names and patterns.
        target: where an edited file goes; None for in place.
    """

    path: Path
    as_json: bool
    compare: Path | None
    fields: Mapping[str, str]
    remove: tuple[str, ...]
    strip_private: bool
    target: Path | None

    @property
    def edits(self) -> bool:
        return bool(self.fields or self.remove or self.strip_private)


def parse_metadata_options(argv: Sequence[str], *, description: str) -> MetadataOptions:
    """What a command line asks for.

    Raises:
        UserError: all that is wrong with it.
    """
    given = parse(_joined(argv), SHOW_METADATA_OPTIONS, description=description)
    problems: list[UserError] = []
    options = MetadataOptions(
        path=given["model"] or Path(),
        as_json=given["json"],
        compare=given["compare"],
        fields=attempt(lambda: key_values(given["set"], "--set"), problems) or {},
        remove=given["remove"] or (),
        strip_private=given["strip_private"],
        target=given["save_to"],
    )
    _check(options, given, problems)
    raise_all(problems)
    return options


def _joined(argv: Sequence[str]) -> list[str]:
    """Several `--set a=1 --set b=2` as one, since the parser would keep the last only."""
    collected: dict[str, list[str]] = {"--set": [], "--remove": []}
    rest: list[str] = []
    current: list[str] = rest
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument in collected:
            current = collected[argument]
        elif name in collected and equals:
            collected[name].append(value)
            current = rest
        elif argument.startswith("--"):
            current = rest
            rest.append(argument)
        else:
            current.append(argument)
    return rest + [part for name, values in collected.items() if values for part in (name, *values)]


def _check(options: MetadataOptions, given: ParsedOptions, problems: list[UserError]) -> None:
    if given["model"] is None:
        problems.append(UserError("name the file", where="--model"))
    if options.compare and options.edits:
        problems.append(
            UserError("compares and edits exclude each other", where="--compare", remedy="do one after the other")
        )
    if options.target is None:
        return
    where = f"--save_to {options.target}"
    if not options.edits:
        problems.append(UserError("nothing is edited", where=where, remedy="add --set, --remove or --strip_private"))
    if options.target.suffix != ".safetensors":
        problems.append(UserError("only .safetensors files hold metadata", where=where, remedy="end the name so"))
    if options.target.exists() and options.path.exists() and options.target.samefile(options.path):
        problems.append(UserError("is the file itself", where=where, remedy="leave --save_to out to edit in place"))
