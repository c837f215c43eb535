"""The token that begins a text, which some teachers cannot do without: tried on the teacher before its hours begin.

Shapes: B rows, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.language_model import LanguageModel, hidden_states

TEXTS = 8
MOST_TOKENS = 128
"""Tokens of a text at most."""
FROM = 32
"""First position that counts: a text's beginning is harder without a token in front for any teacher."""
MARGIN = 0.1
"""Nats a token by which a text must be worse."""
_SEARCHED = 64
"""Samples among which texts that begin without the token are looked for."""


def check_begin_token(
    model: LanguageModel,
    samples: Any,
    token: int,
    name: str,
    *,
    vocab_size: int,
    batch_tokens: int,
    remedy: str,
) -> None:
    """Raise UserError if the teacher is worse by `MARGIN` without `token` in 7 of 8 texts that begin without it.

    Args:
        samples: `samples[i]` holds `input_ids` and `position_ids`. The first document of each is a text.
        token: the tokenizer's beginning-of-text token.
        batch_tokens: tokens of a forward pass at most, as far as a single text has not more.
        remedy: what the user can do, for the message.
    """
    texts = _texts(samples, token)
    if len(texts) < TEXTS:
        return
    rows = [torch.cat([begin, text]) for begin in (texts[0][:0], texts[0].new_tensor([token])) for text in texts]
    size = max(1, batch_tokens // (MOST_TOKENS + 1))
    losses = [
        loss for at in range(0, len(rows), size) for loss in _losses(model, rows[at : at + size], token, vocab_size)
    ]
    gains = torch.tensor(losses[:TEXTS]) - torch.tensor(losses[TEXTS:])
    if int((gains > MARGIN).sum()) >= TEXTS - 1:
        raise UserError(
            f"{name}: {float(gains.mean()):.2f} nats a token worse without its beginning-of-text token, in "
            f"{int((gains > MARGIN).sum())} of {TEXTS} texts, and the samples begin without it: {remedy}"
        )


def _texts(samples: Any, token: int) -> list[Tensor]:
    texts = []
    for index in range(min(len(samples), _SEARCHED)):
        sample = samples[index]
        starts = (sample["position_ids"] == 0).nonzero().flatten().tolist()
        text = sample["input_ids"][: (starts[1:] or [len(sample["input_ids"])])[0]][:MOST_TOKENS]
        if len(text) >= 2 * FROM and int(text[0]) != token:
            texts.append(text)
    return texts[:TEXTS]


@torch.no_grad()
def _losses(model: LanguageModel, rows: list[Tensor], token: int, vocab_size: int) -> list[float]:
    """Return the mean loss of each row in nats a token, from position `FROM` of its text on."""
    head = model.head.with_rows(vocab_size)
    device = head.weight_VD.device
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    positions_BL = torch.arange(ids_BL.shape[1], device=device).expand_as(ids_BL)
    hidden_BLD = hidden_states(model, ids_BL, positions_BL)
    losses = []
    for row, hidden_LD in zip(rows, hidden_BLD, strict=True):
        begin = FROM + int(row[0] == token)
        logits_NV = head(hidden_LD[begin : len(row) - 1]).float()
        losses.append(float(torch.nn.functional.cross_entropy(logits_NV, row[begin + 1 :].to(device))))
    return losses
