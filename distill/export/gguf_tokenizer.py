"""A tokenizer in llama.cpp's terms: byte-level BPE with one of its word rules, or SentencePiece's BPE.

Anything that llama.cpp cannot do exactly is refused, not guessed: a wrong word rule costs quality without a message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.models.chat_templates import untagged
from distill.models.tokenizer_trimming import BYTE
from distill.models.tokenizers import vocab_size

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_PIECE = 1, 2, 3, 4, 5, 6
"""GGUF's types of tokens."""
SPACE = "▁"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"


def _plain(digits: str) -> str:
    return rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"


WORD_RULES: dict[tuple[str, bool], str] = {
    ("bytes", False): "gpt-2",
    ("digits, bytes", False): "smollm",
    (_plain(r"\p{N}{1,3}"), True): "llama-bpe",
    (_plain(r"\p{N}{1,3}"), False): "dbrx",
    (_plain(r"\p{N}"), False): "qwen2",
}
"""llama.cpp's names of the word rules. The key is the rule itself, and True if a word that is a token is taken whole.

Its rules for capitals (tekken, gpt-4o) are not here: they know only A to Z, and cut other capitals otherwise.
"""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary in the form of the file."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece)."""
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool = False
    notes: list[str] = field(default_factory=list)
    """Notes for the user, each a clause."""


def vocabulary(tokenizer: Any) -> Vocabulary:
    """Return a fast tokenizer's vocabulary for llama.cpp. Raises UserError for a kind that llama.cpp does not have."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"gguf: {type(tokenizer).__name__} is no fast tokenizer: save it with a tokenizer.json")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"gguf: a tokenizer of kind {model['type']} cannot be written (known: BPE, of bytes or pieces)")
    tokens, types = _tokens(tokenizer, content)
    notes = [
        f"the token {token['content']} takes blanks beside it or whole words only, which llama.cpp does not do"
        for token in content["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if "ByteLevel" in json.dumps(content["pre_tokenizer"]):
        if content["normalizer"] is not None and content["normalizer"]["type"] == "NFC":
            notes.append("text is not brought to Unicode's form NFC by llama.cpp, as the tokenizer does")
        merges = [f"{left} {right}" for left, right in model["merges"]]
        return Vocabulary("gpt2", tokens, types, _word_rule(content), merges, notes=notes)
    space_prefix = _space_prefix(content)
    if space_prefix and content["pre_tokenizer"] is not None:
        notes.append("a text that begins with a blank gets one more by llama.cpp, as it did not by the tokenizer")
        if content["pre_tokenizer"]["prepend_scheme"] == "first":
            notes.append("llama.cpp puts a blank behind special tokens inside a text, as the tokenizer does not")
    return Vocabulary("llama", tokens, types, scores=_scores(content), space_prefix=space_prefix, notes=notes)


def _tokens(tokenizer: Any, content: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return every token's text and type, by its number. Numbers without a token get a text that occurs nowhere."""
    size = vocab_size(tokenizer)
    tokens, types = [f"<unused id {number}>" for number in range(size)], [UNUSED] * size
    is_pieces = content["model"]["byte_fallback"]
    for text, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = text, BYTE_PIECE if is_pieces and BYTE.fullmatch(text) else NORMAL
    for token in content["added_tokens"]:
        # A piece with a mark for a blank stays an ordinary piece, or llama.cpp would print the mark.
        if token["special"] or not (is_pieces and SPACE in token["content"]):
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    unknown = content["model"].get("unk_token")
    if unknown is not None and is_pieces:
        types[tokenizer.convert_tokens_to_ids(unknown)] = UNKNOWN
    return tokens, types


