"""Fingerprint of a Python source and of the code beside it that it imports. Comments and layout do not count."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LENGTH = 16
"""Hexadecimal digits that tell one source from another."""
_INSTALLED = ("site-packages", "dist-packages")


def source_hash(files: list[Path]) -> str:
    """Return a hash of these sources and of all that they import from beside them, without distill's own.

    Comments and layout do not count.
    """
    digest, waiting, seen = hashlib.sha256(), [file.resolve() for file in files], set[Path]()
    while waiting:
        file = waiting.pop(0)
        if file in seen:
            continue
        seen.add(file)
        content = file.read_bytes()
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):  # a compiled module, say
            digest.update(content)
            continue
        digest.update(f"{file.name} {_form(tree)}\n".encode("utf-8", "surrogatepass"))
        waiting += _imported(tree, file)
    return digest.hexdigest()[:_LENGTH]


def _form(node: Any) -> str:
    """Return a syntax tree as text. Empty fields are left out, because each Python version adds some."""
    if isinstance(node, list):
        return f"[{', '.join(map(_form, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{name}={_form(value)}" for name, value in ast.iter_fields(node) if value is not None and value != [])
    return f"{type(node).__name__}({', '.join(fields)})"


def _imported(tree: ast.AST, file: Path) -> Iterator[Path]:
    """Yield the files that a source imports from its own folder, or from the package that it belongs to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _found(alias.name.split("."), _folder(file, alias.name))
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            is_relative = 0 < node.level <= len(file.parents)
            folder = file.parents[node.level - 1] if is_relative else _folder(file, node.module or "")
            yield from _found(module, folder)
            for alias in node.names:  # a name of a package may be a module of it
                yield from _found([*module, alias.name], folder)


def _folder(file: Path, module: str) -> Path | None:
    """Return the folder in which `file` finds a module by its full name; None for a library."""
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    top = module.split(".")[0]
    is_own = folder == file.parent or top == file.relative_to(folder).parts[0]
    return None if top == "distill" or not is_own or (folder == file.parent and folder.name in _INSTALLED) else folder


def _found(module: list[str], folder: Path | None) -> Iterator[Path]:
    if folder is not None and module:
        for file in (folder.joinpath(*module).with_suffix(".py"), folder.joinpath(*module, "__init__.py")):
            if file.is_file():
                yield file.resolve()
