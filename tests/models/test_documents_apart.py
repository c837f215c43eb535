"""A model in which packed documents see one another reads each in a row of its own, and answers as for it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.models.documents_apart import MOST_PADDING, split
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.isolation import Fault, find_fault
from distill.models.language_model import ONE_DOCUMENT_A_ROW, Head, run_body, split_output


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and positions of rows of documents of these lengths."""
    positions_BL = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 99, positions_BL.shape, generator=generator), positions_BL


ROWS = [[13, 1, 2, 16], [32], [5, 5, 5, 5, 5, 7], [1] * 32]


@pytest.mark.parametrize("in_one", [False, True])
def test_every_token_has_its_place_in_a_group_with_little_padding(in_one: bool) -> None:
    ids_BL, positions_BL = packed(ROWS)
    groups, places_T = split(ids_BL, positions_BL, in_one)
    tokens = [torch.cat([each.flatten() for each in kind]) for kind in zip(*groups, strict=True)]
    assert tokens[0][places_T].view_as(ids_BL).equal(ids_BL) and tokens[1][places_T].view_as(ids_BL).equal(positions_BL)
    assert len(groups) == 1 if in_one else all(ids_RM.numel() <= ids_BL.numel() for ids_RM, _ in groups)
    documents = sum(len(row) for row in ROWS)
    assert sum(len(ids_RM) for ids_RM, _ in groups) == documents
    assert all(positions_RM.equal(torch.arange(ids_RM.shape[1]).expand_as(ids_RM)) for ids_RM, positions_RM in groups)
    if not in_one:
        assert sum(ids_RM.numel() for ids_RM, _ in groups) <= ids_BL.numel() / (1 - MOST_PADDING)


class Runs(nn.Module):
    """A sum that runs over the row, and an auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(99, 8)

    @property
    def head(self) -> Head:
        return Head(self.embedding.weight)

    def body(self, ids_BL: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BLD = self.embedding(ids_BL).cumsum(1)
        return hidden_BLD, hidden_BLD.new_tensor(float(len(ids_BL)))


def test_hidden_states_gradients_and_auxiliary_loss_are_those_of_the_documents_alone() -> None:
    model: Any = Runs()
    ids_BL, positions_BL = packed(ROWS)
    assert find_fault(model, 99, "cpu") is Fault.DOCUMENTS
    setattr(model, ONE_DOCUMENT_A_ROW, True)
    assert find_fault(model, 99, "cpu") is None
    hidden_BLD, loss = split_output(run_body(model, ids_BL, positions_BL))
    assert loss is not None and int(loss) == sum(len(row) for row in ROWS)
    weight_BLD = torch.randn(hidden_BLD.shape, generator=torch.Generator().manual_seed(1))
    (hidden_BLD * weight_BLD).sum().backward()
    gradient = model.embedding.weight.grad.clone()
    model.embedding.weight.grad = None
    for row, lengths in enumerate(ROWS):
        for ids_L, got_LD, weight_LD in zip(
            *(each[row].split(lengths) for each in (ids_BL, hidden_BLD, weight_BLD)), strict=True
        ):
            alone_LD = model.body(ids_L[None], torch.arange(len(ids_L))[None])[0][0]
            torch.testing.assert_close(got_LD, alone_LD)
            (alone_LD * weight_LD).sum().backward()
    torch.testing.assert_close(model.embedding.weight.grad, gradient)


def test_a_state_space_model_is_sound_so(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("mamba2")).train()
    setattr(model, ONE_DOCUMENT_A_ROW, True)
    assert find_fault(model, 99, "cpu") is None
