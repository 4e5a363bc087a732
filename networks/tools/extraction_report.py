"""What an extraction tells: lines for the screen, the whole of it for a JSON file, and a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from library.checkpoints.parts import PART_TITLES
from library.errors import counted, some_names
from networks.tools.extraction import PLACE_TITLES, Extracted, Measured, title_of_place
from networks.tools.layer_errors import Kept, approximation_panels
from networks.tools.plotting import Panel
from networks.tools.reports import ToolReport

_SHOWN = 3  # layers that a sentence names
_WIDE = 2 + max(map(len, PLACE_TITLES))


def relative(measured: Iterable[Measured]) -> float:
    """||difference - what the file holds of it|| / ||difference||."""
    return _ratio([(one.lost, one.change) for one in measured])


def _ratio(sums: list[tuple[float, float]]) -> float:
    whole = sum(change for _, change in sums)
    return math.sqrt(sum(lost for lost, _ in sums) / whole) if whole else 0.0


def report_of(found: Extracted) -> ToolReport:
    """What an extraction tells."""
    return ToolReport(lines=_lines(found), content=lambda: _content(found), panels=lambda: _panels(found))


def _lines(found: Extracted) -> list[str]:
    """Notes of the models, a table of the parts, what LoRA does not hold, what the file is, and who reads it rightly."""
    everything = sum(one.change for one in (*found.layers.values(), *found.rest))
    rows: dict[str, list[Measured]] = {}
    for measured in found.layers.values():
        rows.setdefault(title_of_place(measured), []).append(measured)
    rows = {title: rows[title] for title in sorted(rows, key=PLACE_TITLES.index)} | {"total": list(found.layers.values())}
    told = list(dict.fromkeys(note for model in found.models for note in model.notes()))
    told += [f"{'part':{_WIDE}}{'layers':>7}  {'ranks':14}{'share of the change':>20}{'relative error':>16}"]
    told += [_row(title, measured, everything) for title, measured in rows.items()]
    told += _rest_lines(found, everything)
    told += _notes(found)
    base, tuned = found.models
    told.append(
        f"{found.options.target}: {base.family.title}, {counted(len(found.layers), 'layer')} of {tuned.name} - {base.name}; "
        f"opened again and compared"
    )
    return [*told, found.reader_line]


def _row(title: str, measured: list[Measured], everything: float) -> str:
    ranks = Counter(one.rank for one in measured)
    shown = f"{min(ranks, default=0)} to {max(ranks, default=0)}" if len(ranks) > 1 else f"{max(ranks, default=0)}"
    share = sum(one.change for one in measured) / everything if everything else 0.0
    return f"{title:{_WIDE}}{len(measured):7}  {shown:14}{share:20.2%}{relative(measured):16.3g}"


def _rest_lines(found: Extracted, everything: float) -> list[str]:
    kinds: dict[str, list[Measured]] = {}
    for measured in found.rest:
        if measured.change:
            kinds.setdefault(f"{PART_TITLES[measured.pair.part]}: {measured.pair.kind}", []).append(measured)
    told = ["outside LoRA's reach, with its share of the squared change:"] if kinds else []
    for title, group in kinds.items():
        stored = sum((one.pair.part, one.pair.name) in found.stored for one in group)
        what = "stored as differences" if stored == len(group) else f"{stored} stored" if stored else "left out"
        share = sum(one.change for one in group) / everything
        told.append(f"  {title:48}{counted(len(group), 'tensor'):>12}{share:9.2%}  {what}")
    left = [one for one in found.rest if one.change and (one.pair.part, one.pair.name) not in found.stored]
    if left and not found.options.store_rest:
        told.append("  (--store_rest stores them; --conv_dim makes LoRA of residual blocks and resampling)")
    return told


def _notes(found: Extracted) -> list[str]:
    options, told = found.options, []
    if found.text_difference is not None:
        how = "is the same in both models" if not found.text_difference else "is left out: "
        if found.text_difference:
            how += f"no weight differs by more than {found.text_difference:.2g} (--min_diff {options.min_diff:g})"
        told.append(f"text encoder {how}")
    if found.equal:
        told.append(f"{counted(len(found.equal), 'layer')} the same in both models: {some_names(found.equal, _SHOWN)}")
    if found.vae_differs:
        told.append("the VAE is another one too, which no adapter holds: use that of the tuned model")
    if options.clamp_quantile < 1:
        without = _ratio([(one.unclamped, one.change) for one in found.layers.values()])
        now = relative(found.layers.values())
        quantile = f"{options.clamp_quantile:g}"
        told.append(f"clamping at the quantile {quantile} costs: relative error {now:.3g} instead of {without:.3g}")
    return told


def _content(found: Extracted) -> dict[str, object]:
    """All of it, for a JSON file."""
    options, (base, tuned) = found.options, found.models
    return {
        "base": str(base.path),
        "tuned": str(tuned.path),
        "file": str(options.target),
        "family": base.family.title,
        "relative_error": relative(found.layers.values()),
        "text_encoder_left_out_at": found.text_difference,
        "layers": {
            name: {
                "part": one.pair.part,
                "shape": list(one.pair.shape),
                "rank": one.rank,
                "relative_error": relative([one]),
                "relative_error_without_clamping": _ratio([(one.unclamped, one.change)]),
                "norm_of_change": math.sqrt(one.change),
                "singular_values": list(one.values),
            }
            for name, one in found.layers.items()
        },
        "vae_differs": found.vae_differs,
        "equal_layers": found.equal,
        "rest": [
            {
                "part": one.pair.part,
                "tensor": one.pair.name,
                "kind": one.pair.kind,
                "norm_of_change": math.sqrt(one.change),
                "stored": (one.pair.part, one.pair.name) in found.stored,
            }
            for one in found.rest
        ],
        "readers": found.reader_line,
    }


def _panels(found: Extracted) -> list[Panel]:
    spectra = {name: one.values for name, one in found.layers.items()}
    kept = {
        name: Kept(rank=one.rank, lost=math.sqrt(one.lost), had=math.sqrt(one.change)) for name, one in found.layers.items()
    }
    return approximation_panels(kept, spectra, found.models[0].family)
