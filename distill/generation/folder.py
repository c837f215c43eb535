"""The folder that texts are written into: its manifest first, then part by part, each noted in the journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.corpus.written import (
    JOURNAL,
    MANIFEST,
    Manifest,
    Part,
    part_file,
    read_journal,
    read_manifest,
)
from distill.errors import UserError
from distill.system import json_lines
from distill.system.files import make_folder, write_durably


class WrittenFolder:
    """A folder of texts that grows by parts. A part's bytes depend on its texts alone."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Begin the folder, or open it to go on.

        Raises UserError for a folder of another writer, other prompts or settings, and for one with other things in it.
        """
        self.folder, self.manifest = folder, manifest
        if (folder / MANIFEST).exists():
            found = read_manifest(folder)
            if different := _differences(manifest, found):
                raise UserError(
                    f"{folder}: was written with other settings ({'; '.join(different)}): give these, or another "
                    "folder with --generate.to"
                )
        else:
            left = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            if [name for name in left if name != f"{MANIFEST}.tmp"]:
                raise UserError(
                    f"{folder}: is not empty, and holds no texts of a model: give another folder with --generate.to"
                )
            make_folder(folder)
            write_durably(folder / MANIFEST, manifest.to_bytes())

    @property
    def journal(self) -> dict[int, Part]:
        """Finished parts by number."""
        return read_journal(self.folder, self.manifest)

    def missing(self) -> list[int]:
        """Return the parts that are still to be written."""
        journal = self.journal
        return [number for number in range(self.manifest.parts) if not self._is_whole(number, journal)]

    def _is_whole(self, number: int, journal: dict[int, Part]) -> bool:
        file = part_file(self.folder, number)
        return number in journal and file.is_file() and file.stat().st_size == journal[number].bytes

    def add(self, number: int, rows: Sequence[dict[str, Any]], batch_size: int) -> None:
        """Write a part and note it. Raises OSError if the disk refuses; then nothing of it is noted."""
        content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        write_durably(part_file(self.folder, number), content)
        prompt_tokens = sum(row["prompt_tokens"] for row in rows)
        part = Part(
            part=number,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            texts=len(rows),
            ended=sum(row["ended"] for row in rows),
            tokens=sum(len(row["input_ids"]) for row in rows) - prompt_tokens,
            prompt_tokens=prompt_tokens,
            batch_size=batch_size,
        )
        json_lines.append(self.folder / JOURNAL, asdict(part))


def _differences(expected: Manifest, found: Manifest) -> list[str]:
    """Return the differences between two manifests in words, shortened values first there, then here."""
    here, there = _flat(asdict(expected)), _flat(asdict(found))
    names = dict.fromkeys([*there, *here])
    return [
        f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    ][:6]


_SECTIONS = {"settings": "generate.", "fingerprints": "fingerprint of "}


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        inner = value if isinstance(value, dict) else {name: value}
        found |= {_SECTIONS.get(name, "") + str(key): each for key, each in inner.items()}
    return found


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    text = f"{text[:8]}…" if len(text) >= 40 else text
    return text if text.isprintable() else ascii(text)
