"""Every format gives the same rows; whatever cannot be read is answered with the file's name and what to do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from distill.corpus import reading
from distill.corpus.faults import BadRow
from distill.corpus.reading import find_sources
from distill.errors import UserError

Write = Callable[..., str]
TEXTS = ['one, "two"\nthree', "", "naïve \u2028 café"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def texts(path: str) -> list[str]:
    """The rows' texts; the first bad row is refused."""
    found = []
    for source in find_sources(path, None, "train"):
        for number, row in source.rows():
            if isinstance(row, BadRow):
                raise UserError(f"{source.label}: row {number}: {row.reason}")
            found.append(row["text"])
    return found


def as_csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FORMATS: dict[str, str | bytes] = {
    "a.jsonl": LINES,
    "a.jsonl.gz": LINES,
    "windows.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "blank-lines.json": "\n\n" + LINES.replace("\n", "\n\n"),
    "list.json": json.dumps(ROWS, indent=1),
    "list.JSON.gz": json.dumps(ROWS),
    "a.csv": as_csv(ROWS),
    "a.csv.gz": as_csv(ROWS),
    "a.parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(write: Write, name: str) -> None:
    if name.endswith(".gz"):
        path = write(name, FORMATS[name])
        assert Path(path).read_bytes()[:2] == b"\x1f\x8b"
    assert texts(write(name, FORMATS[name])) == TEXTS


def test_an_object_over_several_lines_is_one_row(write: Write) -> None:
    assert texts(write("one.json", json.dumps({"text": "a", "more": {"b": [1]}}, indent=2))) == ["a"]
    (source,) = find_sources(write("rows.json", '{"data": [\n{"text": "a"},\n{"text": "b"}\n]}\n'), None, "train")
    assert list(source.rows()) == [(1, {"data": [{"text": "a"}, {"text": "b"}]})]


def test_a_text_file_is_one_document(write: Write) -> None:
    assert texts(write("a.txt", "one\n\ntwo\r\n")) == ["one\n\ntwo\n"]


def test_long_csv_field(write: Write) -> None:
    assert texts(write("a.csv", as_csv([{"id": 0, "text": "word " * 50_000}]))) == ["word " * 50_000]


def test_folder_recursively_in_order_of_names(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.txt", "sub/a.txt", "a/z.txt", ".hidden/x.txt", ".x.txt"):
        write(name, name)
    write("c.jsonl", [{"text": "c1"}, {"text": "c2"}])
    write("README.md", "left out")
    assert texts(str(tmp_path)) == ["a/z.txt", "b.txt", "c1", "c2", "sub/a.txt"]
    assert texts(str(tmp_path)) and caplog.text.count("README.md") == 1 and "left out 1" in caplog.text


BAD = {
    "bad.jsonl": ('{"text": "a"}\n\n{"text": \n', r"bad\.jsonl: row 3: not JSON"),
    "object.json": ('{\n "text": "a"\n}\n{\n', r"row 1: not JSON.*one object a line, or one list"),
    "number.jsonl": ("3\n", r"row 1: a int, not an object"),
    "latin.txt": ("café".encode("latin-1"), r"latin\.txt: not UTF-8"),
    "latin.jsonl": ('{"text": "café"}'.encode("latin-1"), r"latin\.jsonl: not UTF-8"),
    "not.parquet": (b"PAR1 no", r"not\.parquet: cannot be read as \.parquet"),
    "quote.csv": ('id,text\n1,"open', r"quote\.csv: cannot be read as \.csv"),
    "semicolons.csv": ("text;id\na;1\n", r"the header has no comma, but ';'"),
    "wide.csv": ("id,text\n1,a,b\n", r"row 1: more fields than the header"),
    "a.docx": ("x", r"a\.docx: not a format.*\.parquet"),
    "a.parquet.gz": ("x", r"not a format"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_files(write: Write, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(UserError, match=message):
        texts(write(name, content))


CUT_OFF = gzip.compress(LINES.encode(), mtime=0)[:-9]


@pytest.mark.parametrize("damage", [b"not gzip at all", CUT_OFF], ids=["not gzip", "cut off"])
def test_damaged_gzip(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged or incomplete gzip"):
        texts(str(path))


def test_folder_without_a_corpus(write: Write, tmp_path: Path) -> None:
    write("README.md", "x")
    with pytest.raises(UserError, match="no corpus file in this folder"):
        texts(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/sotu", r"no such file or folder; did you mean 'data/sotu\.jsonl'\? .*not a hub"),
        ("data/sotu.json", r"did you mean 'data/sotu\.jsonl'"),
        ("dta/sotu.jsonl", r"did you mean 'data'"),
        ("./nothing/like/it", r"no such file or folder \("),
        ("nowhere.jsonl", "no such file or folder"),
    ],
)
def test_missing_paths_never_reach_the_hub(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    write("data/sotu.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=message):
        texts(path)


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading.datasets, "load_dataset", load_dataset)
    (source,) = find_sources("owner/data-set_1.0", "tiny", "validation")
    assert asked == [("owner/data-set_1.0", "tiny", "validation")]
    assert list(source.rows()) == [(i, {"text": text}) for i, text in enumerate(TEXTS, start=1)]


def test_hub_failure_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ValueError("Unknown split 'trian'. Should be one of ['train'].\nmore")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading.datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/name: neither .*split trian\): Unknown split 'trian'.*\]\.$"):
        find_sources("owner/name", None, "trian")


def test_an_empty_name_is_no_corpus() -> None:
    for path in ("", "  "):
        with pytest.raises(UserError, match=r"corpus\.path: is empty"):
            find_sources(path, None, "train")


@pytest.mark.parametrize("name", ["chapters", "b.md", "deeper/c"])
def test_a_link_to_nothing_is_said(tmp_path: Path, name: str) -> None:
    """It once was a folder of texts, perhaps, so it is not left out as a file of another format."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "deeper").mkdir()
    (tmp_path / name).symlink_to("gone")
    with pytest.raises(UserError, match=f"{name}: is a link to nothing"):
        find_sources(str(tmp_path), None, "train")


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:  # as for a user who is not root
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
        find_sources(str(tmp_path), None, "train")


def test_every_damaged_parquet_file_is_rows_or_one_line(tmp_path: Path) -> None:
    """Damage lies anywhere: header, pages, footer."""
    whole, refused = as_parquet([{"text": f"text {number} " * 9} for number in range(50)]), 0
    for place in range(0, len(whole), 7):
        (tmp_path / "a.parquet").write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            for source in find_sources(str(tmp_path), None, "train"):
                list(source.rows())
        except UserError as error:
            assert "a.parquet" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20
