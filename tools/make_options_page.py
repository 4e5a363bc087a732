#!/usr/bin/env python3
"""Write docs/options.md from the option tables, so that the page says what the program does.

python tools/make_options_page.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.cli.adapter_merge_options import MERGE_LORA_OPTIONS, SVD_MERGE_LORA_OPTIONS  # noqa: E402
from library.cli.extract_lora_options import EXTRACT_LORA_OPTIONS  # noqa: E402
from library.cli.generation_options import GENERATION_OPTIONS  # noqa: E402
from library.cli.merge_models_options import MERGE_MODELS_OPTIONS  # noqa: E402
from library.cli.options import FLAG, Option, OptionGroup  # noqa: E402
from library.cli.resize_images_options import RESIZE_IMAGES_OPTIONS  # noqa: E402
from library.cli.show_metadata_options import SHOW_METADATA_OPTIONS  # noqa: E402
from library.cli.training_options import TRAINING_OPTIONS  # noqa: E402
from networks import check_lora_weights, convert_lora, extract_lora_from_dylora, resize_lora  # noqa: E402
from tools import convert_diffusers20_original_sd  # noqa: E402

SCRIPTS = {
    "train_network.py": TRAINING_OPTIONS,
    "gen_img_diffusers.py": GENERATION_OPTIONS,
    "tools/resize_images_to_resolution.py": RESIZE_IMAGES_OPTIONS,
    "tools/show_metadata.py": SHOW_METADATA_OPTIONS,
    "tools/merge_models.py": MERGE_MODELS_OPTIONS,
    "networks/merge_lora.py": MERGE_LORA_OPTIONS,
    "networks/svd_merge_lora.py": SVD_MERGE_LORA_OPTIONS,
    "networks/extract_lora_from_models.py": EXTRACT_LORA_OPTIONS,
    "networks/extract_lora_from_dylora.py": extract_lora_from_dylora.OPTIONS,
    "networks/resize_lora.py": resize_lora.OPTIONS,
    "networks/convert_lora.py": convert_lora.OPTIONS,
    "networks/check_lora_weights.py": check_lora_weights.OPTIONS,
    "tools/convert_diffusers20_original_sd.py": convert_diffusers20_original_sd.OPTIONS,
}
PAGE = ROOT / "docs" / "options.md"
INTRODUCTION = """# Options

Made by `python tools/make_options_page.py` from the tables that the programs themselves use. An option marked "later" is
known and refused with a sentence, so that nothing is passed over in silence; one marked "ours" is not in sd-scripts.
"""


def page() -> str:
    """The whole page as Markdown."""
    return INTRODUCTION + "".join(_section(title, groups) for title, groups in SCRIPTS.items())


def _section(title: str, groups: Sequence[OptionGroup]) -> str:
    lines = [f"\n## {title}\n"]
    for group in groups:
        lines += [f"\n### {group.title}\n", "", "| option | value | default | what it does |", "|---|---|---|---|"]
        lines += [_row(option) for option in group.options]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    mark = f" *(later: {option.later})*" if option.later else " *(ours)*" if option.extension else ""
    default = "" if option.default in (None, "", False) else f"`{option.default}`"
    text = option.help.replace("|", "\\|")
    return f"| `--{option.name}` | {_values(option)} | {default} | {text}{mark} |"


def _values(option: Option) -> str:
    if option.type is FLAG:
        return "switch"
    if option.choices:
        return " ".join(f"`{choice}`" for choice in option.choices)
    kind = {int: "whole number", float: "number", Path: "path"}.get(option.type, "text")  # type: ignore[call-overload]
    return f"{kind}, several" if option.takes_list else kind


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
