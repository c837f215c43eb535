"""The shape of the project: which way imports run, what lies at the top, no pickle, and a first line in every file."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator
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
    {"training", "evaluation", "export", "report"},
    {"experiment", "forecast"},
    {"recipes"},
    {"folder_commands"},
    {"cli", "__main__"},
)
NEIGHBOURS = {
    ("forecast", "experiment"),
}
# The parts take plain arguments and work from a notebook: only these know the experiment file.
CONFIGURATION = {"experiment"}
READ_CONFIGURATION = {"experiment", "forecast", "recipes", "cli"}
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# These answer `distill --help`, which has half a second.
LIGHT = (
    "distill",
    "distill.cli",
    "distill.folder_commands",
    "distill.experiment",
    "distill.experiment.configuration",
    "distill.errors",
    "distill.experiment.file",
    "distill.system.quiet",
)
HEAVY = {"torch", "lightning", "transformers", "datasets", "bitsandbytes", "torchmetrics", "numpy", "safetensors"}

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "constraints.txt", ".ci", ".gitignore"),
    *("distill", "teachers", "students", "configs", "data", "tests"),
}

# Without `trust_remote_code` transformers asks "[y/N]", or its default may change. `datasets` runs no code since 4.0.
TRUSTING = {"from_pretrained", "from_config"}

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


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
    if home != "distill":
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


def heavy_imports(source: str) -> set[str]:
    """Heavy libraries that are imported as soon as the module is: outside functions and `if TYPE_CHECKING`."""

    def at_import(nodes: Iterable[ast.AST]) -> Iterator[str]:
        for node in nodes:
            checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not checking and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    yield from imported(node, "distill.x")
                yield from at_import(ast.iter_child_nodes(node))

    return {name.split(".")[0] for name in at_import(ast.parse(source).body)} & HEAVY


def unsafe_loading(source: str) -> list[str]:
    """Lines that could run a stranger's code: pickle, `torch.load` without weights_only, trusting remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [f"import of {name}" for name in imported(node, "m.m") if name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Call):
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if ast.unparse(node.func) == "torch.load" and not safe:
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if attribute(node) in TRUSTING and all(k.arg != "trust_remote_code" for k in node.keywords):
                found.append(f"line {node.lineno}: {attribute(node)} without trust_remote_code")
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                found.append(f"line {node.lineno}: allow_pickle")
        found += [f"{name} = True" for name, value in assigned(node) if name == "trust_remote_code" and is_true(value)]
    return found


def attribute(call: ast.Call) -> str:
    """The name behind the last dot of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def is_true(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def assigned(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """(name, value) of whatever gives names values: keywords, assignments, fields, parameters' defaults, dict items."""
    if isinstance(node, ast.keyword):
        yield node.arg or "", node.value
    elif isinstance(node, ast.AnnAssign):
        yield ast.unparse(node.target).split(".")[-1], node.value
    elif isinstance(node, ast.Assign):
        yield from ((ast.unparse(target).split(".")[-1], node.value) for target in node.targets)
    elif isinstance(node, ast.Dict):
        yield from ((k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant))
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        yield from zip((a.arg for a in positional[len(positional) - len(node.defaults) :]), node.defaults, strict=True)
        yield from zip((a.arg for a in node.kwonlyargs), node.kw_defaults, strict=True)


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
def test_nothing_loads_a_strangers_code(path: Path) -> None:
    assert unsafe_loading(read(path)) == []


@pytest.mark.parametrize("path", sources(), ids=str)
def test_the_first_line_says_what_a_file_is_for(path: Path) -> None:
    assert first_line_fault(read(path)) is None


@pytest.mark.parametrize("path", [path for path in sources() if module_name(path) in LIGHT], ids=str)
def test_what_help_needs_is_light(path: Path) -> None:
    assert heavy_imports(read(path)) == set()


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


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "type(model).from_pretrained(None, config=config, **options)",
        "AutoModelForCausalLM.from_config(config, dtype=dtype)",
        "class C:\n    trust_remote_code: bool = True",
        "def f(x, trust_remote_code=True): ...",
        "def f(*, trust_remote_code: bool = True): ...",
        "options = {'trust_remote_code': True}",
        "options.trust_remote_code = True",
    ],
)
def test_unsafe_loading_is_found(source: str) -> None:
    assert len(unsafe_loading(source)) == 1


def test_safe_loading_passes() -> None:
    safe = "torch.load(path, weights_only=True)\nf(trust_remote_code=t)\nimport safetensors\nd: bool = True"
    assert unsafe_loading(safe) == []


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
