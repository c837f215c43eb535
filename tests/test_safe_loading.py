"""No code of a stranger's runs: no pickle, no `torch.load` of more than weights, no remote code by default."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("distill", "teachers", "students")

# Without `trust_remote_code` transformers asks "[y/N]", or its default may change. `datasets` runs no code since 4.0.
TRUSTING = {"from_pretrained", "from_config"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the modules that a statement imports from outside of its package."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level or node.module is None else [node.module]


def unsafe_loading(source: str) -> list[str]:
    """Return lines that could run a stranger's code: pickle, `torch.load` without weights_only, remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [f"import of {name}" for name in imported(node) if name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Call):
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if ast.unparse(node.func) == "torch.load" and not safe:
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if attribute(node) in TRUSTING and all(k.arg != "trust_remote_code" for k in node.keywords):
                found.append(f"line {node.lineno}: {attribute(node)} without trust_remote_code")
            if attribute(node) == "apply_chat_template":
                found.append(f"line {node.lineno}: a chat template without limits; models.chat_templates has them")
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                found.append(f"line {node.lineno}: allow_pickle")
        found += [f"{name} = True" for name, value in assigned(node) if name == "trust_remote_code" and is_true(value)]
    return found


def attribute(call: ast.Call) -> str:
    """Return the name after the last dot of a call."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def is_true(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def assigned(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Yield (name, value) of keywords, assignments, fields, parameters' defaults and dict items."""
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


SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_a_strangers_code(path: Path) -> None:
    assert unsafe_loading(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "tokenizer.apply_chat_template(messages)",
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
