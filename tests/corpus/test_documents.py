"""Documents are what the rows hold, under a fingerprint of their content; malformed rows are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from distill.corpus import documents as documents_module
from distill.corpus.documents import corpus_fingerprint, faults_in, load_documents
from distill.corpus.faults import refusal
from distill.corpus.reading import find_sources
from distill.corpus.shapes import Columns
from distill.errors import UserError

Write = Callable[..., str]
USER = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "The fox."}


def fingerprint(table: datasets.Dataset) -> str:
    return corpus_fingerprint(table, np.ones(len(table), dtype=bool))


def load(path: str, **columns_by_meaning: str) -> datasets.Dataset:
    """The table of documents; its bad rows are refused."""
    columns = Columns.of(columns_by_meaning)
    sources = find_sources(path, None, "train", columns)
    table = load_documents(sources)
    if faults := faults_in(table, table):
        raise refusal(faults, len(table), [source.label for source in sources])
    return table


def test_text_is_kept_to_the_letter_and_blank_text_is_empty(write: Write) -> None:
    table = load(write("a.jsonl", [{"text": "  a\n"}, {"text": " \n\t"}, {"text": ""}]))
    assert table["document"][:] == ["  a\n", "", ""]
    assert [share <= 1 for share in table["share"]] == [True, False, False]


def test_another_column(write: Write) -> None:
    assert load(write("a.jsonl", [{"body": "x", "text": "y"}]), text="body")["document"][:] == ["x"]


def test_fingerprint_is_of_content_and_order(write: Write, tmp_path: Path) -> None:
    a, b = {"text": "a"}, {"text": "b"}
    base = fingerprint(load(write("a.jsonl", [a, b])))
    assert len(base) == 64
    assert fingerprint(load(write("extra.jsonl", [a | {"id": 3}, {"text": " "}, b]))) == base
    assert fingerprint(load(write("a.csv", "text\na\nb\n"))) == base
    write("folder/1.txt", "a")
    write("folder/2.txt", "b")
    assert fingerprint(load(str(tmp_path / "folder"))) == base
    others = [[b, a], [a], [{"text": "ab"}], [a, b, b]]
    assert len({base, *(fingerprint(load(write(f"o{i}.jsonl", o))) for i, o in enumerate(others))}) == 5


def test_conversations_are_the_same_from_json_and_parquet(write: Write, tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]}
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, call, ANSWER]}]
    from_json = load(write("a.jsonl", rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_parquet = load(str(tmp_path / "a.parquet"))
    assert fingerprint(from_json) == fingerprint(from_parquet)
    assert '"arguments": {"b": 1, "a": 2}' in from_json[1]["document"], "a template may print the keys in this order"
    assert "null" not in from_parquet[0]["document"]


def test_messages_win_over_text(write: Write) -> None:
    assert load(write("a.jsonl", [{"text": "x", "messages": [USER]}]))[0]["conversation"]


def test_an_edited_file_is_read_anew_even_with_the_same_size_and_date(write: Write) -> None:
    path = write("a.jsonl", [{"text": "old"}])
    times = (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns)
    assert load(path)["document"][:] == ["old"]
    write("a.jsonl", [{"text": "new"}])
    os.utime(path, ns=times)
    assert load(path)["document"][:] == ["new"]


def test_an_unchanged_file_is_not_read_twice(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", [{"text": "a"}])
    load(path)
    monkeypatch.setattr(documents_module, "read_documents", lambda *_: pytest.fail("read again"))
    os.rename(path, path.replace("a.jsonl", "b.jsonl"))
    assert load(path.replace("a.jsonl", "b.jsonl"))["document"][:] == ["a"]


def test_a_failed_reading_leaves_nothing_behind(write: Write) -> None:
    path = write("a.jsonl", b'{"text": "a"}\n\xff\n')
    for _ in range(2):
        with pytest.raises(UserError, match="not UTF-8"):
            load(path)


BAD_ROWS: list[tuple[list[Any], str]] = [
    ([{"body": "x", "id": 1}], r"row 1: no column 'text' or 'messages' \(known: body, id\): name the columns"),
    ([{"text": "x"}, {"tex": "x"}], r"row 2: no column 'text'.*did you mean 'tex'"),
    ([{"text": "x"}, {"text": None}], r"row 2: column 'text' is null, not text"),
    ([{"text": 3}], r"row 1: column 'text' is int, not text"),
    ([{"text": "\ud800"}], r"row 1: not text"),
    (
        [{"text": "x"}, {"messages": [USER]}],
        r"row 2: is a conversation, but .*row 1 is plain text: make two corpus.sources",
    ),
    ([{"messages": "Who?"}], r"row 1: messages are a str, not a list"),
    ([{"messages": None}], r"row 1: messages are a NoneType"),
    ([{"messages": [USER, "x"]}], r"row 1: message 2: needs a role and a content.*found: str"),
    ([{"messages": [{"speaker": "human", "value": "x"}]}], r"row 1: message 1: needs a role.*found: speaker, value"),
    (
        [{"messages": [{"role": "asistant", "content": "x"}]}],
        r"row 1: message 1: unknown role 'asistant'; did you mean 'assistant'",
    ),
    ([{"messages": [USER]}, {"messages": [{"role": "user", "content": 3}]}], r"row 2: message 1: content is int"),
    ([{"messages": [{"role": "user"}]}], r"row 1: message 1: content is null, not text"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_malformed_rows(write: Write, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: " + message):
        load(write("a.jsonl", rows))


def test_missing_column_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text' or 'messages' \(known: body, id\)"):
        load(str(tmp_path / "a.parquet"))


def test_files_of_both_kinds_are_refused(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", [{"messages": [USER, ANSWER]}])
    write("b.txt", "x")
    with pytest.raises(UserError, match=r"b\.txt: row 1: is plain text, but .*a\.jsonl: row 1 is a conversation"):
        load(str(tmp_path))


def test_a_document_too_large_for_memory_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "MAX_DOCUMENT_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"a\.txt: row 1: a document of 2 MiB \(at most 1\): cut it"):
        load(write("a.txt", "x" * (2 << 20)))
