"""A downloaded data set is read by its splits, without the files that tell about it; a saved one as its tables."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from distill.corpus import text_files
from distill.corpus.reading import find_sources
from distill.errors import UserError

Write = Callable[..., str]


def texts(path: str | Path, split: str = "train") -> list[str]:
    return [row["text"] for source in find_sources(str(path), None, split) for _, row in source.rows()]


def fill(write: Write, *names: str) -> None:
    for name in names:
        write(name, [{"text": name}] if name.endswith("jsonl") else name)


NAMED = [
    ("train.jsonl", "validation.jsonl", "test.jsonl"),
    ("data/train-00000-of-00001.jsonl", "data/valid-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
    ("train/0.jsonl", "dev/0.jsonl", "test/0.jsonl"),
    ("rivers_train.jsonl", "rivers_val.jsonl", "rivers_test.jsonl"),
    ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"),
    ("rivers.jsonl", "validation.jsonl", "test.jsonl"),
]


@pytest.mark.parametrize("names", NAMED, ids=lambda names: names[0])
def test_the_split_chooses(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...]
) -> None:
    fill(write, *names)
    assert texts(tmp_path) == [names[0]]
    assert "split train" in caplog.text and Path(names[2]).name in caplog.text
    assert texts(tmp_path, "validation") == [names[1]]
    assert sorted(texts(tmp_path, "train+test")) == sorted([names[0], names[2]])
    with pytest.raises(UserError, match=r"no split 'tset' in this folder; did you mean 'test'"):
        texts(tmp_path, "tset")


def test_a_folder_without_splits_is_read_whole(write: Write, tmp_path: Path) -> None:
    names = ("a.txt", "detrained.txt", "my train journey.txt", "of.txt")
    fill(write, *names)
    assert texts(tmp_path) == sorted(names)
    with pytest.raises(UserError, match=r"no split 'test' in this folder \(known: train\)"):
        texts(tmp_path, "test")


def test_named_and_unnamed_training_files_are_not_guessed_apart(write: Write, tmp_path: Path) -> None:
    fill(write, "train.jsonl", "more.jsonl")
    with pytest.raises(UserError, match=r"some files are named after a split and others are not \(more\.jsonl\)"):
        texts(tmp_path)


def test_files_about_the_data_are_no_documents(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(write, "a.txt", "b.md", "README.md", "LICENSE", "LICENSE.txt", "requirements.txt", "CHANGELOG.md")
    assert texts(tmp_path) == ["a.txt", "b.md"]
    assert "left out 5" in caplog.text


def test_saved_data_sets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b"]})
    data.save_to_disk(tmp_path / "one")
    (tmp_path / "one/cache-1234.arrow").write_bytes(b"left by a map")
    assert texts(tmp_path / "one") == ["a", "b"]
    both = datasets.DatasetDict({"train": data, "test": datasets.Dataset.from_dict({"text": ["c"]})})
    both.save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "two") == ["a", "b"]
    assert texts(tmp_path / "two", "test") == ["c"]


def test_both_formats_of_arrow(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "id": [1, 2, 3]})
    for name, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert texts(tmp_path / f"{name}.arrow") == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_every_damaged_arrow_file_is_rows_or_one_line(tmp_path: Path, kind: str) -> None:
    table, path = pa.table({"text": [f"text {number}" for number in range(20)]}), tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink, getattr(pa.ipc, f"new_{kind}")(sink, table.schema) as writer:
        writer.write_table(table)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            texts(path)
        except (UserError, KeyError) as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 5
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read as \.arrow"):
        texts(path)


LINES = '\n{"text": "one"}\n{"text": "two"}\n'


def test_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    (tmp_path / "a.jsonl.zst").write_bytes(pa.Codec("zstd").compress(LINES.encode(), asbytes=True))
    (tmp_path / "a.tsv").write_text("text\tid\none, 1\t1\ntwo\t2\n")
    for name in ("a.jsonl.xz", "a.jsonl.zst"):
        assert texts(tmp_path / name) == ["one", "two"], name
    assert texts(tmp_path / "a.tsv") == ["one, 1", "two"]


@pytest.mark.parametrize("kind", ["xz", "zst"])
def test_compressed_files_that_grow_or_are_damaged(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(text: bytes) -> bytes:
        return lzma.compress(text) if kind == "xz" else pa.Codec("zstd").compress(text, asbytes=True)

    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(pack(LINES.encode() * 99)[:-5])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{kind}: "):
        texts(path)
    path.write_bytes(b"nothing like it")
    with pytest.raises(UserError, match=rf"a\.jsonl\.{kind}: "):
        texts(path)
    monkeypatch.setattr(text_files, "GZIP_FREE_BYTES", 1000)
    path.write_bytes(pack(b"\n" * 2**22))
    with pytest.raises(UserError, match=rf"a\.jsonl\.{kind}: grows to more than"):
        texts(path)
