"""llama.cpp cuts texts into the tokenizer's own tokens, for every kind that is written; other kinds are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the extra gguf is not installed")

import numpy as np
import sentencepiece
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distill.errors import UserError
from distill.export import gguf, gguf_check, gguf_tokenizer
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.saving import save_language_model
from distill.models.tokenizer_trimming import needed_tokens, trim_tokenizer
from distill.models.tokenizers import from_sentencepiece, vocab_size

pytestmark = pytest.mark.usefixtures("one_thread")

LEADING = "  two blanks before"
TEXTS = (
    *gguf_check.TEXTS,
    LEADING,
    "I'd've; I'LL 'tis rock'n'roll O'Neil's",
    "1 12 123 1234 12345 1,234.5 v2.0 0x1F",
    "x  y   z    \n   \n\n\tq\u00a0r\u3000s ",
    "ÀÉÎ McDonald iPhone XMLHttp ǅungla ªº ﷽",
    "!!! ?!... --- (a)[b]{c} </x> //path/to\r\n\r\n",
)


@pytest.fixture(scope="module")
def llama_tokens(
    tiny_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[list[list[int]], Any]]:
    """`llama_tokens(tokenizer)`: what llama.cpp makes of `TEXTS`, framed, and the file's fields."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

    def ask(tokenizer: Any, texts: tuple[str, ...] = TEXTS) -> tuple[list[list[int]], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("vocabulary")
        file = written(tokenizer, tiny_model, folder)
        request = {"file": str(file), "threads": 1, "texts": texts, "prompts": [], "new_tokens": 0, "ids": []}
        answer = gguf_check._ask({**request, "places": [], "vocabulary": 1, "logp": str(folder / "logp.npy")})
        return answer["framed"], {name: field.contents() for name, field in GGUFReader(file).fields.items()}

    return ask


def written(tokenizer: Any, tiny_model: Any, folder: Path) -> Path:
    model = tiny_model("llama", vocab_size=vocab_size(tokenizer), num_hidden_layers=1)
    save_language_model(HuggingFaceLanguageModel(model), folder / "student", "huggingface", {}, tokenizer)
    gguf.write(folder / "student", folder, "f16")
    return gguf.file(folder, "f16")


def of_bytes(splitter: Any, ignore_merges: bool = False, **more: Any) -> Any:
    """A byte-level tokenizer with this rule for words, trained on `TEXTS`."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = splitter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TEXTS, gguf_check.PASSAGE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|start|>", **more)


def by_rule(rule: str) -> Any:
    splitter: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "digits, bytes":
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splitter])
    elif rule != "bytes":
        words = pre_tokenizers.Split(Regex(rule), "isolated")
        bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splitter = pre_tokenizers.Sequence([words, bare])
    return splitter


def of_pieces(folder: Path, **options: Any) -> Any:
    """A tokenizer of a SentencePiece model trained on `TEXTS`."""
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    settings |= {"model_type": "bpe", "vocab_size": 480, "character_coverage": 0.98, "split_digits": True, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in (*TEXTS, gguf_check.PASSAGE) if "\x00" not in text]),
        model_prefix=str(folder / "spm"),
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    return from_sentencepiece(folder / "spm.model")


def expected(tokenizer: Any, texts: tuple[str, ...] = TEXTS) -> list[list[int]]:
    return [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(("rule", "name"), gguf_tokenizer.WORD_RULES.items(), ids=gguf_tokenizer.WORD_RULES.values())
def test_every_rule_for_words_is_llama_cpps(rule: tuple[str, bool], name: str, llama_tokens: Any) -> None:
    tokenizer = of_bytes(by_rule(rule[0]), rule[1])
    assert gguf_tokenizer.vocabulary(tokenizer).pre == name
    assert llama_tokens(tokenizer)[0] == expected(tokenizer)


def test_a_wrong_rule_would_show(llama_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = of_bytes(by_rule("bytes"))
    monkeypatch.setitem(gguf_tokenizer.WORD_RULES, ("bytes", False), "smollm")
    assert llama_tokens(tokenizer)[0] != expected(tokenizer)


@pytest.mark.parametrize(
    ("splitter", "ignore_merges"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), True),
        (by_rule(r"\w+|\s+|."), False),
        (pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), by_rule("bytes")]), False),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), by_rule("bytes")]), False),
    ],
)
def test_a_rule_that_is_not_known_is_refused(splitter: Any, ignore_merges: bool) -> None:
    with pytest.raises(UserError, match=r"into words.*gpt-2, smollm"):
        gguf_tokenizer.vocabulary(of_bytes(splitter, ignore_merges))


def test_a_normaliser_is_refused_but_for_nfc_which_is_said() -> None:
    tokenizer = of_bytes(by_rule("bytes"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert "form NFC" in gguf_tokenizer.vocabulary(tokenizer).notes[0]
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="into words"):
        gguf_tokenizer.vocabulary(tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_of_sentencepiece_are_llama_cpps(prefix: bool, llama_tokens: Any, tmp_path: Path) -> None:
    symbols = [] if prefix else ["<sep>", "\n\n"]
    tokenizer = of_pieces(tmp_path, add_dummy_prefix=prefix, user_defined_symbols=symbols)
    assert llama_tokens(tokenizer)[0] == expected(tokenizer)


def test_scores_follow_the_merges(llama_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = of_pieces(tmp_path)
    scores = gguf_tokenizer._scores

    def turned(content: dict[str, Any]) -> list[float]:
        return [-1000.0 - score for score in scores(content)]

    monkeypatch.setattr(gguf_tokenizer, "_scores", turned)
    assert llama_tokens(tokenizer)[0] != expected(tokenizer)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_blanks_may_be_marked_by_the_metaspace_step(scheme: Any, llama_tokens: Any, tmp_path: Path) -> None:
    tokenizer = of_pieces(tmp_path)
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    found = zip(TEXTS, llama_tokens(tokenizer)[0], expected(tokenizer), strict=True)
    other = [text for text, theirs, ours in found if theirs != ours]
    notes = " ".join(gguf_tokenizer.vocabulary(tokenizer).notes)
    assert other == ([LEADING] if "begins with a blank gets one more" in notes else [])
    assert ("begins with a blank" in notes) == (scheme != "never")
    assert ("behind special tokens" in notes) == (scheme == "first")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"remove_extra_whitespaces": True}, "prepares a text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "prepares a text"),
        ({"byte_fallback": False}, "piece for every byte"),
        ({"model_type": "unigram"}, "Unigram"),
    ],
)
def test_sentencepiece_that_llama_cpp_lacks_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        gguf_tokenizer.vocabulary(of_pieces(tmp_path, **options))


def test_merges_that_no_scores_make_are_refused(tmp_path: Path) -> None:
    tokenizer = of_pieces(tmp_path)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pairs = content["model"]["merges"]
    several = {left + right for left, right in pairs[:-1] if left + right == "".join(pairs[-1])}
    lone = next(index for index in range(len(pairs) - 1, 0, -1) if index and "".join(pairs[index]) not in several)
    dropped = {**content, "model": {**content["model"], "merges": pairs[:lone] + pairs[lone + 1 :]}}
    with pytest.raises(UserError, match="in another order"):
        gguf_tokenizer._scores(dropped)
    twice = next(i for i in range(len(pairs) - 1) if "".join(pairs[i]) == "".join(pairs[i + 1]))
    moved = [*pairs[:twice], *pairs[twice + 1 :], pairs[twice]]
    with pytest.raises(UserError, match="in another order"):
        gguf_tokenizer._scores({**content, "model": {**content["model"], "merges": moved}})


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_trimmed_tokenizer_is_still_llama_cpps(kind: str, llama_tokens: Any, tmp_path: Path) -> None:
    whole = of_bytes(by_rule("bytes")) if kind == "bytes" else of_pieces(tmp_path)
    counts = np.bincount(whole.encode(gguf_check.PASSAGE), minlength=vocab_size(whole)).astype(np.int64)
    trimmed = trim_tokenizer(whole, needed_tokens(whole, counts))
    assert vocab_size(trimmed) < vocab_size(whole)
    assert llama_tokens(trimmed)[0] == expected(trimmed)


@pytest.mark.parametrize(
    ("single", "ends"),
    [("$A", (False, False)), ("<|start|> $A", (True, False)), ("<|start|> $A <|end|>", (True, True))],
)
def test_a_text_is_framed_as_the_tokenizer_frames_it(single: str, ends: tuple[bool, bool], llama_tokens: Any) -> None:
    tokenizer = of_bytes(by_rule("bytes"))
    specials = [("<|start|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=specials)
    found, metadata = llama_tokens(tokenizer)
    assert found == expected(tokenizer)
    said = tuple(metadata[f"tokenizer.ggml.add_{end}_token"] for end in ("bos", "eos"))
    assert said == ends


def test_another_frame_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    tokenizer = of_bytes(by_rule("bytes"))
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[end])
    with pytest.raises(UserError, match="frames a text"):
        written(tokenizer, tiny_model, tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    tokenizer = of_bytes(by_rule("bytes"))
    tokenizer.eos_token = None
    model = tiny_model("llama", vocab_size=vocab_size(tokenizer), eos_token_id=None)
    save_language_model(HuggingFaceLanguageModel(model), tmp_path / "student", "huggingface", {}, tokenizer)
    with pytest.raises(UserError, match="end of a text"):
        gguf.write(tmp_path / "student", tmp_path, "f16")


def test_special_and_added_tokens_and_the_template_are_in_the_file(
    tiny_model: Any, llama_tokens: Any, tmp_path: Path
) -> None:
    tokenizer = of_bytes(by_rule("bytes"), chat_template="{{ messages[0]['content'] }}", pad_token="<|end|>")
    tokenizer.add_tokens(["<tool>"])
    fields = GGUFReader(written(tokenizer, tiny_model, tmp_path)).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.padding_token_id"].contents() == tokenizer.pad_token_id
    types = fields["tokenizer.ggml.token_type"].contents()
    number = tokenizer.convert_tokens_to_ids("<tool>")
    assert types[number] == gguf_tokenizer.USER_DEFINED and types[tokenizer.eos_token_id] == gguf_tokenizer.CONTROL
    texts = ("call <tool> now<|end|>", "<|start|><tool>")
    assert llama_tokens(tokenizer, texts)[0] == expected(tokenizer, texts)


def test_numbers_without_a_token_are_filled() -> None:
    tokenizer = of_bytes(by_rule("bytes"))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    left, right = merges.pop()
    gone = vocab.pop(left + right)
    last = max(vocab, key=vocab.__getitem__)
    assert vocab[last] > gone or gone == len(vocab)
    vocab["Ġunheard"] = len(vocab) + 5
    holed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|end|>", bos_token="<|start|>"
    )
    found = gguf_tokenizer.vocabulary(holed)
    assert len(found.tokens) == len(set(found.tokens)) == vocab_size(holed)
    assert found.types[gone] == gguf_tokenizer.UNUSED


def test_tokens_that_take_blanks_are_told() -> None:
    from transformers import AddedToken

    tokenizer = of_bytes(by_rule("bytes"))
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert "<mask> takes blanks" in gguf_tokenizer.vocabulary(tokenizer).notes[0]
