"""Weights in 16 bits are for code that computes in them; other code computes in float32, and that is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.models.contract import check_members, in_type
from distill.models.language_model import Head


class Mixed(nn.Module):
    """Its state is float32 whatever its weights are, as Mamba's in plain PyTorch is; training's autocast mends it."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.tokens, self.out, self.mixes = nn.Embedding(7, 4), nn.Linear(4, 4), mixes
        self.parts = nn.ModuleList([None, nn.Linear(4, 4)])  # type: ignore[list-item]

    def body(self, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
        hidden_BLD = self.tokens(ids_BL)
        return self.out(hidden_BLD.float() if self.mixes else hidden_BLD)

    @property
    def head(self) -> Head:
        return Head(self.tokens.weight)


@pytest.mark.parametrize(("mixes", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_code_that_fails_in_16_bits_computes_in_float32(
    mixes: bool, expected: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(dtype: torch.dtype) -> Any:
        model = Mixed(mixes)
        check_members(model, "mine")  # the None in its list is no fault
        return model.to(dtype)

    assert in_type(make, torch.bfloat16, "mine").out.weight.dtype == expected
    said = capsys.readouterr().out
    assert ("mine: computes in float32, for its code fails in bfloat16: RuntimeError" in said) is mixes
    assert not mixes or "test_contract.py, line" in said