def _word_rule(content: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which a byte-level tokenizer cuts a text into words."""
    steps = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
    words = []
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            words.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            words.append(step["pattern"].get("Regex", "?"))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            words += ["bytes"] if step["use_regex"] else []
        else:
            words.append("?")
    rule = WORD_RULES.get((", ".join(words), content["model"]["ignore_merges"]))
    if rule is None or content["normalizer"] not in (None, {"type": "NFC"}):
        raise UserError(
            "gguf: llama.cpp has no rule known here by which this tokenizer cuts a text into words "
            f"(known: those of {', '.join(WORD_RULES.values())})"
        )
    return rule


_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _space_prefix(content: dict[str, Any]) -> bool:
    """Tell whether a tokenizer of pieces puts a blank before a text. Raises UserError if it changes more than that."""
    normalizer, splitter = content["normalizer"], content["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prefix = [{"type": "Prepend", "prepend": blank} for blank in (SPACE, " ")]
    is_by_blanks = splitter is not None and splitter["type"] == "Split" and splitter["pattern"] == {"String": " "}
    if (splitter is None or is_by_blanks) and steps == [_REPLACED]:  # Gemma's split finds no blanks any more
        return False
    if splitter is None and len(steps) == 2 and steps in ([prefix[0], _REPLACED], [prefix[1], _REPLACED]):
        return True
    is_whole = splitter is not None and splitter["type"] == "Metaspace" and not splitter["split"]
    if is_whole and not steps and splitter["replacement"] == SPACE:
        return bool(splitter["prepend_scheme"] != "never")
    raise UserError(
        "gguf: this tokenizer prepares a text (normalises it, joins blanks, cuts it) as llama.cpp's SentencePiece does "
        "not: only blanks may become ▁"
    )


def _scores(content: dict[str, Any]) -> list[float]:
    """Return scores that make llama.cpp do the tokenizer's merges: it joins the pair whose whole has the highest score.

    Raises UserError if no scores can: two halves of a piece that the tokenizer does not join, merges of one piece at
    different places of the order, or characters that would get lost.
    """
    model, vocab = content["model"], content["model"]["vocab"]
    if not all(f"<0x{byte:02X}>" in vocab for byte in range(256)) or not model["byte_fallback"]:
        raise UserError("gguf: llama.cpp needs a piece for every byte in a tokenizer of pieces, and this one has none")
    order: dict[str, int] = {}
    last = None
    for rank, (left, right) in enumerate(model["merges"]):
        if left + right != last and left + right in order:
            _refuse_merges(left + right)
        last = left + right
        order.setdefault(last, rank)
    known = {(left, right) for left, right in model["merges"]}
    added = {token["content"] for token in content["added_tokens"]}
    for piece in vocab:
        if piece not in added and not BYTE.fullmatch(piece):
            for cut in range(1, len(piece)):
                halves = piece[:cut], piece[cut:]
                if halves[0] in vocab and halves[1] in vocab and halves not in known:
                    _refuse_merges(piece)
    scores = [0.0] * (max([*vocab.values(), *(token["id"] for token in content["added_tokens"])]) + 1)
    for piece, rank in order.items():
        scores[vocab[piece]] = -float(rank)
    return scores


def _refuse_merges(piece: str) -> None:
    raise UserError(
        f"gguf: this tokenizer joins {piece!r} in another order than SentencePiece would, whose way is llama.cpp's"
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, config: Any) -> None:
    """Write everything that llama.cpp needs of a tokenizer, including special tokens and chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_vocab_size(len(vocabulary.tokens))
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    _add_special_tokens(writer, tokenizer, config, len(vocabulary.tokens))
    if tokenizer.chat_template:
        templates = untagged(tokenizer.chat_template)
        if isinstance(templates, dict):
            templates = [{"name": name, "template": template} for name, template in templates.items()]
        writer.add_chat_template(templates)


def _add_special_tokens(writer: GGUFWriter, tokenizer: Any, config: Any, size: int) -> None:
    """Write the special tokens' numbers, and the flags for the tokens at a text's beginning and end."""
    bos, eos = (
        _first(size, getattr(tokenizer, f"{kind}_token_id"), getattr(config, f"{kind}_token_id", None))
        for kind in ("bos", "eos")
    )
    if eos is None:  # llama.cpp would take another token instead
        raise UserError("gguf: the tokenizer names no token for the end of a text (eos_token)")
    writer.add_eos_token_id(eos)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    text = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    frames = {(has_bos, has_eos): [bos] * has_bos + text + [eos] * has_eos for has_bos in (0, 1) for has_eos in (0, 1)}
    found = [ends for ends, ids in frames.items() if ids == whole]
    if not found:
        raise UserError("gguf: the tokenizer frames a text with other tokens than those of its beginning and its end")
    writer.add_add_bos_token(bool(found[0][0]))
    writer.add_add_eos_token(bool(found[0][1]))


def _first(size: int, *values: Any) -> int | None:
    """Return the first value that is a token of a vocabulary of this size. Values may be None or lists."""
    for value in values:
        number = value[0] if isinstance(value, list) and value else value
        if isinstance(number, int) and 0 <= number < size:
            return number
    return None
