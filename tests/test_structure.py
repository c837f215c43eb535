"""The shape of the project: the direction of imports, the top level, and a first line in every file.

python tests/test_structure.py     writes the map of files in CONTRIBUTING.md anew
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("distill", "teachers", "students")

# DESIGN's arrows, from the ground up. A module may import what stands on a lower floor, its own room, and the
# neighbours named here, whose rooms are one subject.
FLOORS = (
    {"__init__", "errors"},
    {"system"},
    {"models"},
    {"plugins"},
    {"targets"},
    {"losses", "cache", "corpus"},
    {"training", "evaluation", "export", "report", "generation", "transfer"},
    {"experiment", "forecast"},
    {"recipes"},
    {"folder_commands", "api"},
    {"cli"},
    {"__main__"},
)
NEIGHBOURS = {
    ("forecast", "experiment"),
}
# The parts take plain arguments and work from a notebook: only these know the experiment file.
CONFIGURATION = {"experiment"}
READ_CONFIGURATION = {"experiment", "forecast", "recipes", "cli", "api"}
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# These answer `distill --help`, which has half a second.
LIGHT = (
    "distill",
    "distill.__main__",
    "distill.cli",
    "distill.folder_commands",
    "distill.experiment",
    "distill.experiment.configuration",
    "distill.errors",
    "distill.experiment.file",
    "distill.system.interrupt",
    "distill.system.quiet",
    "distill.system.rank",
)
HEAVY = {"torch", "lightning", "transformers", "datasets", "bitsandbytes", "torchmetrics", "numpy", "safetensors"}

# `distill run` says with these alone that all is done. Each of the others takes a second or more to import.
DONE = ("distill.recipes.cache_teacher", "distill.recipes.train_student", "distill.recipes.evaluate")
FOR_WORK = ("lightning", "bitsandbytes", "torchmetrics", "peft", "torchao", "lm_eval", "scipy")

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "constraints.txt", ".ci", ".gitignore"),
    *("distill", "teachers", "students", "configs", "data", "tests"),
}


def module_name(path: Path) -> str:
    """`distill/losses/fused.py` → `distill.losses.fused`; a package's `__init__.py` carries the package's name."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Every name a source imports, wherever in it, absolute; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".") if is_package else module.split(".")[:-1]
            base = here[: len(here) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """The room of a module of distill: `distill.losses.fused` → `losses`; a name in `distill` itself → `__init__`."""
    second = [*module.split("."), "__init__"][1]
    return "__init__" if second.startswith("__") and second != "__main__" else second


def wrong_import(module: str, target: str) -> str | None:
    """Return the reason why `module` may not import `target`, or None if it may."""
    home, away = module.split(".")[0], target.split(".")[0]
    if away not in PACKAGES:
        return None
    if home != away:
        if home == "distill":
            return f"distill finds {away} by name, as plug-ins, and never imports them"
        return None if target.startswith("distill.models") else f"of our packages {home} may import distill.models only"
    if home != "distill" or module == "distill":  # which lends the public names, imported when they are first used
        return None
    mine, theirs = room(module), room(target)
    if unknown := {mine, theirs} - FLOOR.keys():
        return f"{sorted(unknown)} has no floor: DESIGN's layout does not know it"
    if mine == theirs == "recipes":
        command, other = module.split(".")[2:3], target.split(".")[2:3]
        return None if command == other or not command else "recipes never import one another"
    if mine == theirs or (mine, theirs) in NEIGHBOURS:
        return None
    if theirs in CONFIGURATION and mine not in READ_CONFIGURATION:
        return "configuration stops at the recipe; the parts take plain arguments"
    if FLOOR[theirs] < FLOOR[mine]:
        return None
    return f"imports run down only, and {theirs} does not stand below {mine}"


def wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """All the imports in a source that DESIGN's arrows forbid, one line each."""
    targets = imported(ast.parse(source), module, is_package)
    return [f"{module} imports {target}: {why}" for target in targets if (why := wrong_import(module, target))]


def imported_at_once(source: str, module: str = "distill.x", is_package: bool = False) -> Iterator[str]:
    """Every name that is imported as soon as the module is: outside functions and `if TYPE_CHECKING`."""

    def at_import(nodes: Iterable[ast.AST]) -> Iterator[str]:
        for node in nodes:
            checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not checking and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    yield from imported(node, module, is_package)
                yield from at_import(ast.iter_child_nodes(node))

    return at_import(ast.parse(source).body)


def heavy_imports(source: str) -> set[str]:
    """Heavy libraries that are imported as soon as the module is."""
    return {name.split(".")[0] for name in imported_at_once(source)} & HEAVY


def ways_to_imports(module: str) -> dict[str, str]:
    """Every module that is imported together with a module of ours, and the way there through ours."""
    files = {module_name(path): path for path in sources()}
    ways, left = {module: module}, [module]
    while left:
        name = left.pop()
        is_package = name in files and files[name].name == "__init__.py"
        for target in imported_at_once(read(files[name]), name, is_package) if name in files else ():
            parts = target.split(".")
            for known in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if known not in ways:
                    ways[known] = f"{ways[name]} > {known}"
                    left.append(known)
    return ways


def first_line_fault(source: str) -> str | None:
    """Return the fault of a file's first line, which says in one sentence what the file is for, or None."""
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        return "has no docstring"
    if not source.startswith('"""'):
        return "does not begin with its docstring"
    return None if docstring.splitlines()[0].rstrip().endswith((".", "?", "!", ":")) else "first line is no sentence"


def stray_entries(files: Iterable[str]) -> set[str]:
    """Top-level entries of a list of paths that the layout does not know."""
    return {file.split("/")[0] for file in files} - TOP_LEVEL


DOCUMENT = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- The map. `python tests/test_structure.py` writes it. -->\n", "<!-- End of the map. -->\n"


def file_map(root: Path) -> str:
    """Return one line for each file of distill/, teachers/ and students/, room by room: its name and first line."""
    found = [path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*.py")]
    lines = []
    for folder, files in groupby(
        sorted(found, key=lambda path: (path.parent.parts, path.name)), lambda path: path.parent
    ):
        said = {path.name: ast.get_docstring(ast.parse((root / path).read_text(encoding="utf-8"))) for path in files}
        first = {name: (text or "").partition("\n")[0] for name, text in said.items()}
        lines += ["", f"{folder.as_posix()}/".ljust(30) + first.pop("__init__.py", "")]
        lines += [f"  {name}".ljust(30) + text for name, text in first.items()]
    return "".join(f"    {line}\n" if line else "\n" for line in lines) + "\n"


def with_map(document: str, content: str) -> str:
    """Return the document with `content` between the two marks."""
    before, _, rest = document.partition(BEGIN)
    return before + BEGIN + content + END + rest.partition(END)[2]


def sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_there_is_something_to_look_at() -> None:
    assert {path.parts[0] for path in sources()} == set(PACKAGES)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_run_down(path: Path) -> None:
    assert wrong_imports(read(path), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", sources(), ids=str)
def test_the_first_line_says_what_a_file_is_for(path: Path) -> None:
    assert first_line_fault(read(path)) is None


@pytest.mark.parametrize("path", [path for path in sources() if module_name(path) in LIGHT], ids=str)
def test_what_help_needs_is_light(path: Path) -> None:
    assert heavy_imports(read(path)) == set()


@pytest.mark.parametrize("recipe", DONE)
def test_a_finished_run_waits_for_no_library_of_the_work(recipe: str) -> None:
    ways = ways_to_imports(recipe)
    assert "torch" in ways and "transformers" in ways, "the walk finds what the recipes do import"
    assert [ways[name] for name in FOR_WORK if name in ways] == []


def test_the_top_level_is_as_laid_out() -> None:
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout with files")
    assert stray_entries(git.stdout.rstrip("\0").split("\0")) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("distill.losses.head", "from distill.training.module import Module"),
        ("distill.losses.head", "from ..training import module"),
        ("distill.losses.head", "def late():\n    import distill.recipes.evaluate"),
        ("distill.losses.head", "from distill import cli"),
        ("distill.targets.varopt", "from distill.cache.making.writer import write"),
        ("distill.losses.head", "from distill.cache.reader import read"),
        ("distill.evaluation.metrics", "import distill.training"),
        ("distill.training.module", "from distill.evaluation.metrics import Fidelity"),
        ("distill.models.checkpoints", "from distill.experiment.configuration import TeacherConfig"),
        ("distill.models.checkpoints", "import distill.cache"),
        ("distill.errors", "from distill.experiment.configuration import Experiment"),
        ("distill.recipes.run", "from distill.recipes.evaluate import evaluate"),
        ("distill.recipes.run", "from . import evaluate"),
        ("distill.recipes.run", "from distill.recipes.runner import go"),
        ("distill.recipes.run", "from distill.cli import main"),
        ("distill.recipes.run", "from distill.helpers import anything"),
        ("distill.plugins", "import students.pruned"),
        ("distill.cli", "from teachers import huggingface"),
        ("teachers.huggingface", "from distill.errors import UserError"),
        ("teachers.huggingface", "import distill"),
        ("students.pruned", "from teachers.huggingface import Teacher"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("distill.cli", "from distill.recipes.evaluate import evaluate\nfrom distill import __version__"),
        (
            "distill.recipes.evaluate",
            "from distill.experiment.file import load\nfrom distill.evaluation import metrics\nimport distill.cache",
        ),
        ("distill.training.module", "from distill.losses.head import loss\nfrom .callbacks import Log"),
        (
            "distill.cache.writer",
            "from distill.targets import schemes\nfrom distill.cache.format import folder\nimport torch",
        ),
        ("teachers.huggingface", "from distill.models.language_model import Head\nfrom teachers import shared"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert wrong_imports(source, module) == []


def test_relative_imports_of_a_package_are_its_own() -> None:
    assert wrong_imports("from .training import x", "distill.losses", is_package=True) == []
    assert len(wrong_imports("from .training import x", "distill.losses", is_package=False)) == 1


def test_a_missing_first_line_is_found() -> None:
    assert first_line_fault("import os\n") == "has no docstring"
    assert first_line_fault("") == "has no docstring"
    assert first_line_fault('# a comment\n"""What it is for."""') == "does not begin with its docstring"
    assert first_line_fault('"""Half a sentence that goes\non."""') == "first line is no sentence"
    assert first_line_fault('"""What it is for."""\n') is None


def test_a_heavy_import_is_found() -> None:
    assert heavy_imports("import torch.nn") == {"torch"}
    assert heavy_imports("try:\n    from lightning import Trainer\nexcept ImportError: pass") == {"lightning"}
    assert heavy_imports("class C:\n    import numpy") == {"numpy"}
    assert heavy_imports("def f():\n    import torch\nif TYPE_CHECKING:\n    import datasets") == set()


def test_a_stray_entry_is_found() -> None:
    assert stray_entries(["distill/cli.py", "notes.md", "scripts/run.sh"]) == {"notes.md", "scripts"}


def test_the_map_of_files_is_current() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert with_map(document, file_map(ROOT)) == document, "run: python tests/test_structure.py"


def test_places_that_contributing_names_exist() -> None:
    places = re.findall(r"`((?:distill|teachers|students)/[\w/]+\.py): (\w+)`", DOCUMENT.read_text(encoding="utf-8"))
    lost = [f"{path}: {name}" for path, name in places if not re.search(rf"\b(def|class) {name}\b", read(Path(path)))]
    assert len(places) > 5 and lost == []


def test_a_new_first_line_shows_in_the_map(tmp_path: Path) -> None:
    (room := tmp_path / "distill" / "losses").mkdir(parents=True)
    (room / "__init__.py").write_text('"""The losses."""\n')
    (room / "fused.py").write_text('"""Head and loss in one pass.\n\nMore.\n"""\n')
    content = file_map(tmp_path)
    words = ["distill/losses/", "The", "losses.", "fused.py", "Head", "and", "loss", "in", "one", "pass."]
    assert content.split() == words
    assert with_map(f"Before.\n{BEGIN}old\n{END}After.\n", content) == f"Before.\n{BEGIN}{content}{END}After.\n"


if __name__ == "__main__":
    DOCUMENT.write_text(with_map(DOCUMENT.read_text(encoding="utf-8"), file_map(ROOT)), encoding="utf-8")
