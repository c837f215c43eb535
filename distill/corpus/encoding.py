"""Tokenisation of documents, once, into a memory-mapped table of token ids and loss masks."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from distill.corpus.conversations import Conversation
from distill.corpus.documents import are_conversations
from distill.corpus.faults import RowError
from distill.corpus.long_texts import PIECE, long_ids
from distill.corpus.shapes import WRITTEN
from distill.corpus.templates import DEFAULTS, ChatTemplate, Learning, Rendered, tokens_from, tokens_in_spans
from distill.models.tokenizers import vocab_size

ENCODER_VERSION = 6
"""Part of the key of stored tables. Raise it when the same document gives other tokens or another mask."""

BATCH_BYTES = 4 << 20
"""Bytes of text that are tokenised at a time. The tokenizer needs about a hundred times that in memory."""

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),  # True where the document's next token is to be learned
        "learned": datasets.Value("int64"),  # number of True in loss_mask
        "thoughts": datasets.Value("int32"),  # thoughts that the chat template takes out
        "endless": datasets.Value("int32"),  # 1 for a conversation whose last learned answer has no end-of-turn token
        "fault": datasets.Value("string"),  # the reason why a conversation cannot be learned; "" for a good one
        "turns": datasets.List(datasets.Value("int32")),  # tokens at which a turn begins after an answer
        "openings": datasets.List(datasets.Value("int32")),  # tokens behind the system's and the first user's message
    }
)

Batch = dict[str, list[Any]]
Encoder = Callable[[Batch], Batch]


def encode(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    learning: Learning = DEFAULTS,
) -> datasets.Dataset:
    """Return a row of tokens (see `FEATURES`) for every row of `documents`. An empty document has no tokens.

    The table is kept beside that of the documents, under a hash of both and of everything that the tokenizer saves.
    `labels` are the sources' names, for messages to the user; `learning` says what is learned of conversations.
    """
    batch_size = max(1, min(512, BATCH_BYTES * len(documents) // max(1, documents.data.nbytes)))
    conversations = are_conversations(documents)
    function = _by_kind(
        {
            _WRITTEN: lambda: _take_written(vocab_size(tokenizer), everything=learning.turns == "all"),
            _CONVERSATION: lambda: _encode_conversations(tokenizer, labels, learning),
            _PLAIN: lambda: _encode_texts(tokenizer),
        }
    )
    key = f"{ENCODER_VERSION} {documents._fingerprint} {_tokenizer_key(tokenizer)} {learning if conversations else ''}"
    return documents.map(
        function,
        batched=True,
        batch_size=batch_size,
        writer_batch_size=batch_size,
        remove_columns=documents.column_names,
        features=FEATURES,
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest(),
    )


_PLAIN, _CONVERSATION, _WRITTEN = range(3)


def _by_kind(makers: Mapping[int, Callable[[], Encoder]]) -> Encoder:
    """Return a function that gives each row of a batch to the encoder of its kind, made when its first row comes."""
    made: dict[int, Encoder] = {}

    def function(batch: Batch) -> Batch:
        kinds = np.array(batch["conversation"], dtype=np.int64)
        kinds[np.array(batch["shape"]) == WRITTEN] = _WRITTEN
        table: Batch = {name: [None] * len(kinds) for name in FEATURES}
        for kind in np.unique(kinds).tolist():
            encode_kind = made.get(kind) or made.setdefault(kind, makers[kind]())
            rows = np.flatnonzero(kinds == kind).tolist()
            found = encode_kind({name: [column[row] for row in rows] for name, column in batch.items()})
            for name, values in found.items():
                for row, value in zip(rows, values, strict=True):
                    table[name][row] = value
        return table

    return function


def _encode_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[Batch], Batch]:
    """Return a function that tokenises plain texts with the tokenizer's own special tokens.

    A text that does not end with the end-of-text token gets one.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def function(batch: Batch) -> Batch:
        long = {text: found for text in batch["document"] if (found := _long(tokenizer, text)) is not None}
        texts = [text for text in batch["document"] if text and text not in long]
        encoded = iter(_token_ids(tokenizer, texts)["input_ids"]) if texts else iter(())
        ids = [long[text] if text in long else next(encoded) if text else [] for text in batch["document"]]
        ids = [row + end if row and row[-1:] != end else row for row in ids]
        return _table([np.asarray(row, dtype=np.int32) for row in ids], [np.ones(len(row), dtype=bool) for row in ids])

    return function


