"""A tokenizer cut down to the tokens that a text needs: their choice, and the smaller tokenizer itself.

Two kinds are known, BPE and Unigram, which nearly all language models use, as the `tokenizers` library holds them.
Shapes: V the tokenizer's vocabulary.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray

from distill.errors import UserError
from distill.models.tokenizers import vocab_size
from distill.models.vocabulary import Vocabulary

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A piece that stands for one byte (byte fallback)."""
UNTOUCHED = ("tokenizer_config.json", "*.jinja", "additional_chat_templates", "*.py")
"""Files of a saved tokenizer that name no token by its number."""


def needed_tokens(tokenizer: Any, counts_V: NDArray[np.int64]) -> Vocabulary:
    """Choose the tokens that occur (`counts_V` > 0), and those that the smaller tokenizer needs to be whole:

    * all added and special tokens, and the tokens of the chat template's own words;
    * the bytes (without bytes: all single characters), so that any text can still be written;
    * BPE: the pieces through which a token is merged. Then the text is encoded as before, since exactly the merges
      remain that the tokenizer made in it;
    * Unigram: the least probable piece, from whose score the library derives that of an unknown character.

    Raises UserError for a tokenizer of another kind.
    """
    content = _content(tokenizer)
    names = tokenizer.get_vocab()
    assert len(counts_V) == vocab_size(tokenizer), "counts of another vocabulary"
    ids = {int(token) for token in np.flatnonzero(counts_V)}
    ids |= {token["id"] for token in content["added_tokens"]} | set(tokenizer.all_special_ids)
    ids |= {token for text in _template_words(tokenizer) for token in tokenizer.encode(text, add_special_tokens=False)}
    ids |= {number for numbers in _processor_ids(content["post_processor"]) for number in numbers}
    ids |= {names[token] for token in _alphabet(content) if token in names}
    # Short samples are filled with one of these, or with token 0.
    ids |= set() if ids & {tokenizer.pad_token_id, tokenizer.eos_token_id} else {0}
    model = content["model"]
    if model["type"] == "BPE":
        ids |= {names[model["unk_token"]]} if model["unk_token"] in names else set()
        ids |= _pieces(ids, model)
    else:
        scores = [score for _, score in model["vocab"]]
        ids |= {scores.index(min(scores))} | (set() if model["unk_id"] is None else {model["unk_id"]})
    return Vocabulary(torch.tensor(sorted(ids), dtype=torch.int64), len(counts_V))


def trim_tokenizer(tokenizer: Any, vocabulary: Vocabulary) -> Any:
    """Return a tokenizer of the same class with the kept tokens alone, under the student's ids.

    It is as if loaded from a folder. Raises UserError if its class does not come back from a folder with exactly these
    tokens.
    """
    content = trimmed_content(_content(tokenizer), vocabulary)
    to_student = vocabulary.to_student.tolist()
    expected = {token: to_student[old] for token, old in tokenizer.get_vocab().items() if to_student[old] >= 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        untouched = {path for pattern in UNTOUCHED for path in folder.glob(pattern)}
        for path in set(folder.iterdir()) - untouched:  # tokenizer.json and older formats hold the old numbers
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder, trust_remote_code=False)
    trimmed.name_or_path = tokenizer.name_or_path
    if trimmed.get_vocab() != expected:
        raise UserError(
            f"student.vocabulary: corpus: {type(tokenizer).__name__} cannot be cut down to some of its tokens: "
            "use student.vocabulary full"
        )
    return trimmed


