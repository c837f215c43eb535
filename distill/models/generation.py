"""Text from a language model, token by token: greedy or nucleus sampling, with the family's cache if it has one.

Shapes: B batch, L sequence length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.chat_templates import TemplateError, render_with
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import LanguageModel, hidden_states
from distill.models.token_ids import set_token_id
from distill.models.traits import positions_before

CACHES = ("past_key_values", "cache_params")
"""transformers' names for a family's cache: keys and values, or the states of state-space models."""


HALF = "\ufffd"
"""The replacement character, which stands in a decoded text for a character that lacks some of its bytes."""


class Decoder(Protocol):
    """A model in the middle of a text. It takes the next ids, and returns the logits of the token after them."""

    def __call__(self, ids_BL: Tensor) -> Tensor:
        """Append `ids_BL` (L >= 1) to the text, and return float32 logits `[B, V]` of the token after the last one."""
        ...


def decoder(model: LanguageModel, vocab_size: int) -> Decoder:
    """Return a decoder at the beginning of a text, over the first `vocab_size` tokens of the model's head.

    It keeps the cache of a Hugging Face family that has one. Any other model reads its whole text again for each token.
    The model's mode is not changed: put it in evaluation mode first, and call the decoder under `torch.no_grad()`.
    """
    if has_cache(model):
        return _CachingDecoder(model, vocab_size)
    return _RereadingDecoder(model, vocab_size)


def has_cache(model: LanguageModel) -> bool:
    """Tell whether the model reads only the new token at each step, and not the whole text."""
    return isinstance(model, HuggingFaceLanguageModel) and cache_name(model) is not None


def cache_name(model: HuggingFaceLanguageModel) -> str | None:
    """Return transformers' name for the family's cache (one of `CACHES`), or None if it has none."""
    taken = inspect.signature(model.model.base_model.forward).parameters
    return next((name for name in CACHES if name in taken), None)


class _CachingDecoder:
    """A decoder that gives a Hugging Face model only the new tokens. Positions follow from the length of the cache."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._name = str(cache_name(model))
        self._cache: Any = None

    def __call__(self, ids_BL: Tensor) -> Tensor:
        given = {} if self._cache is None else {self._name: self._cache}
        hidden_BLD, answer = self._model.read(input_ids=ids_BL, use_cache=True, **given)
        self._cache = getattr(answer, self._name, None)
        assert self._cache is not None, f"{type(self._model.model).__name__} takes a cache and gives none"
        return _last_logits(self._model, hidden_BLD, self._vocab_size)


