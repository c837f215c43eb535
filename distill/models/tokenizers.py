"""Tokenizers of checkpoints, or the user's own (a folder or a SentencePiece model), and their fingerprints."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError, did_you_mean, first_line
from distill.models.gguf_header import reading_gguf
from distill.models.safety import check_folder, check_gguf, check_weights, spoilt
from distill.system.files import read_bounded

if TYPE_CHECKING:
    from distill.models.checkpoints import Checkpoint

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
CONTROL, USER_DEFINED = 3, 4  # SentencePiece's types of pieces
PROBES = (  # SentencePiece models differ in these: prefix, runs of blanks, normalisation, unknown characters, digits
    "The cat sat on the mat.",
    "  two blanks  before, between and after  ",
    "naïve café ﬁne ½",
    "line\nbreak\tand tab",
    "日本語 😀 x²",
    "1234567890 3.14",
    "def f(x):\n    return x",
    "a",
)

_MOST_BYTES = 2**24
"""Largest size of a configuration file."""

MOST_MISSING = 0.01
"""Share of a tokenizer's strings that another one may lack and still be called the same."""


def load_tokenizer(checkpoint: Checkpoint, override: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint, or of `override`: a tokenizer folder or a SentencePiece `.model` file."""
    if override is None:
        return _from_pretrained(checkpoint.folder, checkpoint.gguf_file, checkpoint.name, trust_remote_code)
    path = Path(override).expanduser()
    if path.is_dir():
        return _from_pretrained(path, None, override, trust_remote_code)
    if path.is_file() and path.suffix == ".model":
        tokenizer = from_sentencepiece(path)
        if tokenizer.bos_token_id is not None and _begins_texts(checkpoint, trust_remote_code):
            _begin_texts(tokenizer)
        return tokenizer
    if path.exists():
        raise UserError(f"{override}: a tokenizer is a folder or a SentencePiece .model file")
    siblings = [str(Path(override).parent / file.name) for file in path.parent.glob("*")]
    raise UserError(f"{override}: no such tokenizer folder or .model file" + did_you_mean(override, siblings[:20]))


def is_here(checkpoint: Checkpoint) -> bool:
    """Tell whether a tokenizer lies beside the checkpoint's weights."""
    return checkpoint.gguf_file is not None or any(any(checkpoint.folder.glob(name)) for name in TOKENIZER_FILES)


def load_folder_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model's or cache's folder. Code in the folder is never run."""
    return _from_pretrained(folder, None, str(folder), trust_remote_code=False)


def _from_pretrained(folder: Path, gguf_file: str | None, name: str, trust_remote_code: bool) -> Any:
    if gguf_file is None:
        return _read(folder, None, name, trust_remote_code)
    return copy.deepcopy(_read_gguf(folder, gguf_file, name, (folder / gguf_file).stat().st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _read_gguf(folder: Path, gguf_file: str, name: str, changed: int) -> Any:
    """Return the tokenizer, and keep it: reading the vocabulary string by string takes seconds."""
    return _with_its_own_tokens(_read(folder, gguf_file, name, trust_remote_code=False))


def _with_its_own_tokens(tokenizer: Any) -> Any:
    """Take the tokens away that a GGUF file's list lacks, and that transformers' classes add to it.

    GPT-2's class adds `<|endoftext|>`, for which the model has no row.
    """
    from tokenizers import Tokenizer

    own = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    extra = {token for token, index in tokenizer.get_added_vocab().items() if index >= own}
    if not extra:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < own]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    for role, token in dict(tokenizer.special_tokens_map).items():
        if token in extra:
            setattr(tokenizer, role, None)
    return tokenizer


def _read(folder: Path, gguf_file: str | None, name: str, trust_remote_code: bool) -> Any:
    import transformers

    # Without any of these files transformers answers with an empty vocabulary instead of an error.
    if gguf_file is None and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise UserError(f"{name}: no tokenizer in {folder} (looked for {', '.join(TOKENIZER_FILES)})")
    if gguf_file is None:
        check_folder(folder, name)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is not None:
        check_weights(folder / gguf_file, name)
    try:
        with reading_gguf(gguf_file):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **options
            )
        tokenizer.encode("a")  # some odd settings fail at the first text alone
        return tokenizer
    except Exception as error:  # odd content fails anywhere in the libraries' code
        if gguf_file is not None:
            check_gguf(folder / gguf_file, name)
        for file in sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if gguf_file is None):
            if (problem := spoilt(file)) is not None:
                raise UserError(f"{name}: {file.name} {problem}") from None
        raise UserError(f"{name}: the tokenizer cannot be read: {first_line(error)}") from error


def from_sentencepiece(path: Path) -> Any:
    """Make a fast tokenizer that encodes as the SentencePiece model does. Raises UserError if a probe text differs.

    transformers' generic conversion leaves out the dummy prefix and the collapsing of blanks, so this is our own.
    """
    import sentencepiece
    import transformers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        proto = SentencePieceExtractor(str(path)).proto
    except (RuntimeError, OSError, ImportError, ValueError) as error:
        raise UserError(f"{path}: not a readable SentencePiece model: {error}") from error
    ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    specials = {f"{kind}_token": processor.id_to_piece(index) for kind, index in ids.items() if index >= 0}
    backend = _backend(proto)
    tokenizer = transformers.TokenizersBackend(tokenizer_object=backend, **specials)
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    for text in (*PROBES, *(f"the {symbol} cat" for symbol in user_defined[:8])):
        if tokenizer.encode(text, add_special_tokens=False) != processor.encode(text):
            raise UserError(
                f"{path}: this SentencePiece model uses something the fast tokenizer cannot imitate "
                f"(it encodes {text!r} otherwise): convert it to a Hugging Face tokenizer folder"
            )
    return tokenizer


def begin_token_id(tokenizer: Any) -> int | None:
    """Return the special token with which the tokenizer begins a plain text, None if it begins with none.

    It is measured, since a tokenizer may name a `bos_token` and not use it (SmolLM2).
    """
    framed, plain = (tokenizer(["a"], add_special_tokens=on)["input_ids"][0] for on in (True, False))
    return framed[0] if len(framed) > len(plain) and framed[1 : 1 + len(plain)] == plain else None


def _begins_texts(checkpoint: Checkpoint, trust_remote_code: bool) -> bool:
    """Tell whether a checkpoint's texts begin with a token, by its own configuration.

    A bare SentencePiece file does not say it. Asked are `add_bos_token`, the checkpoint's own tokenizer, and whether
    the model names a beginning-of-text token.
    """
    said = _json(checkpoint.folder / "tokenizer_config.json").get("add_bos_token")
    if isinstance(said, bool) and checkpoint.gguf_file is None:
        return said
    if is_here(checkpoint):
        own = _from_pretrained(checkpoint.folder, checkpoint.gguf_file, checkpoint.name, trust_remote_code)
        return begin_token_id(own) is not None
    return _json(checkpoint.folder / "config.json").get("bos_token_id") is not None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bounded(path, _MOST_BYTES))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _begin_texts(tokenizer: Any) -> None:
    """Let the tokenizer put its beginning-of-text token in front of every text."""
    from tokenizers.processors import TemplateProcessing

    token = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, tokenizer.bos_token_id)]
    )


def _backend(proto: Any) -> Any:
    """Return the `tokenizers` pipeline of a SentencePiece model: the model, its normalisation, its control pieces."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    model: Any
    if trainer.model_type == 1:
        model = models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == 2:
        vocabulary = {piece: index for index, (piece, _) in enumerate(scores)}
        merges = generate_merges(vocabulary, dict(scores))
        model = models.BPE(
            vocabulary, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
    else:
        raise UserError("a SentencePiece model of type word or char is not supported: use unigram or bpe")
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(" ")] if spec.add_dummy_prefix else []
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    added = [piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(p.piece, normalized=False, special=p.type == CONTROL) for p in added])
    return tokenizer