def trimmed_content(content: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with the kept tokens alone, renumbered, and all else unchanged."""
    to_student = vocabulary.to_student.tolist()
    model = content["model"]
    if model["type"] == "BPE":
        vocab = {token: to_student[old] for token, old in model["vocab"].items() if to_student[old] >= 0}
        merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocab.keys()]
        model = {**model, "vocab": vocab, "merges": merges}
    else:
        pieces = [piece for old, piece in enumerate(model["vocab"]) if to_student[old] >= 0]
        model = {**model, "vocab": pieces}
        model["unk_id"] = None if model["unk_id"] is None else to_student[model["unk_id"]]
    return {
        **content,
        "model": model,
        "added_tokens": [{**token, "id": to_student[token["id"]]} for token in content["added_tokens"]],
        "post_processor": _renumbered(content["post_processor"], to_student),
        "truncation": None,  # left behind by the last call
        "padding": None,
    }


def _content(tokenizer: Any) -> dict[str, Any]:
    """Return the content of a `tokenizer.json`. Raises UserError for a tokenizer that cannot be trimmed."""
    kind = type(tokenizer).__name__ + " (no fast tokenizer)"
    if getattr(tokenizer, "is_fast", False):
        content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model = content["model"]
        kind = model["type"]
        if kind == "Unigram":
            return content
        if kind == "BPE":
            if not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]:
                return content
            kind = "BPE with marks inside or at the end of a word"
    raise UserError(
        f"student.vocabulary: corpus: a tokenizer of kind {kind} cannot be cut down "
        "(known: BPE without such marks as ## or </w>, and Unigram): use student.vocabulary full"
    )


def _template_words(tokenizer: Any) -> Iterator[str]:
    """Yield the literal text in the chat templates, by grammar, since a rendered template may depend on the date."""
    templates = tokenizer.chat_template or {}
    for source in templates.values() if isinstance(templates, dict) else [templates]:
        for token in jinja2.Environment(trim_blocks=True, lstrip_blocks=True).lexer.tokenize(source):
            if token.type in ("data", "string"):
                yield str(token.value)


def _alphabet(content: dict[str, Any]) -> Iterable[str]:
    """Return the tokens of which any text can be made."""
    from tokenizers import pre_tokenizers

    model = content["model"]
    pieces = [piece for piece, _ in model["vocab"]] if model["type"] == "Unigram" else model["vocab"]
    pieces_of_bytes = [piece for piece in pieces if BYTE.fullmatch(piece)]
    if any('"ByteLevel"' in json.dumps(content[stage]) for stage in ("normalizer", "pre_tokenizer")):
        return [*pieces_of_bytes, *pre_tokenizers.ByteLevel.alphabet()]
    if model["byte_fallback"] and len(pieces_of_bytes) == 256:
        return pieces_of_bytes
    return [*pieces_of_bytes, *(piece for piece in pieces if len(piece) == 1)]


def _pieces(ids: set[int], model: dict[str, Any]) -> set[int]:
    """Return all pieces that a BPE makes on its way to each of the tokens.

    The merges inside a token's place in a word are those of its own text, since none crosses its borders.
    """
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    return {
        model["vocab"][piece]
        for token, number in model["vocab"].items()
        if number in ids
        for piece in _made_on_the_way(token, ranks)
        if piece in model["vocab"]
    }


def _made_on_the_way(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    symbols, seen = list(token), set(token)
    while len(symbols) > 1:
        ranked = [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not ranked:
            break
        _, place = min(ranked)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        seen.add(symbols[place])
    return seen if symbols == [token] else set()  # no merging makes this token, so it has no pieces


def _processor_ids(processor: Any) -> Iterator[list[int]]:
    """Yield the ids in a post-processor: lists of them (a template), or one beside its token (BERT's and RoBERTa's)."""
    if isinstance(processor, dict):
        for key, value in processor.items():
            if key == "ids":
                yield value
            elif key in ("sep", "cls") and isinstance(value, list):
                yield [value[1]]
            else:
                yield from _processor_ids(value)
    elif isinstance(processor, list):
        for value in processor:
            yield from _processor_ids(value)


def _renumbered(processor: Any, to_student: list[int]) -> Any:
    if isinstance(processor, list):
        return [_renumbered(value, to_student) for value in processor]
    if not isinstance(processor, dict):
        return processor
    changed = dict(processor)
    for key, value in processor.items():
        if key == "ids":
            changed[key] = [to_student[old] for old in value]
        elif key in ("sep", "cls") and isinstance(value, list):
            changed[key] = [value[0], to_student[value[1]]]
        else:
            changed[key] = _renumbered(value, to_student)
    return changed
