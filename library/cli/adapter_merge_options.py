"""Options of networks/merge_lora.py and networks/svd_merge_lora.py, and the way from them to what the tools do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from library.errors import UserError, attempt, counted, raise_all

if TYPE_CHECKING:
    from networks.tools.adapter_merging import AdapterMerge, RankLimit
    from networks.tools.checkpoint_merging import CheckpointMerge
    from networks.tools.dense_merging import Method
    from networks.tools.merge_sources import MergeInput
    from networks.tools.reports import ReportPlaces

METHODS = ("linear", "ties", "dare", "magnitude")

_MODELS = (
    Option(name="models", many=True, help="adapter files of any layout and algorithm, for models of one kind"),
    Option(
        name="ratios",
        type=float,
        many=True,
        help="a factor for each adapter, of any sign and size; its whole change counts that much (1 each if not given)",
    ),
    Option(
        name="unet_ratios", type=float, many=True, help="the same for the U-Net alone, instead of ratios", extension=True
    ),
    Option(
        name="te_ratios",
        type=float,
        many=True,
        help="the same for the text encoder alone, instead of ratios",
        extension=True,
    ),
    Option(
        name="lbws",
        many=True,
        help='block weights for each adapter: a list of 12, 17, 20 or 26 numbers ("1,0,...") for BASE, IN, MID, OUT, or one '
        "number for all, or NONE, ALL, INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL, ALL0.5; they multiply the ratios",
    ),
)
_SAVING = (
    Option(
        name="save_precision",
        choices=tuple(PRECISIONS),
        help="type of the saved tensors; if not given that of precision, and without that too, the type that each has",
    ),
    Option(
        name="precision",
        choices=tuple(PRECISIONS),
        help="type in which weights and changes are added; float, which it is if not given, rounds once only, when saving",
    ),
    Option(name="no_metadata", type=FLAG, help="write no modelspec.* entries; what readers need is written all the same"),
    *REPORT_OPTIONS,
)
_BASE = Option(
    name="base",
    help="the model that the adapters were trained on; wanted to make one adapter of several whose change depends on it "
    "(DoRA, GLoRA, OFT, BOFT, (IA)3)",
    extension=True,
)
_ALLOW = Option(
    name="allow_unmatched",
    type=FLAG,
    help="go on without layers that have no place in the model, instead of refusing",
    extension=True,
)

MERGE_LORA_OPTIONS = (
    OptionGroup("adapters", _MODELS),
    OptionGroup(
        "into what",
        (
            Option(
                name="sd_model", help="checkpoint or diffusers folder to merge into; without, one adapter is made of all"
            ),
            Option(
                name="save_to",
                type=Path,
                help="what to write: .safetensors, or .ckpt; of a model, a diffusers folder where it has no suffix",
            ),
            Option(name="v2", type=FLAG, help="say that all is for SD 2.x; an error where it is not"),
            _BASE,
            _ALLOW,
        ),
    ),
    OptionGroup(
        "adapters into one",
        (
            Option(name="concat", type=FLAG, help="no effect: factors are always put side by side, which is exact"),
            Option(name="shuffle", type=FLAG, help="put the ranks of each layer in another, fixed order"),
            Option(name="new_rank", type=int, help="highest rank of the result; without, it is exact", extension=True),
            Option(
                name="new_conv_rank", type=int, help="the same for 3x3 convolutions; new_rank if not given", extension=True
            ),
            Option(
                name="rank_share",
                type=float,
                help="keep of each layer the fewest ranks that hold this share (0 to 1) of its squared norm",
                extension=True,
            ),
        ),
    ),
    OptionGroup("saving", _SAVING),
)
SVD_MERGE_LORA_OPTIONS = (
    OptionGroup("adapters", _MODELS),
    OptionGroup(
        "result",
        (
            Option(name="save_to", type=Path, help="file to write; its suffix decides the format"),
            Option(name="new_rank", type=int, default=4, help="highest rank of linear layers and 1x1 convolutions"),
            Option(name="new_conv_rank", type=int, help="the same for 3x3 convolutions; new_rank if not given"),
            Option(name="device", help="where to compute: cpu, cuda, cuda:1; the CPU if not given"),
            Option(
                name="method",
                choices=METHODS,
                default="linear",
                help="linear: the sum. ties: the mean of the largest changes that agree in sign (arXiv:2306.01708). dare: "
                "the sum of a random share of them, scaled up (arXiv:2311.03099). magnitude: the sum of the largest",
                extension=True,
            ),
            Option(
                name="density",
                type=float,
                default=0.5,
                help="share of the changes that ties, dare and magnitude keep (0 to 1)",
                extension=True,
            ),
            Option(name="seed", type=int, default=0, help="of what dare keeps", extension=True),
            _BASE,
            _ALLOW,
        ),
    ),
    OptionGroup("saving", _SAVING),
)


def parse_merge_lora(
    argv: Sequence[str], *, description: str, family: str | None = None
) -> tuple[CheckpointMerge | AdapterMerge, ReportPlaces]:
    """What a command line of merge_lora.py asks for, and where it is told of.

    Args:
        family: name of the only family whose models and adapters are taken; None takes all.

    Raises:
        UserError: all that is wrong with it.
    """
    given = parse(argv, MERGE_LORA_OPTIONS, description=description)
    into_model = given["sd_model"] is not None
    problems = [*_model_problems(given, "sd_model"), *suffix_problems(given, folder=into_model)]
    for name in ("new_rank", "new_conv_rank", "rank_share", "shuffle", "base") if into_model else ():
        if given[name]:
            what = "means nothing with --sd_model"
            problems.append(UserError(what, where=given.where(name), remedy="leave out one of them"))
    share = given["rank_share"]
    if share is not None and not 0 < share <= 1:
        problems.append(UserError("is not above 0 and at most 1", where=given.where("rank_share")))
    inputs = attempt(lambda: _inputs(given), problems) or ()
    raise_all(problems)
    if into_model:
        return replace(_checkpoint_merge(given, inputs), family=family), report_places(given)
    limit = None
    if given["new_rank"] is not None or given["new_conv_rank"] is not None or share is not None:
        limit = _rank_limit(given, share)
    merge = _adapter_merge(given, inputs, limit=limit, shuffle=given["shuffle"], v2=given["v2"])
    return replace(merge, family=family), report_places(given)


def parse_svd_merge_lora(argv: Sequence[str], *, description: str) -> tuple[AdapterMerge, ReportPlaces]:
    """What a command line of svd_merge_lora.py asks for, and where it is told of.

    Raises:
        UserError: all that is wrong with it.
    """
    given = parse(argv, SVD_MERGE_LORA_OPTIONS, description=description)
    problems = [*_model_problems(given), *suffix_problems(given)]
    if not 0 < given["density"] <= 1:
        problems.append(UserError("is not above 0 and at most 1", where=given.where("density")))
    for name in ("density", "seed"):
        if given.given(name) and given["method"] == "linear":
            problems.append(UserError("means nothing with --method linear", where=given.where(name), remedy="leave it out"))
    inputs = attempt(lambda: _inputs(given), problems) or ()
    raise_all(problems)
    from networks.tools.dense_merging import Method

    method = None
    if given["method"] != "linear":
        method = Method(name=given["method"], density=given["density"], seed=given["seed"])
    limit = _rank_limit(given, None)
    device = checked_device(given["device"])
    return _adapter_merge(given, inputs, limit=limit, method=method, device=device), report_places(given)


def _model_problems(given: ParsedOptions, *models_to_read: str) -> list[UserError]:
    """What is wrong with the options that both tools have."""
    found = missing_problems(given, {"models": "one or more adapter files", "save_to": "a name for what to write"})
    found += place_problems(given, ("models", "base", *models_to_read))
    found += rank_problems(given, "new_rank", "new_conv_rank")
    number = len(given["models"] or ())
    for name in ("ratios", "unet_ratios", "te_ratios", "lbws") if number else ():
        values = given[name]
        if values is not None and len(values) != number:
            what = f"{len(values)} given for {counted(number, 'model')}"
            found.append(UserError(what, where=given.where(name).strip(), remedy="give one for each model"))
    return found


def _inputs(given: ParsedOptions) -> tuple[MergeInput, ...]:
    from library.families.block_weights import read_block_weights
    from networks.tools.merge_sources import MergeInput

    models = given["models"] or ()
    ratios = given["ratios"] or (1.0,) * len(models)
    weights = [read_block_weights(text) for text in given["lbws"]] if given["lbws"] else [None] * len(models)
    columns = zip(models, given["te_ratios"] or ratios, given["unet_ratios"] or ratios, weights, strict=False)
    return tuple(
        MergeInput(path=Path(path), text_encoder_ratio=text, denoiser_ratio=unet, block_weights=blocks)
        for path, text, unet, blocks in columns
    )


def _saved(given: ParsedOptions) -> str | None:
    name = given["save_precision"] or given["precision"]
    return PRECISIONS[name] if name else None


def _checkpoint_merge(given: ParsedOptions, inputs: tuple[MergeInput, ...]) -> CheckpointMerge:
    from networks.tools.checkpoint_merging import CheckpointMerge

    return CheckpointMerge(
        base=given["sd_model"],
        inputs=inputs,
        target=given["save_to"],
        arithmetic=PRECISIONS[given["precision"] or "float"],
        saved=_saved(given),
        v2=given["v2"],
        allow_unmatched=given["allow_unmatched"],
        with_metadata=not given["no_metadata"],
    )


def _rank_limit(given: ParsedOptions, share: float | None) -> RankLimit:
    from networks.tools.adapter_merging import RankLimit

    conv = given["new_conv_rank"]
    return RankLimit(rank=given["new_rank"], conv_rank=given["new_rank"] if conv is None else conv, share=share)


def _adapter_merge(
    given: ParsedOptions,
    inputs: tuple[MergeInput, ...],
    *,
    limit: RankLimit | None,
    shuffle: bool = False,
    v2: bool = False,
    method: Method | None = None,
    device: str = "cpu",
) -> AdapterMerge:
    from networks.tools.adapter_merging import AdapterMerge

    return AdapterMerge(
        inputs=inputs,
        target=given["save_to"],
        base=given["base"],
        limit=limit,
        method=method,
        shuffle=shuffle,
        arithmetic=PRECISIONS[given["precision"] or "float"],
        saved=_saved(given),
        v2=v2,
        device=device,
        allow_unmatched=given["allow_unmatched"],
        with_metadata=not given["no_metadata"],
    )
