"""Files of a downloaded data set: which hold documents, and which belong to the split that is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from distill.errors import UserError, did_you_mean

_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
}
"""Split of each word in a name, as `datasets` has them."""
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|requirements|changelog|contributing|citation|code_of_conduct|dataset_card)\b.*", re.I
)
_OF_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json")


def documents_in(files: Sequence[Path]) -> list[Path]:
    """Return the files that may hold documents: none that tell about a data set, or belong to the way it was saved.

    `Dataset.save_to_disk` writes tables and two notes, and later work leaves its own tables (`cache-….arrow`) there.
    """
    saved = {file.parent for file in files if file.name == "state.json"}
    kept = []
    for file in files:
        is_about = _ABOUT.fullmatch(file.name) is not None and file.suffix.lower() in ("", ".txt", ".md")
        is_note = file.name in _OF_SAVED and _has_tables(file.parent, files)
        is_own = file.parent in saved and file.name.startswith("cache-") and file.suffix == ".arrow"
        if not (is_about or is_note or is_own):
            kept.append(file)
    return kept


def files_of_split(folder: Path, files: Sequence[Path], split: str, path: str) -> list[Path]:
    """Return the files of `split`, by the names of files and folders; all files if none is named after a split.

    Files without a split's name are training data where no file is named after that. Raises UserError if the split is
    not there, and for named and unnamed training files side by side.
    """
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    if not any(splits.values()) and split == "train":
        return list(files)
    unnamed = [file.name for file, found in splits.items() if found is None]
    if unnamed and "train" in splits.values():
        raise UserError(
            f"{path}: some files are named after a split and others are not ({', '.join(unnamed[:3])}): "
            "move these away, or name the one file or folder to read"
        )
    splits = {file: found or "train" for file, found in splits.items()}
    wanted = [_SPLITS.get(part.strip(), part.strip()) for part in split.split("+")]
    known = sorted({found for found in splits.values() if found})
    for part in wanted:
        if part not in known:
            raise UserError(
                f"{path}: corpus.split: no split '{part}' in this folder{did_you_mean(part, known)}: give one of them, "
                "or several as train+test"
            )
    return [file for file, found in splits.items() if found in wanted]


def _split_of(name: Path) -> str | None:
    """Return the split that a name below the corpus's folder tells, the innermost folder or file first."""
    bare = Path(re.sub(r"\.(gz|zst|xz)$", "", name.name)).stem
    for part in (bare, *reversed(name.parts[:-1])):
        words = [word for word in re.findall(r"[a-z]+", part.lower()) if word != "of"]  # train-00000-of-00001
        for word in words[:1] + words[-1:]:
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _has_tables(folder: Path, files: Iterable[Path]) -> bool:
    return any(file.suffix == ".arrow" and folder in file.parents for file in files)