def _long(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Return the ids of a long text, with the special tokens around it; None for one that is tokenised at once."""
    if len(text) < 2 * PIECE or (ids := long_ids(tokenizer, text)) is None:
        return None
    framed, plain = (_token_ids(tokenizer, ["a"], add_special_tokens=on)["input_ids"][0] for on in (True, False))
    at = next((at for at in range(len(framed)) if framed[at : at + len(plain)] == plain), 0)
    return [*framed[:at], *ids, *framed[at + len(plain) :]]


def _encode_conversations(
    tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], learning: Learning
) -> Callable[[Batch], Batch]:
    """Return a function that renders and tokenises conversations, with loss on the learned characters' tokens alone."""
    template = ChatTemplate.of(tokenizer, learning)
    nothing = Rendered("", [])

    def function(batch: Batch) -> Batch:
        conversations = [Conversation.parse(document) if document else None for document in batch["document"]]
        template.render_ahead([conversation for conversation in conversations if conversation])
        rendered, faults = [], []
        for conversation, source, row in zip(conversations, batch["source"], batch["row"], strict=True):
            where, fault = f"{labels[source]}: row {row}", ""
            try:
                rendered.append(template.render(conversation, where) if conversation else nothing)
            except RowError as error:
                rendered.append(nothing)
                fault = str(error).removeprefix(f"{where}: ")
            faults.append(fault)
        encoded = _token_ids(
            tokenizer, [found.text for found in rendered], add_special_tokens=False, return_offsets_mapping=True
        )
        places = [np.asarray(row, dtype=np.int64).reshape(-1, 2) for row in encoded["offset_mapping"]]
        answers = [tokens_in_spans(at, found.spans) for at, found in zip(places, rendered, strict=True)]
        table = _table([np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]], answers)
        return table | {
            "thoughts": [found.thoughts_left_out for found in rendered],
            "endless": [int(found.is_endless) for found in rendered],
            "fault": faults,
            "turns": [tokens_from(at, found.turns) for at, found in zip(places, rendered, strict=True)],
            "openings": [tokens_from(at, found.openings) for at, found in zip(places, rendered, strict=True)],
        }

    return function


def _take_written(size: int, everything: bool) -> Callable[[Batch], Batch]:
    """Return a function that takes the token ids of texts that a model wrote, with loss on the written tokens alone.

    `size` is the number of tokens of the vocabulary; `everything`: the prompts are learned too.
    """

    def function(batch: Batch) -> Batch:
        ids, to_learn, faults = [], [], []
        for document in batch["document"]:
            found: dict[str, Any] = json.loads(document) if document else {"input_ids": [], "prompt_tokens": 0}
            highest = max(found["input_ids"], default=0)
            is_known = highest < size
            faults.append("" if is_known else f"has token {highest}, and the tokenizer has {size} tokens")
            ids.append(np.asarray(found["input_ids"] if is_known else [], dtype=np.int32))
            first = 0 if everything else int(found["prompt_tokens"])
            to_learn.append(np.arange(len(ids[-1])) >= first)
        return _table(ids, to_learn) | {"fault": faults}

    return function


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: bool) -> Any:
    """Tokenise texts without a warning about their length: packing cuts documents that are longer than the model's
    context.
    """
    unused = {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, padding=False, truncation=False, verbose=False, **unused, **options)


def _table(ids: list[np.ndarray], to_learn: list[np.ndarray]) -> Batch:
    """Shift "this token is to be learned" by one place, to the position that predicts it.

    The next-token shift of the loss mask happens here and nowhere else. The last position predicts nothing.
    """
    masks = [np.append(row[1:], False) if len(row) else row for row in to_learn]
    table: Batch = {"input_ids": ids, "loss_mask": masks, "learned": [int(mask.sum()) for mask in masks]}
    nothing: list[list[int]] = [[]] * len(ids)
    table |= {"turns": nothing, "openings": nothing}
    return table | {"thoughts": [0] * len(ids), "endless": [0] * len(ids), "fault": [""] * len(ids)}


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that the tokenizer saves (vocabulary, rules, chat template) and of its code's
    version.
    """
    digest = hashlib.sha256()
    digest.update(f"{type(tokenizer).__qualname__} {transformers.__version__} {tokenizers.__version__}".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
