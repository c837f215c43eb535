"""The manifest of a quantised copy of a checkpoint: of what it is a copy, how it is quantised, its files' hashes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.system.files import read_bounded, sha256_of

MANIFEST, BEGUN = "quantized.json", "quantized.begun.json"
VERSION = 1
_TEXTS = ("quantization", "as_it_is", "compute_dtype")


@dataclass
class QuantizedManifest:
    """Facts about a copy."""

    quantization: str
    as_it_is: str
    """The quantisation as a cache's fingerprint says it."""
    compute_dtype: str
    source: dict[str, str]
    """Fingerprints of the checkpoint that this is a copy of: config, weights."""
    files: dict[str, str] = field(default_factory=dict)
    """Each weight file's sha256."""
    version: int = VERSION

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.version, self.as_it_is, self.quantization, self.compute_dtype, self.source

    def as_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()

    def check(self, folder: Path) -> None:
        """Raise UserError for a file that is missing or has other content."""
        for name, expected in self.files.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise UserError(
                    f"{folder}: {name} is missing or damaged: run the same `distill quantize` with --to {folder} again"
                )


def is_copy(folder: Path) -> bool:
    """Tell whether a folder is a quantised copy. Raises UserError for one that was only begun."""
    if (folder / BEGUN).is_file() and not is_finished(folder):
        raise UserError(f"{folder}: this quantised copy is not finished: run the same `distill quantize` again")
    return is_finished(folder)


def is_finished(folder: Path) -> bool:
    """Tell whether a folder is a quantised copy that is complete."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, begun: bool = False) -> QuantizedManifest:
    """Read a folder's manifest. Raises UserError for one that is damaged or of another version."""
    path = folder / (BEGUN if begun else MANIFEST)
    try:
        content = json.loads(read_bounded(path))
        found = QuantizedManifest(**content)
        texts = [getattr(found, name) for name in _TEXTS]
        texts += [*found.files, *found.files.values(), *found.source, *found.source.values()]
        is_sound = all(isinstance(text, str) for text in texts) and {"config", "weights"} == set(found.source)
        names = all(Path(name).name == name and name.endswith(".safetensors") for name in found.files)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        is_sound = names = False
    if not (is_sound and names) or found.version != VERSION:
        raise UserError(f"{path}: damaged, or of another version: make the copy anew with `distill quantize`")
    return found
