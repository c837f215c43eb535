"""Table of documents made from the rows of any source: plain texts, or conversations as JSON."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow.compute

from distill.corpus.conversations import Conversation
from distill.corpus.faults import BadRow, Fault
from distill.corpus.reading import Row
from distill.corpus.shapes import WRITTEN, Columns, shape_of
from distill.corpus.written import COLUMN, Text
from distill.errors import UserError, did_you_mean
from distill.models.generation import decode_text

READER_VERSION = 5
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
        "fault": datasets.Value("string"),  # the reason why the row is no document; "" for a good one
    }
)


class Rows(Protocol):
    """A file or data set, as numbered rows of columns."""

    @property
    def label(self) -> str:
        """The name in messages."""

    @property
    def columns(self) -> Columns:
        """The names that the user gave to columns."""

    @property
    def owner(self) -> int:
        """Number of the corpus's source that it belongs to."""

    @property
    def limit(self) -> int | None:
        """Largest number of rows that are read of that source."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows, numbered from 1."""


class WholeRows(Rows, Protocol):
    """Rows whose content is known beforehand."""

    def content_key(self) -> str:
        """Return a text that changes with the content."""


def load_documents(sources: Sequence[WholeRows]) -> datasets.Dataset:
    """Load the documents of all `sources` in order, empty ones included, as a memory-mapped table (see `FEATURES`).

    The table is kept in the cache folder of `datasets` under a hash of the files' bytes, and read from there next time.
    """
    key = json.dumps([READER_VERSION, [_key(source) for source in sources]])

    def documents() -> Iterator[dict[str, Any]]:
        is_empty = True
        for document in read_documents(sources):
            is_empty = False
            yield document
        if is_empty:
            named = ", ".join(source.label for source in sources[:3])
            raise UserError(f"{named}: no document in it, not even an empty one")

    return keep_table(documents, hashlib.sha256(key.encode()).hexdigest())


def keep_table(documents: Callable[[], Iterator[dict[str, Any]]], key: str) -> datasets.Dataset:
    """Return a table (see `FEATURES`) from the cache folder of `datasets`, made there if there is none of `key`."""
    try:
        return datasets.Dataset.from_generator(
            documents,
            features=FEATURES,
            fingerprint=key,
            writer_batch_size=64,  # documents held in memory at one time
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (UserError, OSError)):
            raise error.__cause__ from None
        raise


def are_conversations(documents: datasets.Dataset) -> bool:
    """Tell whether there are conversations among the documents."""
    return bool(documents.data.column("conversation").to_numpy().any())


def corpus_fingerprint(documents: datasets.Dataset, kept: np.ndarray) -> str:
    """Return the sha256 (hex) of the content of the `kept` documents (bool) in order. Empty ones do not change it."""
    conversations = documents.data.column("conversation").to_numpy()
    is_mixed = kept.any() and len(np.unique(conversations[kept])) > 1
    kind = b"mixed" if is_mixed else b"messages" if conversations.any() else b"text"
    digest, first = hashlib.sha256(kind), 0
    for batch in documents.select_columns(["digest", "conversation"]).iter(batch_size=4096):
        found = batch["digest"]
        if is_mixed:
            kinds = (b"m" if is_one else b"t" for is_one in batch["conversation"])
            found = [kind + each for kind, each in zip(kinds, found, strict=True)]
        digest.update(b"".join(itertools.compress(found, kept[first : first + len(found)])))
        first += len(found)
    return digest.hexdigest()


def texts_of(documents: datasets.Dataset, rows: np.ndarray, tokenizer: Any) -> Iterator[str]:
    """Yield the texts in some rows, in the table's order: plain texts, the contents of messages, and decoded tokens."""
    chosen = documents.select_columns(["document", "conversation", "shape"]).select(np.sort(rows))
    for batch in chosen.iter(batch_size=64):
        columns = (batch[name] for name in ("document", "conversation", "shape"))
        for document, is_conversation, shape in zip(*columns, strict=True):
            if shape == WRITTEN:
                yield decode_text(tokenizer, json.loads(document)["input_ids"])
            elif is_conversation:
                contents = (message.get("content") for message in Conversation.parse(document).messages)
                yield from (content for content in contents if isinstance(content, str))
            else:
                yield document


