"""Text that a model wrote, as a folder: parts with the token ids as they were written, a manifest and a journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError
from distill.system import json_lines
from distill.system.files import read_bounded

MANIFEST, JOURNAL, PARTS = "written.json", "journal.jsonl", "parts"
VERSION = 1
COLUMN = "written"
"""Column of a row that holds one text, with the keys of `Text`."""
MOST_PROMPTS = 2**32
_JOURNAL_BYTES = 256 << 20


@dataclass(frozen=True)
class Manifest:
    """Identity of a folder's texts: it determines them up to rounding."""

    kind: Literal["messages", "text"]
    """Form of the prompts: conversations, or the beginnings of plain texts."""
    prompts: int
    samples_per_prompt: int
    group: int
    """Prompts a part. A part is written whole."""
    fingerprints: Mapping[str, str]
    """Writer, tokenizer, chat template and prompts."""
    settings: Mapping[str, Any]
    """Settings of the sampling, by their keys in the experiment file's section `generate`."""
    version: int = VERSION

    @property
    def parts(self) -> int:
        """Number of parts of the finished folder."""
        return -(-self.prompts // self.group)

    @property
    def texts(self) -> int:
        """Number of texts of the finished folder."""
        return self.prompts * self.samples_per_prompt

    def group_range(self, part: int) -> range:
        """Return the numbers of the prompts of a part."""
        return range(part * self.group, min((part + 1) * self.group, self.prompts))

    def to_bytes(self) -> bytes:
        """Return the content of its file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


@dataclass(frozen=True)
class Part:
    """One line of the journal: a finished part."""

    part: int
    bytes: int
    sha256: str
    texts: int
    ended: int
    """Texts that the model ended itself. The others were cut by the limit of tokens."""
    tokens: int
    """Tokens of the texts, without the prompts."""
    prompt_tokens: int
    """Tokens of the prompts, once a text."""
    batch_size: int
    """Texts that were written at one time at most."""


def part_file(folder: Path, part: int) -> Path:
    """Return the place of a part's file."""
    return folder / PARTS / f"{part:06d}.jsonl"


def is_written(path: str | Path) -> bool:
    """Tell whether a path is a folder of texts that a model wrote."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest. Raises UserError if it is damaged, or of a later version."""
    path = folder / MANIFEST
    try:
        content = json.loads(read_bounded(path, 1 << 20))
        if content.get("version") != VERSION:
            raise UserError(f"{path}: format version {content.get('version')!r}, and this program reads {VERSION}")
        numbers = [content[name] for name in ("prompts", "samples_per_prompt", "group")]
        fits = all(type(number) is int and 0 < number <= MOST_PROMPTS for number in numbers)
        fits = fits and content["kind"] in ("messages", "text")
        fits = fits and all(isinstance(content[name], dict) for name in ("fingerprints", "settings"))
        if not fits:
            raise ValueError("values that were never written")
        return Manifest(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}): restore it, or write the texts anew in another folder") from None


def read_journal(folder: Path, manifest: Manifest) -> dict[int, Part]:
    """Return the finished parts by number; of a part that was made again, the last line. Unfinished lines do not count.

    Raises UserError if the file cannot be read.
    """
    try:
        found = json_lines.read(folder / JOURNAL, _JOURNAL_BYTES)
    except OSError as error:
        raise UserError(f"{folder / JOURNAL}: cannot be read ({error.strerror})") from None
    parts = {}
    for line in found:
        try:
            part = Part(**line)
        except TypeError:
            continue
        numbers = [value for name, value in asdict(part).items() if name != "sha256"]
        if all(type(number) is int and number >= 0 for number in numbers) and part.part < manifest.parts:
            parts[part.part] = part
    return parts


@dataclass(frozen=True)
class Text:
    """One text with its prompt, as a part stores it."""

    input_ids: list[int]
    prompt_tokens: int
    """The first so many tokens are the prompt's."""
    ended: bool
    """True if the model ended the text: the last token is the one it ended with."""
    document: str
    """The sha256 (hex) of the document that the prompt is from."""

    @classmethod
    def of(cls, row: Any, where: str) -> Text:
        """Check a row. Raises UserError if it is not as it was written."""
        try:
            text = cls(*(row[name] for name in ("input_ids", "prompt_tokens", "ended", "document")))
            fits = type(text.input_ids) is list and all(type(token) is int and token >= 0 for token in text.input_ids)
            fits = fits and type(text.prompt_tokens) is int and 0 < text.prompt_tokens <= len(text.input_ids)
            fits = fits and type(text.ended) is bool and len(text.document) == 64 and int(text.document, 16) >= 0
        except (TypeError, KeyError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"{where}: not a text as `distill generate` writes it")
        return text

    @property
    def share(self) -> float:
        """The place of the prompt's document in [0, 1): it is held out here if it is held out there."""
        return int(self.document[:16], 16) / 2**64
