"""Table of documents made from the rows of any source: plain texts, or conversations as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from distill.corpus.reading import Source
from distill.corpus.shapes import BY_NAME, Columns, find_shape
from distill.errors import UserError, did_you_mean

READER_VERSION = 2
"""Part of the key of stored tables. Raise it when the same file gives another table."""

MAX_DOCUMENT_BYTES = 32 << 20
"""Largest document; a larger one is refused, because tokenising it takes a hundred times its size in memory."""

FEATURES = datasets.Features(
    {
        "document": datasets.Value("large_string"),  # the text, or the messages as JSON; "" when there is nothing
        "conversation": datasets.Value("bool"),
        "shape": datasets.Value("int8"),  # number in `shapes.NAMES`
        "digest": datasets.Value("binary"),  # sha256 of the content; empty for an empty document
        "share": datasets.Value("float64"),  # the digest as a number in [0, 1]; 2 for an empty document
        "source": datasets.Value("int32"),
        "row": datasets.Value("int64"),
    }
)


def load_documents(sources: Sequence[Source], columns: Columns = BY_NAME) -> datasets.Dataset:
    """Load the documents of all `sources` in order, empty ones included, as a memory-mapped table (see `FEATURES`).

    `columns` are the names that the user gave. The table is kept in the cache folder of `datasets` under a hash of the
    files' bytes and read from there next time.
    """
    key = json.dumps([READER_VERSION, columns.key(), [source.content_key() for source in sources]])
    try:
        return datasets.Dataset.from_generator(
            lambda: _documents(sources, columns),
            features=FEATURES,
            fingerprint=hashlib.sha256(key.encode()).hexdigest(),
            writer_batch_size=64,  # documents held in memory at one time
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (UserError, OSError)):
            raise error.__cause__ from None
        raise


def corpus_fingerprint(documents: datasets.Dataset) -> str:
    """Return the sha256 (hex) of the documents' content in order. Empty documents do not change it."""
    kind = b"messages" if documents[0]["conversation"] else b"text"
    digest = hashlib.sha256(kind)
    for batch in documents.select_columns(["digest"]).iter(batch_size=4096):
        digest.update(b"".join(batch["digest"]))
    return digest.hexdigest()


def document_hashes(documents: datasets.Dataset) -> np.ndarray:
    """Return int64 `[documents]`: the first 8 bytes of each digest, little-endian; 0 for an empty document."""
    first = b"".join(
        digest[:8].ljust(8, b"\0")
        for batch in documents.select_columns(["digest"]).iter(batch_size=4096)
        for digest in batch["digest"]
    )
    return np.frombuffer(first, dtype="<i8").astype(np.int64)


def _documents(sources: Sequence[Source], columns: Columns) -> Iterator[dict[str, Any]]:
    first = None
    for index, source in enumerate(sources):
        for number, row in source.rows():
            where = f"{source.label}: row {number}"
            shape = find_shape(tuple(row), columns)
            if shape is None:
                raise UserError(f"{where}: {_no_shape(row, columns)}")
            first = first or (shape.is_conversation, where)
            if shape.is_conversation != first[0]:
                kinds = ("a conversation", "plain text") if shape.is_conversation else ("plain text", "a conversation")
                raise UserError(f"{where} is {kinds[0]} but {first[1]} is {kinds[1]}: make two corpora of them")
            content, kind = shape.document(row, where)
            found = {"conversation": shape.is_conversation, "shape": kind, "source": index, "row": number}
            yield _document(content, where) | found
    if first is None:
        raise UserError(
            f"{', '.join(source.label for source in sources[:3])}: no document in it, not even an empty one"
        )


def _no_shape(row: Mapping[str, Any], columns: Columns) -> str:
    if columns.named:
        missing = next(name for _, name in columns.named if name not in row)
        return f"no column '{missing}', which corpus.columns names{did_you_mean(missing, row)}"
    return (
        f"no column 'text' or 'messages'{did_you_mean('text', row)}: name the columns with corpus.columns, such as "
        "{text: NAME}, {messages: NAME} or {prompt: NAME, completion: NAME}"
    )


def _document(content: Any, where: str) -> dict[str, Any]:
    if not content:
        return {"document": "", "digest": b"", "share": 2.0}
    try:
        if isinstance(content, str):
            document = canonical = content
        else:
            # The document keeps the user's order of keys, because a template may print them. The hash sorts them.
            document = json.dumps(content, ensure_ascii=False)
            canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        encoded = canonical.encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError(f"{where}: not text: {error}") from error
    if len(encoded) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{where}: a document of {len(encoded) / 2**20:.0f} MiB (at most {MAX_DOCUMENT_BYTES >> 20}): cut it into "
            "documents, for example one a line of a .jsonl file"
        )
    digest = hashlib.sha256(encoded).digest()
    return {"document": document, "digest": digest, "share": int.from_bytes(digest[:8], "big") / 2**64}
