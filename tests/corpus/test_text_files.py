"""A corpus from anyone: a file that never ends, that grows without end, or that lies elsewhere is refused."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.corpus import text_files
from distill.corpus.reading import find_sources
from distill.errors import UserError

ROW = '{"text": "The cat sat on the mat."}\n'


def rows(path: Path) -> int:
    sources = find_sources(str(path), None, "train")
    return sum(1 for source in sources for _ in source.rows())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus/deeper").mkdir(parents=True)
    for name in ("a.jsonl", "deeper/b.jsonl"):
        (tmp_path / "corpus" / name).write_text(ROW)
    return tmp_path / "corpus"


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
def test_a_gzip_file_that_grows_without_end_meets_a_limit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "GZIP_FREE_BYTES", 1000)
    path = tmp_path / f"a.{kind}.gz"
    start = {"json": b"[", "csv": b"text\n"}.get(kind, b"")
    for piece in (b" " * 2**24, b"\n" * 2**24, ROW.encode() * 2**19, b'{"a":0}\n' * 2**21):
        path.write_bytes(gzip.compress(start + piece))
        if kind != "csv" or piece[:1] != b"{":  # which would be refused as it is
            with pytest.raises(UserError, match=r"a\.\w+\.gz: grows to more than .* 200 times"):
                rows(path)


def test_what_people_compress_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "GZIP_FREE_BYTES", 0)
    lines = [f'{{"number": {i}, "text": "The cat sat on the mat.", "empty": null}}\n' for i in range(2000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    assert rows(tmp_path / "a.jsonl.gz") == 2000


def test_a_line_without_end_meets_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1000)
    for name, text in (("a.jsonl", ROW + " " * 1000 + ROW), ("b.jsonl", " " * 1001), ("c.csv", "text\n" + "x" * 1001)):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}: a line of more than"):
            rows(tmp_path / name)
    (tmp_path / "d.jsonl").write_text(ROW + " " * (1000 - len(ROW)) + ROW)
    assert rows(tmp_path / "d.jsonl") == 2


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("x", path)]
)
@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "deeper/c.csv", "c.json.gz", "c.parquet"])
def test_pipes_devices_and_links_to_nothing_are_refused(make: Callable[[Path], None], name: str, corpus: Path) -> None:
    make(corpus / name)
    with pytest.raises(UserError, match=f"{name}: is (no plain file|a link out of|a link to nothing)"):
        rows(corpus)
    if os.path.exists(corpus / name):
        with pytest.raises(UserError, match="is no plain file"):
            rows(corpus / name)


@pytest.mark.parametrize("what", ["a file", "a folder", "a file of another kind"])
def test_no_link_is_followed_out_of_a_corpus(what: str, corpus: Path, tmp_path: Path) -> None:
    """A corpus is copied into a cache, and a secret would be with it."""
    if what == "a folder":
        shutil.copytree(corpus, tmp_path / "elsewhere")
        (corpus / "c").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "secret").write_text(ROW)
        (corpus / ("c.jsonl" if what == "a file" else "c.md")).symlink_to("../secret")
    with pytest.raises(UserError, match=r"is a link out of .* not followed"):
        rows(corpus)


def test_links_inside_and_the_links_that_a_user_names_are_followed(corpus: Path, tmp_path: Path) -> None:
    (corpus / "c.jsonl").symlink_to("deeper/b.jsonl")
    (tmp_path / "mine").symlink_to(corpus)
    (tmp_path / "one.jsonl").symlink_to(corpus / "a.jsonl")
    assert (rows(tmp_path / "mine"), rows(tmp_path / "one.jsonl")) == (3, 1)
