"""The teacher's tokenizer beside the shards, with the hashes of its files in a list that `sha256sum -c` reads too."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Protocol

from distill.cache.format.folder import TOKENIZER
from distill.errors import UserError
from distill.system.files import TEMPORARY, read_bounded, sha256_of, sync_folder
from distill.system.locks import cannot_write

SUMS = "SHA256SUMS"
_LIMIT = 2**20
_AGAIN = "run `distill cache-teacher` again, it writes the tokenizer anew"


class Tokenizer(Protocol):
    """The one method that is needed of a Hugging Face tokenizer."""

    def save_pretrained(self, folder: Path, /) -> object: ...


def save_tokenizer(cache: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer, all of it or nothing, unless a whole one is there."""
    folder = cache / TOKENIZER
    if not tokenizer_problems(cache):
        return
    unfinished = folder.with_name(TOKENIZER + TEMPORARY)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        _save(tokenizer, unfinished)
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
        sync_folder(cache)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise cannot_write(cache, error) from None


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers' own errors have no other class
        code = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
        raise OSError(code, str(error)) from error
    _forget_the_way(folder / "tokenizer_config.json")
    files = sorted(folder.iterdir())
    (folder / SUMS).write_bytes(b"".join(f"{sha256_of(path)}  {path.name}\n".encode() for path in files))
    for path in (*files, folder / SUMS):
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    sync_folder(folder)


def _forget_the_way(config: Path) -> None:
    """Remove transformers' notes about how it found the tokenizer (offline, in a local folder)."""
    if config.exists():
        content = json.loads(config.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in ("is_local", "local_files_only")}
        config.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_problems(cache: Path) -> dict[str, str]:
    """Return the faults of the tokenizer's files, by name in the cache; empty if each is as written."""
    folder = cache / TOKENIZER
    sums = f"{TOKENIZER}/{SUMS}"
    try:
        lines = read_bounded(folder / SUMS, _LIMIT).decode("utf-8").split("\n")
        pairs = [line.split("  ", 1) for line in lines[:-1]]
        expected = {name: digest for digest, name in pairs}
    except FileNotFoundError:
        return {sums: "is missing"}
    except (ValueError, OSError) as error:
        return {sums: f"has changed ({error})"}
    if lines[-1] or list(expected) != sorted(expected) or len(pairs) != len(expected):
        return {sums: "has changed"}
    there = {path.name for path in folder.iterdir()} - {SUMS}
    problems = {f"{TOKENIZER}/{name[:100]}": "is missing" for name in sorted(expected.keys() - there)}
    for name in sorted(there):
        if name not in expected:
            problems[f"{TOKENIZER}/{name}"] = "is not part of the tokenizer"
        elif not _matches(folder / name, expected[name]):
            problems[f"{TOKENIZER}/{name}"] = "has changed"
    return problems


def _matches(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError:
        return False


def checked_tokenizer(cache: Path) -> Path:
    """Return the tokenizer's folder. Raises UserError if a bit of it has changed."""
    for name, problem in tokenizer_problems(cache).items():
        raise UserError(f"{cache / name} {problem}: {_AGAIN}")
    return cache / TOKENIZER
