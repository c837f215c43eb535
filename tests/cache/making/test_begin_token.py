"""A teacher that is noise without a beginning-of-text token is refused; one that gets it or needs none is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.cache.making.begin_token import check_begin_token
from distill.errors import UserError
from distill.models.language_model import Head

V, BEGIN = 50, 1


class Teacher:
    """Says that each token comes again, if its row begins with `BEGIN`, or with probability 1/V where it must."""

    def __init__(self, needs: bool) -> None:
        self.needs, self.passes = needs, 0
        self.head = Head(torch.eye(V))

    def body(self, ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        sure = (ids_BL[:, :1] == BEGIN) | torch.tensor(not self.needs)
        return 9.0 * torch.nn.functional.one_hot(ids_BL, V) * sure[..., None]


def samples(begin: bool, length: int = 80, count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Samples of one text of one repeated token, and a second document."""
    made = []
    for number in range(count):
        ids = torch.full((length + 9,), 2 + number)
        if begin:
            ids[0] = BEGIN
        made.append({"input_ids": ids, "position_ids": torch.cat([torch.arange(length), torch.arange(9)])})
    return made


def check(teacher: Any, made: list[Any], batch_tokens: int = 10_000) -> None:
    check_begin_token(
        teacher, made, BEGIN, "teacher t", vocab_size=V, batch_tokens=batch_tokens, remedy="take one that begins"
    )


def test_a_teacher_that_needs_the_token_and_does_not_get_it_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"teacher t: 3\.9\d nats a token worse without .* 8 of 8 .*take one that begins"
    ):
        check(Teacher(needs=True), samples(begin=False))


@pytest.mark.parametrize(("needs", "begin"), [(True, True), (False, False), (False, True)])
def test_one_that_gets_it_or_needs_none_is_taken(needs: bool, begin: bool) -> None:
    check(Teacher(needs), samples(begin))


def test_short_texts_tell_nothing_and_cost_nothing() -> None:
    teacher = Teacher(needs=True)
    check(teacher, samples(begin=False, length=40))
    check(teacher, samples(begin=False, count=7))
    assert teacher.passes == 0
    check(Teacher(needs=False), samples(begin=False), batch_tokens=1)