def find_duplicates(hashes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return a mask of the `kept` documents whose content was there before. `hashes` are `document_hashes`.

    The first 8 bytes of a sha256 differ for different texts: among 10 million documents, in all but 1 of 400,000 cases.
    """
    places = np.flatnonzero(kept & (hashes != 0))
    _, first = np.unique(hashes[places], return_index=True)
    found = np.zeros(len(hashes), dtype=bool)
    found[np.delete(places, first)] = True
    return found


def faults_in(table: datasets.Dataset, documents: datasets.Dataset) -> list[Fault]:
    """Return the faults in a table's column of that name. `documents` tells where the rows come from."""
    reasons = table.data.column("fault")
    places = np.flatnonzero(pyarrow.compute.greater(pyarrow.compute.binary_length(reasons), 0).to_numpy())
    sources, rows = (documents.data.column(name).to_numpy()[places].tolist() for name in ("source", "row"))
    found = reasons.take(places).to_pylist()
    return [Fault(*each) for each in zip(places.tolist(), sources, rows, found, strict=True)]


def document_hashes(documents: datasets.Dataset) -> np.ndarray:
    """Return int64 `[documents]`: the first 8 bytes of each digest, little-endian; 0 for an empty document."""
    first = b"".join(
        digest[:8].ljust(8, b"\0")
        for batch in documents.select_columns(["digest"]).iter(batch_size=4096)
        for digest in batch["digest"]
    )
    return np.frombuffer(first, dtype="<i8").astype(np.int64)


def _key(source: WholeRows) -> list[Any]:
    """Return what determines a source's part of the table, as JSON values."""
    return [source.owner, source.limit, source.columns.key(), source.content_key()]


First = tuple[bool, str]
"""Kind (True for a conversation) and place of the first good row of a corpus's source."""


def read_documents(
    sources: Sequence[Rows], behind: tuple[int, int] = (0, 0), before: First | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table (see `FEATURES`) from behind a place, a file's number and a row's, on.

    `before` is the first good row where rows of the only source were read before: a row of another kind is a bad one.
    Raises UserError at the end if the user named a column that no row has.
    """
    unseen = {source.owner: set(source.columns.may_lack) for source in sources}
    seen: dict[int, set[str]] = {}
    first: dict[int, First] = {} if before is None else {0: before}  # of each owner
    rows: Counter[int] = Counter()
    for index, source in enumerate(sources):
        if index < behind[0]:
            continue
        left = None if source.limit is None else max(source.limit - rows[source.owner], 0)
        for number, row in itertools.islice(source.rows(), left):
            if (index, number) <= behind:
                continue
            where = f"{source.label}: row {number}"
            if unseen[source.owner] and not isinstance(row, BadRow):
                unseen[source.owner].difference_update(row)
                seen.setdefault(source.owner, set()).update(row)
            try:
                found = _read(row, source.columns, where)
                kind, place = first.setdefault(source.owner, (found["conversation"], where))
                if found["conversation"] != kind:
                    here, there = _KINDS[not kind], _KINDS[kind]
                    raise UserError(f"{where}: is {here}, but {place} is {there}: make two corpus.sources of them")
            except UserError as error:
                found = NO_DOCUMENT | {"fault": str(error).removeprefix(f"{where}: ")}
            yield found | {"source": index, "row": number}
            rows[source.owner] += 1
    if behind == (0, 0):
        _check_seen(sources, unseen, seen)


def _check_seen(sources: Sequence[Rows], unseen: Mapping[int, set[str]], seen: Mapping[int, set[str]]) -> None:
    """Raise UserError for a column that no row of a source has, though the user named it."""
    for source in sources:
        for column in sorted(unseen[source.owner]):
            near = did_you_mean(column, sorted(seen.get(source.owner, [])))
            raise UserError(
                f"{source.label}: no row has the column '{column}', which corpus.columns names{near}: mend the name, "
                "or take it out"
            )


_KINDS = ("plain text", "a conversation")
NO_DOCUMENT = {"document": "", "conversation": False, "shape": -1, "digest": b"", "share": 2.0, "fault": ""}


def _read(row: Mapping[str, Any] | BadRow, columns: Columns, where: str) -> dict[str, Any]:
    """Return a row of the table but for its place. Raises UserError for a bad row."""
    if isinstance(row, BadRow):
        raise UserError(f"{where}: {row.reason}")
    shape = shape_of(row, columns)
    if shape is None:
        raise UserError(f"{where}: {_no_shape(row, columns)}")
    content, kind = shape.document(row, where)
    found = NO_DOCUMENT | {"conversation": shape.is_conversation, "shape": kind} | _document(content, where)
    return found | {"share": Text.of(row[COLUMN], where).share} if kind == WRITTEN else found


def _no_shape(row: Mapping[str, Any], columns: Columns) -> str:
    inner = next((name for name, value in row.items() if _are_rows(value)), None)
    if inner is not None:
        return f"the rows are under '{inner}', in one object: write a file with that list alone"
    if columns.named:
        missing = next(name for _, name in columns.named if name not in row)
        return f"no column '{missing}', which corpus.columns names{did_you_mean(missing, row)}"
    return (
        f"no column 'text' or 'messages'{did_you_mean('text', row)}: name the columns with corpus.columns, such as "
        "{text: NAME}, {messages: NAME} or {prompt: NAME, completion: NAME}"
    )


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


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
