"""Which module a `--network_module` name stands for. Importing this does not import torch."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

from library.errors import UserError, near_names
from networks.core.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from networks.building.third_party import ThirdPartyModule

NETWORK_MODULES: dict[str, str] = {
    entry.place.partition(":")[0]: entry.title for entry in ALGORITHMS.values() if entry.place.endswith(":ALGORITHM")
}
"""Our own modules and what they are, for sentences and help."""

_OPTION = "--network_module"


def resolve_network_module(name: str) -> str:
    """The dotted name to import: ours by any of its spellings (`network.lora`, `lora`), a third party's as it is.

    Nothing is imported, apart from the parent package of a third-party module.

    Raises:
        UserError: no name, or one that cannot be found, with the known ones.
    """
    if not name:
        raise UserError("not given", where=_OPTION, remedy=_known())
    for ours in NETWORK_MODULES:
        short = ours.removeprefix("networks.")
        if name in (ours, f"network.{short}", short):
            return ours
    if name.partition(".")[0] in ("network", "networks") or not _exists(name):
        remedy = near_names(name, NETWORK_MODULES) if "networks" in name else _known()
        raise UserError("no such module", where=f"{_OPTION} {name}", remedy=remedy)
    return name


def _known() -> str:
    return f"known are {', '.join(NETWORK_MODULES)}, and modules of other packages with the same interface"


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def load_network_module(name: str) -> ModuleType | ThirdPartyModule:
    """Import the module of a `--network_module` name; a third party's comes behind our interface.

    Raises:
        UserError: an unknown name, a module that does not import, or one without `create_network`.
    """
    resolved = resolve_network_module(name)
    where = f"{_OPTION} {name}"
    try:
        module = importlib.import_module(resolved)
    except ImportError as error:
        raise UserError(f"does not import ({error})", where=where, remedy="install what it needs") from error
    if not callable(getattr(module, "create_network", None)):
        raise UserError("is not a network module: it has no function create_network", where=where, remedy=_known())
    if resolved in NETWORK_MODULES:
        return module
    from networks.building.third_party import ThirdPartyModule

    return ThirdPartyModule(module, name)
