"""Options of networks/extract_lora_from_models.py, and the way from them to what the tool does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.cli.options import FLAG, Option, OptionGroup, ParsedOptions, parse
from library.cli.weight_tools import (
    PRECISIONS,
    REPORT_OPTIONS,
    checked_device,
    missing_problems,
    place_problems,
    rank_problems,
    report_places,
    suffix_problems,
)
from library.errors import UserError, raise_all
from library.families.detect import FAMILY_FLAGS

if TYPE_CHECKING:
    from networks.tools.extraction import Extraction
    from networks.tools.reports import ReportPlaces

_AIMS = ("rank_error", "rank_share", "rank_threshold")

EXTRACT_LORA_OPTIONS = (
    OptionGroup(
        "models",
        (
            Option(name="model_org", help="the base model: checkpoint, diffusers folder or Hub id"),
            Option(name="model_tuned", help="the tuned model: likewise, of any layout"),
            *(
                Option(name=flag, type=FLAG, help=f"say that both are {family.title}; an error where they are not")
                for flag, family in FAMILY_FLAGS.items()
            ),
            Option(
                name="v_parameterization", type=FLAG, help="say that they predict v; an error where a model says otherwise"
            ),
            Option(
                name="load_precision", choices=tuple(PRECISIONS), help="type that both models are rounded to before all else"
            ),
            Option(name="load_original_model_to", help="no effect: layers are read one at a time"),
            Option(name="load_tuned_model_to", help="no effect: layers are read one at a time"),
        ),
    ),
    OptionGroup(
        "LoRA",
        (
            Option(name="save_to", type=Path, help="file to write; its suffix decides the format"),
            Option(name="dim", type=int, default=4, help="rank; with a rank_* option and if given, the highest rank"),
            Option(
                name="conv_dim",
                type=int,
                help="rank of 3x3 convolutions, which get LoRA with it alone (and residual blocks' other layers then dim)",
            ),
            Option(
                name="rank_error",
                type=float,
                help="give each layer the lowest rank with at most this relative error (0 to 1)",
                extension=True,
            ),
            Option(
                name="rank_share",
                type=float,
                help="give each layer the lowest rank that holds this share (0 to 1) of its squared change",
                extension=True,
            ),
            Option(
                name="rank_threshold",
                type=float,
                help="give each layer as many ranks as its change has singular values above this",
                extension=True,
            ),
            Option(
                name="clamp_quantile",
                type=float,
                default=1.0,
                help="clamp factors at this quantile of their absolute values, as sd-scripts does at 0.99; that makes the "
                "result less exact, and 1 leaves it out",
            ),
            Option(
                name="min_diff",
                type=float,
                default=0.01,
                help="leave the text encoders out where none of their layers' weights differs by more than this",
            ),
            Option(
                name="store_rest",
                type=FLAG,
                help="store what LoRA does not hold (norms, biases, conv_in, conv_out, ...) as differences",
                extension=True,
            ),
            Option(name="save_precision", choices=tuple(PRECISIONS), help="type of the saved tensors; float if not given"),
            Option(
                name="no_metadata", type=FLAG, help="write no modelspec.* entries; what readers need is written all the same"
            ),
        ),
    ),
    OptionGroup(
        "work and reports",
        (
            Option(name="device", help="where to compute: cpu, cuda, cuda:1; the CPU if not given"),
            *REPORT_OPTIONS,
        ),
    ),
)


def parse_extraction(argv: Sequence[str], *, description: str) -> tuple[Extraction, ReportPlaces]:
    """What a command line asks for, and where it is told of.

    Raises:
        UserError: all that is wrong with it.
    """
    given = parse(argv, EXTRACT_LORA_OPTIONS, description=description)
    wanted = {"model_org": "the base model", "model_tuned": "the tuned model", "save_to": "a name for the file to write"}
    problems = [*missing_problems(given, wanted), *suffix_problems(given), *_contradictions(given)]
    raise_all([*problems, *place_problems(given, ("model_org", "model_tuned"))])
    from networks.tools.extraction import Extraction
    from networks.tools.rank_choice import RankRule

    share, error = given["rank_share"], given["rank_error"]
    aim = {"error": math.sqrt(1 - share) if share is not None else error, "threshold": given["rank_threshold"]}
    has_aim = any(value is not None for value in aim.values())
    rules = {"dim": RankRule(most=given["dim"] if given.given("dim") or not has_aim else None, **aim)}
    if given["conv_dim"] is not None:
        rules["conv_dim"] = RankRule(most=given["conv_dim"], **aim)
    extraction = Extraction(
        base=given["model_org"],
        tuned=given["model_tuned"],
        target=given["save_to"],
        rules=rules,
        alpha=float(given["dim"]),
        clamp_quantile=given["clamp_quantile"],
        min_diff=given["min_diff"],
        device=checked_device(given["device"]),
        rounded_to=given["load_precision"],
        precision=given["save_precision"] or "float",
        said=next((family for flag, family in FAMILY_FLAGS.items() if given[flag]), None),
        v_parameterization=True if given["v_parameterization"] else None,
        with_modelspec=not given["no_metadata"],
        store_rest=given["store_rest"],
    )
    return extraction, report_places(given)


def _contradictions(given: ParsedOptions) -> list[UserError]:
    problems = rank_problems(given, "dim", "conv_dim")
    said = [f"--{flag}" for flag in FAMILY_FLAGS if given[flag]]
    if len(said) > 1:
        problems.append(UserError("exclude each other", where=" and ".join(said), remedy="leave them out: models say it"))
    if not 0 < given["clamp_quantile"] <= 1:
        problems.append(UserError("is not above 0 and at most 1", where=given.where("clamp_quantile")))
    for name in ("min_diff", "rank_threshold"):
        if given[name] is not None and given[name] < 0:
            problems.append(UserError("is below 0", where=given.where(name)))
    for name in ("rank_error", "rank_share"):
        if given[name] is not None and not 0 < given[name] < 1:
            problems.append(UserError("is not between 0 and 1", where=given.where(name)))
    aims = [name for name in _AIMS if given[name] is not None]
    if len(aims) > 1:
        where = " with ".join(f"--{name}" for name in aims)
        problems.append(UserError("each decides on the ranks alone", where=where, remedy="give one of them"))
    return problems
