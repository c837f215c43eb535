"""A held-out KL from a cache says in what it is another KL than that of teacher and student."""

from __future__ import annotations

import pytest

from distill.targets.kl_name import kl_qualifier


@pytest.mark.parametrize("scheme", ["varopt", "random", "hidden"])
def test_an_honest_kl_needs_no_words(scheme: str) -> None:
    assert kl_qualifier(scheme, 12, 1.0, trimmed=False) == ""


def test_every_difference_is_said() -> None:
    said = kl_qualifier("top_k", 12, 2.0, trimmed=True)
    assert (
        said
        == "at temperature 2, times its square, over the top 12 tokens and a bucket, over the student's tokens alone"
    )
    assert kl_qualifier("hidden", 0, 0.5, trimmed=False) == "at temperature 0.5, times its square"
