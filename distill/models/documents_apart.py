"""Packed documents, each in a row of its own, for models in which documents that share a row see one another.

Shapes: B batch, L sequence length, R documents of about one length, M the longest of them, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_PADDING = 1 / 8
"""Share of a group of rows that is padding, at most."""
Group = tuple[Tensor, Tensor]
"""Token ids and position ids `[R, M]`, padded on the right."""


def documents_of(positions_BL: Tensor) -> Tensor:
    """Return row, begin and length of each document of a packed batch, `[documents, 3]` on the host, in reading order.

    A document begins with its row, and where the position is not the one after the position before.
    """
    positions_BL = positions_BL.cpu()
    begins_BL = torch.ones_like(positions_BL, dtype=torch.bool)
    begins_BL[:, 1:] = positions_BL[:, 1:] != positions_BL[:, :-1] + 1
    places = begins_BL.flatten().nonzero().squeeze(1)
    ends = torch.cat([places[1:], torch.tensor([positions_BL.numel()])])
    length = positions_BL.shape[1]
    return torch.stack([places // length, places % length, ends - places], dim=1)


def split(ids_BL: Tensor, positions_BL: Tensor, in_one: bool = False) -> tuple[list[Group], Tensor]:
    """Return the documents of a packed batch in groups of rows, and the place of each token of the batch among theirs.

    A group holds documents of about one length, so that at most an eighth of it is padding, and is no larger than the
    batch; `in_one` makes one group of all, whatever its padding. The places `[B * L]` index the groups' tokens, `R * M`
    of each, one group after the other. A causal model does not see the padding, which repeats a document's last token.
    """
    found = documents_of(positions_BL)
    length, most = ids_BL.shape[1], ids_BL.numel()
    order = found[:, 2].argsort(descending=True, stable=True).tolist()
    chosen: list[list[int]] = []
    for document in order:
        size = int(found[document, 2])
        longest = int(found[chosen[-1][0], 2]) if chosen else 0
        fits = chosen and size >= (1 - MOST_PADDING) * longest and (len(chosen[-1]) + 1) * longest <= most
        if chosen and (fits or in_one):
            chosen[-1].append(document)
        else:
            chosen.append([document])
    groups: list[Group] = []
    places_T = torch.empty(most, dtype=torch.long)
    before = 0
    for group in chosen:
        rows, begins, sizes = found[group].unbind(1)
        longest = int(sizes.max())
        offsets_RM = torch.arange(longest).minimum(sizes[:, None] - 1)
        tokens_RM = rows[:, None] * length + begins[:, None] + offsets_RM
        real_RM = torch.arange(longest) < sizes[:, None]
        places_T[tokens_RM[real_RM]] = before + real_RM.flatten().nonzero().squeeze(1)
        before += real_RM.numel()
        taken = tokens_RM.to(ids_BL.device)
        first_R1 = positions_BL.flatten()[taken[:, :1]]
        groups.append((ids_BL.flatten()[taken], first_R1 + torch.arange(longest, device=taken.device)))
    return groups, places_T.to(ids_BL.device)
