"""The laws of docs/architecture.md that the source itself shows: read from the syntax trees, nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOORS = (
    "train_network.py",
    "sdxl_train_network.py",
    "gen_img_diffusers.py",
    "sdxl_gen_img.py",
    "tools/convert_diffusers20_original_sd.py",
    "tools/resize_images_to_resolution.py",
    "tools/show_metadata.py",
    "tools/merge_models.py",
    "networks/extract_lora_from_dylora.py",
    "networks/extract_lora_from_models.py",
    "networks/check_lora_weights.py",
    "networks/convert_lora.py",
    "networks/resize_lora.py",
    "networks/merge_lora.py",
    "networks/sdxl_merge_lora.py",
    "networks/svd_merge_lora.py",
)
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "cv2", "bitsandbytes", "huggingface_hub"}
LONGEST_FUNCTION = 80  # lines, the docstring not counted
LONGEST_FILE = 700
LONGEST_CHAIN = 4
SILENT_ROOMS = (
    "library/diffusion/",
    "library/families/",
    "library/prompts/",
    "library/conditioning/",
    "networks/core/",
    "networks/formats/",
    "networks/building/",
    "networks/tools/",
)


@cache
def sources() -> dict[str, ast.Module]:
    """Path below the root -> syntax tree, of library and networks."""
    paths = sorted(path for folder in ("library", "networks") for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


# What a law forbids, as lines "name: what is wrong" of one file


def args_parameters(path: str, tree: ast.Module) -> Iterator[str]:
    """Law 1: the Namespace dies at the door."""
    for function in functions(tree):
        given = function.args
        several = [one for one in (given.vararg, given.kwarg) if one is not None]
        names = {one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs, *several]}
        if "args" in names and not path.startswith("library/cli/"):
            yield f"{function.name} takes args"


def family_names(path: str, tree: ast.Module) -> Iterator[str]:
    """Law 2: a family is data; no other room asks which one it is. Options and doors of its name may be called as one."""
    names = r"sd[12]|sdxl|sd_v[12]\w*|sdxl_base\S*|stable-diffusion-(v[12]|xl)\S*"
    if path.startswith("library/cli/"):
        names = names.replace("|sdxl|", "|")
    if path.startswith("library/families/") or path == "networks/sdxl_merge_lora.py":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(names, node.value):
                yield f"line {node.lineno} names the family {node.value!r}"
        elif isinstance(node, ast.ImportFrom) and node.module in (
            "library.families.sd1",
            "library.families.sd2",
            "library.families.sdxl",
        ):
            yield f"line {node.lineno} imports one family"


def global_randomness(path: str, tree: ast.Module) -> Iterator[str]:
    """Law 4: every draw names its generator; seeds by chance come from SystemRandom."""
    drawing = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        named = any(keyword.arg == "generator" for keyword in node.keywords)
        of_torch = owner == "torch" and name in drawing and not named
        of_python = owner == "random" and name not in ("Random", "SystemRandom", "getstate", "setstate")
        if of_torch or of_python or owner in ("np.random", "numpy.random"):
            yield f"line {node.lineno} draws from a global generator ({owner}.{name})"


def work_at_import(path: str, tree: ast.Module) -> Iterator[str]:
    """Law 9: importing does nothing; doors are run."""
    for node in [] if path in DOORS else tree.body:
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if is_call or isinstance(node, (ast.For, ast.While, ast.With)):
            yield f"line {node.lineno} works when the module is imported"


def prints(path: str, tree: ast.Module) -> Iterator[str]:
    """Rooms of pure functions and of parts that others use tell their callers, not the screen."""
    for node in ast.walk(tree):
        if path.startswith(SILENT_ROOMS) and isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield f"line {node.lineno} prints"


def bare_excepts(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno} catches everything, Ctrl-C too"


def long_functions(path: str, tree: ast.Module) -> Iterator[str]:
    for function in functions(tree):
        first = function.body[0]
        documented = ast.get_docstring(function) is not None
        docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
        length = (function.end_lineno or 0) - function.lineno + 1 - docstring
        if length > LONGEST_FUNCTION:
            yield f"{function.name} has {length} lines"


def long_chains(path: str, tree: ast.Module) -> Iterator[str]:
    """What compares one name with text after text wants to be a table."""
    for node in ast.walk(tree):
        length, name, link = 0, "", node
        while isinstance(link, ast.If) and (compared := _compared_with_text(link.test)) and name in ("", compared):
            length, name, link = length + 1, compared, link.orelse[0] if len(link.orelse) == 1 else None
        if length > LONGEST_CHAIN:
            yield f"line {node.lineno} compares {name} with {length} texts"


def _compared_with_text(test: ast.expr) -> str | None:
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq):
        return None
    value = test.comparators[0]
    return ast.unparse(test.left) if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


Law = Callable[[str, ast.Module], Iterator[str]]
LAWS: dict[Law, str] = {  # each with a source that breaks it, so that none passes because it sees nothing
    args_parameters: "def train(args): ...",
    family_names: "def is_second(family): return family.name == 'sd2'",
    global_randomness: "def noise(shape): return torch.randn(shape)",
    work_at_import: "logging.basicConfig()",
    prints: "def f(): print('x')",
    bare_excepts: "try: f()\nexcept: pass",
    long_functions: "def f():\n" + "    x = 1\n" * 80,
    long_chains: "if k == 'a': f()\n" + "".join(f"elif k == '{letter}': f()\n" for letter in "bcde"),
}
# Drop-out draws from torch's own state on purpose: gradient checkpointing restores that state when it recomputes a layer.
ALLOWED = {("networks/core/adapter.py", "global_randomness")}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_source_keeps_the_law(law):
    broken = [
        f"{path}: {what}"
        for path, tree in sources().items()
        if (path, law.__name__) not in ALLOWED
        for what in law(path, tree)
    ]
    assert broken == []


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_source_that_breaks_the_law_is_found(law):
    assert len(list(law("library/diffusion/noise.py", ast.parse(LAWS[law])))) == 1


def test_no_file_is_too_long_to_be_read():
    lengths = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in sources()}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


# Rooms: the table of docs/architecture.md is the law, so the page cannot part from the code


@cache
def rooms() -> dict[str, set[str] | None]:
    """Room as the page writes it, in the page's order -> the rooms it imports, without the ground floor; None: all above."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `((?:library|networks)/[^`]*)` \|.*\|([^|]*)\|$", page, re.MULTILINE)
    return {
        room: None if imported.strip() == "all above" else set(filter(None, imported.replace(" ", "").split(",")))
        for room, imported in rows
    }


