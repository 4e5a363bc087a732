"""The requirement files and the imports agree: nothing is asked for that is not used, nothing used that is not asked for."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"pillow": "PIL", "opencv-python-headless": "cv2", "lycoris-lora": "lycoris"}  # where the names differ
TOOLS = {"pytest-xdist", "ruff", "mypy"}  # run, not imported
OWN = {"library", "networks", "tools", "tests", "benchmarks", *(path.stem for path in ROOT.glob("*.py"))}
OPTIONAL = {"xformers"}  # asked for in requirements-xformers.txt
SOURCES = [path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {re.split(r"[<>=!~\[ ]", line)[0].lower() for line in lines if line.strip() and not line.startswith("#")}


def imported_modules(paths):
    """Top-level names that are imported, also those named as dotted text ("bitsandbytes.optim.AdamW8bit")."""
    found = set()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
        found |= set(re.findall(r"importorskip\(\"(\w+)", text))
    return found


def named_in_text(module, paths):
    return any(re.search(rf"[\"']{module}\.\w", path.read_text(encoding="utf-8")) for path in paths)


def module_of(requirement):
    return MODULES.get(requirement, requirement.replace("-", "_"))


@pytest.mark.parametrize("requirement", sorted(requirements("requirements.txt")))
def test_what_running_needs_is_imported_outside_the_tests(requirement):
    paths = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
    module = module_of(requirement)
    assert module in imported_modules(paths) or named_in_text(module, paths)


@pytest.mark.parametrize("requirement", sorted(requirements("requirements-dev.txt") - TOOLS))
def test_what_developing_needs_is_imported(requirement):
    module = module_of(requirement)
    assert module in imported_modules(SOURCES) or named_in_text(module, SOURCES)


def test_everything_that_is_imported_is_asked_for():
    asked_for = {module_of(name) for file in ("requirements.txt", "requirements-dev.txt") for name in requirements(file)}
    others = imported_modules(SOURCES) - set(sys.stdlib_module_names) - OWN - OPTIONAL - asked_for
    assert others == set()
