"""The report of a weight tool, in full, as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from library.checkpoints.atomic import atomic_write


def write_report(path: Path | None, content: Mapping[str, object]) -> None:
    """Write a report where one is wanted.

    Raises:
        UserError: a place that cannot be written to.
    """
    if path is not None:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