def short(room: str) -> str:
    """As the last column names a room: "diffusion", "networks/core", "networks"."""
    return room.removeprefix("library/").removesuffix(".py").removesuffix("/*").rstrip("/")


def room_of(path: str) -> str:
    """The row that a file belongs to: its own, its folder's, or `networks/*.py`."""
    folder = path.rpartition("/")[0]
    (found,) = [room for room in rooms() if room in (path, f"{folder}/", f"{folder}/*.py")]
    return found


def imported_paths(tree: ast.AST) -> Iterator[str]:
    """Files of ours that are imported anywhere in a tree, in functions and for type checkers too."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = f"{name.replace('.', '/')}.py"
            if path in sources():
                yield path


@cache
def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {room: set() for room in rooms()}
    for path, tree in sources().items():
        if not path.endswith("__init__.py") and path not in DOORS:
            found[room_of(path)] |= {room_of(target) for target in imported_paths(tree)} - {room_of(path)}
    return found


def test_every_file_belongs_to_one_room():
    modules = [path for path in sources() if not path.endswith("__init__.py")]
    assert {room_of(path) for path in modules} == set(rooms())


def test_no_room_imports_from_one_further_down():
    order = list(rooms())
    assert [
        f"{room} -> {target}"
        for room, targets in arrows().items()
        for target in targets
        if order.index(target) >= order.index(room)
    ] == []


def test_rooms_import_what_the_page_says():
    ground = {room for room in rooms() if room.endswith(".py") and "*" not in room}
    drawn = {room: {short(target) for target in targets - ground} for room, targets in arrows().items()}
    assert {room: drawn[room] for room, said in rooms().items() if said is not None and room not in ground} == {
        room: said for room, said in rooms().items() if said is not None and room not in ground
    }


# What --help pays for


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """Dotted names that importing a module imports: not those in functions, nor those for type checkers."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def paid_for(door: str) -> dict[str, str]:
    """Every dotted name that starting a door imports -> the file that asks for it."""
    paid: dict[str, str] = {}
    waiting, seen = [door], {door}
    while waiting:
        path = waiting.pop()
        tree = sources().get(path) or ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for name in imported_at_once(tree):
            paid.setdefault(name, path)
            parents = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
            files = {f"{part.replace('.', '/')}{end}" for part in parents for end in (".py", "/__init__.py")}
            new = (files & {*sources(), *DOORS}) - seen
            seen |= new
            waiting += sorted(new)
    return paid


@pytest.mark.parametrize("door", DOORS)
def test_help_does_not_import_what_takes_long(door):
    paid = paid_for(door)
    assert "library.cli.options" in paid
    assert {name: path for name, path in paid.items() if name.partition(".")[0] in HEAVY} == {}


def test_what_a_door_imports_is_followed_through_our_own_files():
    paid = paid_for("library/training/trainer.py")
    assert paid["torch"] == "library/training/trainer.py"
    assert paid["library.streams"] == "library/training/trainer.py"
    assert paid["hashlib"] == "library/streams.py"
