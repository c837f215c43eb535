"""A probe that measures if a language model keeps documents packed in one row apart.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.models.language_model import LanguageModel

FIRST, SECOND = 9, 6  # tokens of the two documents in the probe


@torch.no_grad()
def isolates_documents(model: LanguageModel, vocab_size: int, device: torch.device | str) -> bool:
    """Tell whether a document's hidden states are the same after any document before it, and without one.

    The probe is a row of two documents whose `position_ids` restart. The second document's hidden states are compared
    between two first documents, and with the second document alone. State-space families fail: their state runs on.
    """
    training = getattr(model, "training", False)
    if isinstance(model, torch.nn.Module):
        model.eval()  # dropout would look like a leak
    try:
        first_L = torch.arange(FIRST, device=device) * 3 % vocab_size
        second_L = (torch.arange(SECOND, device=device) * 5 + 1) % vocab_size
        positions_L = torch.cat([torch.arange(FIRST, device=device), torch.arange(SECOND, device=device)])
        one = _second(model, first_L, second_L, positions_L)
        other = _second(model, (first_L + vocab_size // 2) % vocab_size, second_L, positions_L)
        alone = model.body(second_L[None], positions_L[None, FIRST:])[0]
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(training)
    return _same(one, other) and _same(one, alone)


def _second(model: LanguageModel, first_L: Tensor, second_L: Tensor, positions_L: Tensor) -> Tensor:
    return model.body(torch.cat([first_L, second_L])[None], positions_L[None])[0, FIRST:]


def _same(one_LD: Tensor, other_LD: Tensor) -> bool:
    """Tell whether the two are equal up to rounding.

    Other kernels for other lengths may round otherwise. A leak moves some token by far more.
    """
    tolerance = 1e-3 if one_LD.dtype in (torch.float32, torch.float64) else 3e-2
    error_L = (one_LD.float() - other_LD.float()).norm(dim=-1) / other_LD.float().norm(dim=-1)
    return bool(error_L.max() < tolerance)
