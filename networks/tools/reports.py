"""What every weight tool tells of its work: lines for the screen, all of it for a JSON file, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.atomic import atomic_write
from networks.tools.plotting import Panel, draw_panels


@dataclass(frozen=True, kw_only=True)
class ToolReport:
    """The result of a run. What only files show is made when it is asked for.

    Attributes:
        lines: a table, what there is to say, and a last line about the file that was written.
        content: of the JSON file.
        panels: of the picture, from left to right.
    """

    lines: Sequence[str]
    content: Callable[[], Mapping[str, object]]
    panels: Callable[[], Sequence[Panel]]


@dataclass(frozen=True, kw_only=True)
class ReportPlaces:
    """Where a run is told of beside the screen; None for nowhere.

    Attributes:
        report: JSON file.
        plot: PNG file.
    """

    report: Path | None = None
    plot: Path | None = None


def write_reports(told: ToolReport, places: ReportPlaces) -> None:
    """Write the files that are wanted.

    Raises:
        UserError: a place that cannot be written to.
    """
    if places.report is not None:
        with atomic_write(places.report) as file:
            file.write((json.dumps(told.content(), indent=1) + "\n").encode())
    if places.plot is not None:
        draw_panels(places.plot, told.panels())
