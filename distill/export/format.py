"""The contract of an export format, and the formats by their names on the command line."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from distill.errors import UserError, did_you_mean

FORMATS = ("gguf", "hf", "onnx")


class Format(Protocol):
    """A format that others can open: it writes a finished student and checks the result."""

    def write(self, source: Path, folder: Path) -> None:
        """Write the student of the folder `source` into the empty folder `folder`. Raises UserError."""
        ...

    def check(self, source: Path, folder: Path) -> str:
        """Open `folder` as its users will, and say in one line what was compared. Raises UserError if it differs."""
        ...


def find_format(name: str, type: str | None = None, with_code: bool = False, class_path: str | None = None) -> Format:
    """Return the format `name`, its numbers stored as `type` (None means the format's usual type).

    `class_path` is the student's class if it is no built-in, as the user named it. Raises UserError for an unknown name
    or type, and for a missing library.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: unknown{did_you_mean(name, FORMATS)}")
    if with_code and name != "hf":
        raise UserError(f"--with_code belongs to --format hf, which needs the code; {name} carries none")
    module = importlib.import_module(f"distill.export.{name}")
    types: tuple[str, ...] = module.TYPES
    if type is not None and type not in types:
        raise UserError(f"--type {type}: unknown to --format {name}{did_you_mean(type, types)}")
    if name == "hf":
        return module.HuggingFaceFormat(type, with_code, class_path)
    if name == "onnx":
        return module.OnnxFormat(class_path)
    return _Gguf(type or types[0])


@dataclass(frozen=True)
class _Gguf:
    type: str

    def write(self, source: Path, folder: Path) -> None:
        from distill.export import gguf

        gguf.write(source, folder, self.type)

    def check(self, source: Path, folder: Path) -> str:
        from distill.export import gguf

        return gguf.check(source, folder, self.type)