class _RereadingDecoder:
    """A decoder that gives any model the whole text each time."""

    def __init__(self, model: LanguageModel, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._ids_BL: Tensor | None = None

    def __call__(self, ids_BL: Tensor) -> Tensor:
        self._ids_BL = ids_BL if self._ids_BL is None else torch.cat([self._ids_BL, ids_BL], dim=1)
        positions_BL = torch.arange(self._ids_BL.shape[1], device=ids_BL.device).expand_as(self._ids_BL)
        return _last_logits(self._model, hidden_states(self._model, self._ids_BL, positions_BL), self._vocab_size)


def _last_logits(model: LanguageModel, hidden_BLD: Tensor, vocab_size: int) -> Tensor:
    return model.head.with_rows(vocab_size)(hidden_BLD[:, -1]).float()


def generate(
    model: LanguageModel,
    prompt_ids: list[int] | Tensor,
    max_new_tokens: int,
    *,
    vocab_size: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Generate the tokens that follow `prompt_ids` (list, or tensor `[L]`), each as soon as it is known.

    All are below `vocab_size`. The text ends after `max_new_tokens`, before a token of `stop_ids` (which is not
    yielded), or when the model's context is full: the last token comes after `context_length(model)` tokens. At
    temperature 0 the likeliest token is taken. Otherwise `sample` draws tokens from a `generator` on the CPU, the same
    on every device. The model must be in evaluation mode. Raises UserError, before the first token, for a prompt that
    is empty or longer than the context, and for a temperature or top_p out of range; later for logits that are not
    finite.
    """
    ids_1L = torch.as_tensor(prompt_ids, dtype=torch.int64).reshape(1, -1)
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature}, top_p {top_p}: at least 0, and above 0 up to 1")
    max_new_tokens = min(max_new_tokens, room(model, ids_1L.shape[1]))
    return _tokens(model, ids_1L, max_new_tokens, vocab_size, stop_ids, temperature, top_p, generator)


@torch.no_grad()
def _tokens(
    model: LanguageModel,
    ids_1L: Tensor,
    max_new_tokens: int,
    vocab_size: int,
    stop_ids: frozenset[int],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Iterator[int]:
    read, device = decoder(model, vocab_size), model.head.weight_VD.device
    for _ in range(max_new_tokens):
        token = sample(read(ids_1L.to(device))[0], temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        ids_1L = torch.tensor([[token]])


def room(model: LanguageModel, prompt_tokens: int) -> int:
    """Return the number of tokens that can follow a prompt until the model's context is full.

    Raises UserError for a prompt without tokens, and for one that is longer than the context.
    """
    limit = context_length(model)
    if prompt_tokens < 1:
        raise UserError("the prompt has no tokens, so there is nothing to continue")
    if limit is None:
        return sys.maxsize
    if prompt_tokens > limit:
        raise UserError(f"the prompt has {prompt_tokens:,} tokens, and the model reads {limit:,} at most: shorten it")
    return limit - prompt_tokens + 1


def sample(
    logits_V: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> int:
    """Sample one token: the likeliest at temperature 0, else from the nucleus of `softmax(logits / temperature)`.

    The nucleus is the smallest set of likeliest tokens that has at least the probability `top_p`, renormalised
    (Holtzman et al. 2020, §3.1). Raises UserError if a logit is not finite.
    """
    if not bool(logits_V.isfinite().all()):
        raise UserError("the model's answer is not finite (its training diverged, or its weights are damaged)")
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.cpu().double()
    # The shift by the largest comes first: a tiny temperature then makes only the others -inf.
    probs_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
    if top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        is_outside_V = sorted_V.cumsum(-1) - sorted_V >= top_p  # the tokens before it reach top_p already
        probs_V[order_V[is_outside_V]] = 0
    return int(torch.multinomial(probs_V, 1, generator=generator))


def context_length(model: LanguageModel) -> int | None:
    """Return the largest number of tokens that the model can read. None means no limit, or none that it names.

    A Hugging Face model names it in its configuration, any other in an attribute `max_position_embeddings`.
    """
    if isinstance(model, HuggingFaceLanguageModel):
        return context_of(model.model.config)
    return _positive(getattr(model, "max_position_embeddings", None))


def context_of(config: Any) -> int | None:
    """Return the tokens that a Hugging Face model of this configuration can read; None means that it does not say."""
    text = config.get_text_config()
    limit = _positive(getattr(text, "max_position_embeddings", None))
    return limit and _positive(limit - positions_before(text))


def _positive(limit: Any) -> int | None:
    return limit if isinstance(limit, int) and limit > 0 else None


def ending_tokens(model: LanguageModel, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text or an answer.

    They are the tokenizer's end-of-sequence token, those of a Hugging Face model's generation settings, and the one
    that the chat template puts after an answer.
    """
    settings = getattr(model.model, "generation_config", None) if isinstance(model, HuggingFaceLanguageModel) else None
    ends = _several(getattr(settings, "eos_token_id", None))
    return frozenset(end for end in (*ends, tokenizer.eos_token_id, end_of_turn(tokenizer)) if end is not None)


def end_as(model: Any, tokenizer: Any) -> None:
    """Give a `transformers` model the special tokens of `tokenizer`, so that `generate` and others stop where it ends.

    The padding in its configuration stays: an embedding would never learn that row.
    """
    model.generation_config = generation_settings(model.generation_config, tokenizer)
    ids = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id")}
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        for name, value in ids.items():
            set_token_id(config, name, value)


def generation_settings(config: Any, tokenizer: Any) -> Any:
    """Return the settings of `generate`, with the special tokens of the tokenizer, whose ids are the true ones.

    A published list of several end tokens is kept if all of them are special tokens.
    """
    import transformers

    known = {} if config is None else config.to_dict()
    ids = special_ids(tokenizer)
    published, ends = known.get("eos_token_id"), ids["eos_token_id"]
    if isinstance(published, list) and set(_several(ends)) <= set(published) <= set(tokenizer.all_special_ids):
        ids["eos_token_id"] = published
    kept = {name: value for name, value in known.items() if not name.startswith("_")}
    return transformers.GenerationConfig.from_dict({**kept, **ids})


def special_ids(tokenizer: Any) -> dict[str, Any]:
    """Return the special tokens that `generate` needs, by its names. None means that the tokenizer has none.

    There are two ends where the chat template ends an answer with another token than a text.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    turn = end_of_turn(tokenizer)
    ends = [end for end in dict.fromkeys((ids["eos_token_id"], turn)) if end is not None]
    return {**ids, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}


def _several(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the added token (such as `<|im_end|>`) right after an answer in the chat template, or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "forty-two"
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": answer}]
    try:
        _, found, behind = render_with(tokenizer, turns).rpartition(answer)
    except TemplateError:
        return None  # the template refuses these messages, so the end of an answer is unknown
    ids = tokenizer.encode(behind.lstrip(), add_special_tokens=False) if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a text's beginning as a document's is: with the special tokens in front of it, without an end."""
    ids = list(tokenizer.encode(prompt, verbose=False))
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return tokens as text, without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
