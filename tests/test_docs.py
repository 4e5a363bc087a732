"""What the pages name exists: options, files, and the targets of links."""

import re
from pathlib import Path

import pytest

from library.cli.adapter_merge_options import MERGE_LORA_OPTIONS, SVD_MERGE_LORA_OPTIONS
from library.cli.extract_lora_options import EXTRACT_LORA_OPTIONS
from library.cli.generation_options import GENERATION_OPTIONS
from library.cli.merge_models_options import MERGE_MODELS_OPTIONS
from library.cli.options import all_options
from library.cli.resize_images_options import RESIZE_IMAGES_OPTIONS
from library.cli.show_metadata_options import SHOW_METADATA_OPTIONS
from library.cli.training_options import TRAINING_OPTIONS
from library.generation.prompt_options import IMAGE_OPTIONS
from networks.building import creation
from networks.building.presets import PRESETS
from networks.building.selection import SELECTION_ARGUMENTS
from networks.check_lora_weights import OPTIONS as CHECK_OPTIONS
from networks.convert_lora import OPTIONS as ADAPTER_CONVERSION_OPTIONS
from networks.core.algorithms import ALGORITHMS, algorithm
from networks.extract_lora_from_dylora import OPTIONS as EXTRACTION_OPTIONS
from networks.formats.readers import READERS
from networks.formats.reading import Effect, verdict_of
from networks.formats.traits import Trait
from networks.registry import NETWORK_MODULES
from networks.resize_lora import OPTIONS as RESIZE_LORA_OPTIONS
from tools.convert_diffusers20_original_sd import OPTIONS as CONVERSION_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = PAGES + sorted((ROOT / "configs").glob("*.toml"))
OF_OUR_SCRIPTS = (
    TRAINING_OPTIONS,
    GENERATION_OPTIONS,
    CONVERSION_OPTIONS,
    EXTRACTION_OPTIONS,
    RESIZE_IMAGES_OPTIONS,
    SHOW_METADATA_OPTIONS,
    MERGE_MODELS_OPTIONS,
    MERGE_LORA_OPTIONS,
    SVD_MERGE_LORA_OPTIONS,
    EXTRACT_LORA_OPTIONS,
    CHECK_OPTIONS,
    ADAPTER_CONVERSION_OPTIONS,
    RESIZE_LORA_OPTIONS,
)
OF_OTHER_PROGRAMS = {
    *("num_cpu_threads_per_process", "multi_gpu", "num_processes", "cpu"),  # accelerate launch
    *("help", "check", "logdir"),  # every script, ruff, tensorboard
    "networkdimension",  # the example of a misspelt one
}


def page_name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", TEXTS, ids=page_name)
def test_every_option_that_is_named_exists(path):
    ours = (option for groups in OF_OUR_SCRIPTS for option in all_options(groups))
    known = {*ours, *IMAGE_OPTIONS, *OF_OTHER_PROGRAMS}
    known |= {name for file in (ROOT / "benchmarks").glob("*.py") for name in re.findall(r'"--(\w+)"', file.read_text())}
    named = set(re.findall(r"(?<![\w-])--([A-Za-z][\w]*)", path.read_text(encoding="utf-8")))
    assert named <= known


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_link_within_the_repository_leads_somewhere(path):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=page_name)
def test_every_preset_that_is_named_exists(path):
    named = re.findall(r"configs/[\w/]+\.\w+", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_all_pages_stand_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index
    ] == []


def network_arguments():
    shared = creation.RANK_ARGUMENTS | creation.RATE_ARGUMENTS | creation.START_ARGUMENTS | creation.SCALE_ARGUMENTS
    own = [algorithm(name) for name in ALGORITHMS]
    return {*shared, *SELECTION_ARGUMENTS, *(key for each in own for key in (*each.arguments, *each.training_arguments))}


def test_the_page_of_adapters_tells_of_every_argument_and_of_no_other():
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    section = page[page.index("## Arguments") : page.index("## DyLoRA")]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `") and "=" not in line.split("|")[1]]
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row)} - {"ia3", "full"}
    patterns = set(re.findall(r"^\| `(\w+)=", section, re.MULTILINE))
    assert network_arguments() <= named | patterns
    assert {key for key in named if key not in PRESETS} - network_arguments() == set()


def test_the_page_of_adapters_tells_of_every_module_and_preset():
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    assert [name for name in [*NETWORK_MODULES, *PRESETS] if f"`{name}`" not in page] == []


def test_the_table_of_who_reads_what_is_the_readers():
    words = {Effect.RIGHT: "yes", Effect.WRONG: "wrongly", Effect.DROPPED: "no", Effect.REFUSED: "refuses"}
    page = (ROOT / "docs" / "adapter_tools.md").read_text(encoding="utf-8")
    titles, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\|(?: \||-|[^`\n]*yes).*\|$", page, re.MULTILINE)
    ][:14]
    assert titles[1:] == [reader.title for reader in READERS.values()]
    assert len(rows) == 12
    for name, *cells in rows:
        assert cells == [words[verdict_of(reader, [Trait(name)])[1].effect] for reader in READERS.values()], name