def vocab_size(tokenizer: Any) -> int:
    """Return the real size of the vocabulary: the highest id of any token, added ones included, plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def difference(theirs: Any, ours: Any) -> str | None:
    """Return the first difference between the ids of two tokenizers, as `'the' is 1820 there, 262 here`, or None.

    Strings in both vocabularies must have one id, and texts one encoding. A share of `MOST_MISSING` of our strings may
    be missing there, because models of one family differ in the special tokens that they add.
    """
    there, here = theirs.get_vocab(), ours.get_vocab()
    for token, index in sorted(here.items(), key=lambda item: item[1]):
        if there.get(token, index) != index:
            return f"{token!r} is {there[token]} there, {index} here"
    if (missing := len(here.keys() - there.keys())) > MOST_MISSING * len(here):
        return f"{missing:,} of {len(here):,} tokens are not there"
    for text in PROBES:
        ids = [each.encode(text, add_special_tokens=False) for each in (theirs, ours)]
        if ids[0] != ids[1]:
            at = next(
                (at for at, (one, other) in enumerate(zip(*ids, strict=False)) if one != other), min(map(len, ids))
            )
            return f"{text!r} is {ids[0][at : at + 4]} there, {ids[1][at : at + 4]} here, from token {at + 1} on"
    return None


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """Return the SHA-256 of the tokenizer's content and of its chat template, the same on every machine."""
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # leftovers of the last call, not part of the tokenizer
            content.pop(state, None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    specials = {kind: str(token) for kind, token in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": _sha256({"content": content, "specials": specials}),
        "chat_template": _sha256(template),
    }


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
