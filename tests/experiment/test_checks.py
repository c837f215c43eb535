"""A model that cannot do what is asked of it is refused for what is wrong with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.experiment.checks import check_model
from distill.models.language_model import Head, hidden_states

V, D = 50, 8


class Model(nn.Module):
    """Hidden states of the token alone, or, leaking, of all tokens before it too."""

    def __init__(self, dtype: torch.dtype = torch.float32, leaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.weight = (nn.Parameter(torch.randn(V + 3, D, dtype=dtype)) for _ in range(2))
        self.leaks = leaks

    @property
    def head(self) -> Head:
        return Head(self.weight)

    def body(self, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
        hidden_BLD = self.embedding[ids_BL]
        return hidden_BLD.cumsum(1) if self.leaks else hidden_BLD


def test_a_sound_model_passes_and_stays_in_its_mode() -> None:
    model = Model()
    for training in (True, False):
        check_model(model.train(training), "student own", V, pack=True)
        assert model.training is training and model.embedding.grad is None


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["embedding", "weight"])
def test_weights_that_are_not_finite_are_named_as_such(where: str, value: float, pack: bool) -> None:
    model = Model()
    with torch.no_grad():
        getattr(model, where)[:V, 2] = value
    with pytest.raises(UserError, match=r"^student own: its outputs are not finite: .*float32") as refused:
        check_model(model, "student own", V, pack)
    assert "see one another" not in str(refused.value)
    assert model.training


def test_a_type_that_is_too_narrow_is_named() -> None:
    model = Model(torch.float16)
    with torch.no_grad():
        model.embedding.mul_(1e4)
        model.weight.mul_(1e2)
    with pytest.raises(UserError, match=r"outputs are not finite: .*float16"):
        check_model(model, "teacher own", V, True)
    check_model(model.float(), "teacher own", V, True)


def test_rows_beyond_the_vocabulary_do_not_count() -> None:
    model: Any = Model()
    with torch.no_grad():
        model.weight[V:] = math.nan
    check_model(model, "student own", V, True)


def test_documents_that_see_one_another_get_rows_of_their_own() -> None:
    model, positions_BL = Model(leaks=True), torch.arange(5).repeat(2)[None]
    assert check_model(model, "student own", V, True) and not check_model(model, "student own", V, True)
    hidden_BLD = hidden_states(model, torch.ones_like(positions_BL), positions_BL)
    torch.testing.assert_close(hidden_BLD[0, 5:], hidden_BLD[0, :5])
    assert not check_model(Model(), "student own", V, True), "the positions of this one say enough"
    assert not check_model(Model(leaks=True), "student own", V, False), "no documents share a row"


def test_a_short_head_is_still_found() -> None:
    with pytest.raises(UserError, match="53 rows, the tokenizer 54 tokens"):
        check_model(Model(), "student own", V + 4, True)
