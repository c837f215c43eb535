"""Hash of a Python source and of those beside it that it imports: another one when the code does something else."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

_LENGTH = 16
"""Hexadecimal digits that tell one source from another."""


def source_hash(files: list[Path]) -> str:
    """Return a hash of these sources and of all that they import from beside them. Comments and layout do not count."""
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
        digest.update(f"{file.name}\0{ast.dump(tree)}\n".encode())
        waiting += _imported(tree, file)
    return digest.hexdigest()[:_LENGTH]


def _imported(tree: ast.AST, file: Path) -> Iterator[Path]:
    """Yield the files that a source imports from its own folder, and from the folders of the packages around it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _found(alias.name.split("."), _folders(file))
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            folders = [file.parents[node.level - 1]] if 0 < node.level <= len(file.parents) else _folders(file)
            yield from _found(module, folders)
            for alias in node.names:  # a name of a package may be a module of it
                yield from _found([*module, alias.name], folders)


def _folders(file: Path) -> list[Path]:
    """Return the folder of a file, and if that is a package, those around it up to the one that holds no package."""
    folders = [file.parent]
    while (folders[-1] / "__init__.py").is_file():
        folders.append(folders[-1].parent)
    return folders


def _found(module: list[str], folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        for file in (folder.joinpath(*module).with_suffix(".py"), folder.joinpath(*module, "__init__.py")):
            if module and file.is_file():
                yield file.resolve()
