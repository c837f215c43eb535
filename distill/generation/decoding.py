"""Several texts of one model decoded together: with its key-value cache where it has one, else by reading them again.

Shapes: B texts, L tokens of the longest, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.models.generation import cache_name, context_length
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import LanguageModel, hidden_states

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUGH = 0.05
"""Relative error of logits in 16 bits. A wrong position or a missing mask changes them by much more."""


class Texts(Protocol):
    """Texts in the middle of being written."""

    def begin(self, prompts: list[list[int]]) -> Tensor:
        """Read the prompts, and return the logits `[B, V]` (float32) of the token after each."""
        ...

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each text, and return the logits `[B, V]` of the one after it."""
        ...

    def keep(self, rows: list[int]) -> bool:
        """Go on with these texts alone, or return False: this model goes on with all of them."""
        ...


class CachedTexts:
    """Texts of a Hugging Face model, of which only the new tokens are read.

    Prompts of different lengths are padded on the left, behind an attention mask, if `pads`.
    """

    def __init__(self, model: HuggingFaceLanguageModel, vocab_size: int, pads: bool) -> None:
        self._model, self._vocab_size, self._pads = model, vocab_size, pads
        self._name = str(cache_name(model))
        self._limit = context_length(model)
        self._cache: Any = None

    def begin(self, prompts: list[list[int]]) -> Tensor:
        longest = max(map(len, prompts))
        assert self._pads or all(len(prompt) == longest for prompt in prompts), "this model reads equal lengths"
        device = self._model.head.weight_VD.device
        ids_BL = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        self._cache = None
        self._lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._mask_BL = (torch.arange(longest, device=device) >= longest - self._lengths_B[:, None]).long()
        return self._read(ids_BL, (self._mask_BL.cumsum(-1) - 1).clamp(min=0))

    def advance(self, tokens_B: Tensor) -> Tensor:
        ids_B1 = tokens_B[:, None].to(self._lengths_B.device)
        self._mask_BL = torch.cat([self._mask_BL, torch.ones_like(self._mask_BL[:, :1])], dim=1)
        positions_B1 = self._lengths_B[:, None]
        if self._limit is not None:  # finished texts run along with the others, and may leave the context
            positions_B1 = positions_B1.clamp(max=self._limit - 1)
        self._lengths_B = self._lengths_B + 1
        return self._read(ids_B1, positions_B1)

    def keep(self, rows: list[int]) -> bool:
        layers = getattr(self._cache, "layers", None)
        if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
            return False
        rows_R = torch.tensor(rows, device=self._lengths_B.device)
        self._cache.batch_select_indices(rows_R)
        self._lengths_B, self._mask_BL = self._lengths_B[rows_R], self._mask_BL[rows_R]
        return True

    def _read(self, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
        given: dict[str, Any] = {} if self._cache is None else {self._name: self._cache}
        if self._pads:
            given |= {"attention_mask": self._mask_BL, "position_ids": positions_BL}
        hidden_BLD, answer = self._model.read(input_ids=ids_BL, use_cache=True, **given)
        self._cache = getattr(answer, self._name)
        return _last_logits(self._model, hidden_BLD[:, -1], self._vocab_size)


class RereadTexts:
    """Texts of any model, read from their beginning for each token. Shorter ones are padded on the right.

    The padding changes nothing, since a position depends on the tokens up to it alone.
    """

    def __init__(self, model: LanguageModel, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._limit = context_length(model)

    def begin(self, prompts: list[list[int]]) -> Tensor:
        self._texts = [list(prompt) for prompt in prompts]
        return self._read()

    def advance(self, tokens_B: Tensor) -> Tensor:
        for text, token in zip(self._texts, tokens_B.tolist(), strict=True):
            if self._limit is None or len(text) < self._limit:
                text.append(token)
        return self._read()

    def keep(self, rows: list[int]) -> bool:
        self._texts = [self._texts[row] for row in rows]
        return True

    def _read(self) -> Tensor:
        longest, device = max(map(len, self._texts)), self._model.head.weight_VD.device
        ids_BL = torch.tensor([text + [0] * (longest - len(text)) for text in self._texts], device=device)
        positions_BL = torch.arange(longest, device=device).expand_as(ids_BL)
        hidden_BLD = hidden_states(self._model, ids_BL, positions_BL)
        last_B = torch.tensor([len(text) - 1 for text in self._texts], device=device)
        return _last_logits(self._model, hidden_BLD[torch.arange(len(last_B)), last_B], self._vocab_size)


def _last_logits(model: LanguageModel, hidden_BD: Tensor, vocab_size: int) -> Tensor:
    return model.head.with_rows(vocab_size)(hidden_BD).float()


@torch.no_grad()
def pads_well(model: HuggingFaceLanguageModel, vocab_size: int) -> bool:
    """Tell whether the model continues a text as it does alone when a longer one stands beside it.

    That is measured on two short texts, at the prompt's end and at a further token. A recurrent family, or one that
    takes no mask or no positions, does not.
    """
    taken = inspect.signature(model.model.base_model.forward).parameters
    if not {"attention_mask", "position_ids"} <= taken.keys():
        return False
    longer, shorter = ([(7 * place + 1) % vocab_size for place in range(tokens)] for tokens in (9, 4))
    together, alone = (CachedTexts(model, vocab_size, pads) for pads in (True, False))
    pairs = [(together.begin([longer, shorter])[1], alone.begin([shorter])[0])]
    token = torch.tensor([3 % vocab_size])
    pairs.append((together.advance(token.expand(2))[1], alone.advance(token)[0]))
    allowed = _TOLERANCE.get(model.head.weight_VD.dtype, _ROUGH)
    return all(bool((one - other).norm() <= allowed * other.norm()) for one, other in pairs)
