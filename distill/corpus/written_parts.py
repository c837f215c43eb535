"""Folders of texts that a model wrote, as sources of rows: checked against their journals and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distill.corpus.faults import BadRow
from distill.corpus.shapes import BY_NAME, Columns
from distill.corpus.text_files import lines
from distill.corpus.written import COLUMN, part_file, read_journal, read_manifest
from distill.errors import UserError
from distill.models.tokenizers import tokenizer_fingerprint
from distill.system.files import is_inside, sha256_of

Cut = Literal["keep", "drop"]


@dataclass(frozen=True)
class WrittenPart:
    """The texts of one part, as a source of rows."""

    path: Path
    sha256: str
    cut: Cut = "keep"
    """Texts that were cut by the limit of tokens are kept, or left out."""
    owner: int = 0
    limit: int | None = None
    columns: Columns = BY_NAME

    @property
    def label(self) -> str:
        """The file's name in error messages."""
        return str(self.path)

    def content_key(self) -> str:
        """Return a hash of the content. Raises UserError if the file is not as it was written."""
        try:
            found = sha256_of(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}): {_AGAIN}") from None
        if found != self.sha256:
            raise UserError(f"{self.path}: is not as it was written (another sha256): remove it, and {_AGAIN}")
        return f"written {found} {self.cut}"

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        """Yield the texts, each in the column `COLUMN`."""
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(lines(file, self.label), start=1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, BadRow(f"not JSON ({error})")
                    continue
                if not isinstance(row, dict) or self.cut == "keep" or row.get("ended"):
                    yield number, {COLUMN: row}


_AGAIN = "`distill generate` with the same settings writes it again"


def written_parts(path: str) -> list[WrittenPart]:
    """Return the parts of a folder that a model wrote. Raises UserError if it is not finished, or leads elsewhere."""
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    journal = read_journal(folder, manifest)
    if len(journal) < manifest.parts:
        raise UserError(
            f"{path}: {len(journal)} of {manifest.parts} parts are written: finish it with `distill generate`"
        )
    parts = [WrittenPart(part_file(folder, number), journal[number].sha256) for number in range(manifest.parts)]
    for part in parts:
        if not is_inside(part.path, folder):
            raise UserError(f"{part.path}: is a link out of {path} and is not followed: copy it here")
    return parts


def check_written(files: Sequence[Any], tokenizer: Any, cut: Cut) -> tuple[list[Any], tuple[str, ...]]:
    """Return the files of a corpus with the choice for `cut` texts, and a line about each folder that a model wrote.

    Raises UserError for a folder that was written with another tokenizer, and for one that has nothing but texts that
    are to be left out.
    """
    told = []
    for folder in dict.fromkeys(file.path.parent.parent for file in files if isinstance(file, WrittenPart)):
        manifest = read_manifest(folder)
        ours, theirs = tokenizer_fingerprint(tokenizer)["tokenizer"], str(manifest.fingerprints.get("tokenizer"))
        if theirs != ours:
            raise UserError(
                f"{folder}: was written with another tokenizer (sha256 {theirs[:8]}…, the teacher's is {ours[:8]}…), "
                "so its token ids mean other texts: take the teacher it was written for, or write it anew"
            )
        parts = read_journal(folder, manifest).values()
        texts, ended = (sum(getattr(part, name) for part in parts) for name in ("texts", "ended"))
        if cut == "drop" and not ended:
            raise UserError(
                f"{folder}: all {texts:,} texts were cut by their limit: keep them with --corpus.cut_texts keep"
            )
        how = "kept" if cut == "keep" else "left out"
        told.append(f"{folder}, {texts:,} texts of a model; {texts - ended:,} were cut by their limit, and are {how}")
    chosen = [replace(file, cut=cut) if isinstance(file, WrittenPart) else file for file in files]
    return chosen, tuple(told)
