"""The mathematics knows tensors and numbers only."""

import ast
from pathlib import Path

import pytest

import library.diffusion

FOLDER = Path(library.diffusion.__file__).parent
FORBIDDEN = {"argparse", "os", "logging", "accelerate", "PIL", "tqdm", "diffusers", "transformers"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_no_file_of_the_room_imports_what_is_not_mathematics(path):
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & FORBIDDEN
