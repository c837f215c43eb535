"""Manifests that a stranger wrote: impossible ones are refused in one line, whatever their hash says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.cache.format.folder import read_manifest
from distill.cache.making.repair import repair
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.verify import verify
from distill.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, make_manifest: Any) -> Path:
    CacheWriter(tmp_path / "cache", make_manifest())
    return tmp_path / "cache"


def rewrite(cache: Path, **changes: Any) -> None:
    """A manifest of a stranger who has made its hash anew."""
    (cache / "manifest.json").write_text(replace(read_manifest(cache), **changes).to_json())


@pytest.mark.parametrize(
    "changes",
    [
        {"shard_samples": 0},
        {"shard_samples": 10**15},
        {"shard_samples": "4"},
        {"sequence_length": 10**12},
        {"sequence_length": 24.0},
        {"sequence_length": 2**24},
        {"vocab_size": 2**60},
        {"vocab_size": -1},
        {"splits": {}},
        {"splits": {"held_out": 0, "train": 10**18}},
        {"splits": {"held_out": 0, "train": 2**39}},
        {"splits": {"held_out": -1, "train": 2}},
        {"splits": {"train": 3}},
        {"splits": [0, 14]},
        {"splits": {"held_out": True, "train": 14}},
        {"scheme": "magic"},
        {"scheme": ["varopt"]},
        {"scheme": "\x1b[2Jvaropt"},
        {"scheme_parameters": {"threshold": 0}},
        {"scheme_parameters": {"threshold": 1e-30}},
        {"scheme_parameters": {"threshold": 0.05, "draws": 10**9}},
        {"scheme_parameters": {"entries": 5}},
        {"scheme_parameters": {"\ud800": 5}},
        {"scheme_parameters": None},
        {"temperature": float("inf")},
        {"temperature": 0},
        {"temperature": True},
        {"pack": 1},
        {"seed": 0.5},
        {"fingerprints": {"corpus": 3}},
        {"made_with": []},
    ],
    ids=str,
)
def test_an_impossible_manifest_is_refused_in_one_line(changes: dict[str, Any], cache: Path) -> None:
    rewrite(cache, **changes)
    for touch in (read_manifest, verify, repair, lambda folder: CacheReader(folder, "train")):
        with pytest.raises(UserError, match=r"manifest.json: (damaged|not readable)") as raised:
            touch(cache)
        assert str(raised.value).isprintable()


def test_another_format_version_says_so(cache: Path) -> None:
    for version in (3, 99, "2", None):
        content = json.loads((cache / "manifest.json").read_text())
        (cache / "manifest.json").write_text(json.dumps({**content, "version": version}))
        with pytest.raises(UserError, match=f"format version {version}, this program reads versions 1 and 2"):
            CacheReader(cache, "train")
