"""The bound below which a student's nll is no honest one, beside its teacher's on the same text."""

from __future__ import annotations

SHARE = 0.5
"""Least share of its teacher's nll that a student reaches honestly.

The teacher is a published language model that reads the text without having been trained on its source; the student
was. How much that can give is known: of the seven data sets of Radford et al. 2019 (table 3) the best model trained on
the source itself stands lowest beside GPT-2 (117 M) on the One Billion Word Benchmark, with a perplexity of 21.8 beside
75.2, which is 71 % of the nll. A teacher of today takes about a bit a letter of English; half of that is below the
lower bound that Shannon (1951) found for what people can predict of it, 0.6 bits.
"""
GAP = 0.5
"""Least difference in nats: where both are nearly sure (boilerplate, repeated answers), a share says nothing."""


def implausible(name: str, nll: float, teacher_nll: float) -> str | None:
    """Return a sentence for the reader when `nll` (nats a token) is too low to be honest; None when it is not."""
    if not (nll < SHARE * teacher_nll and nll < teacher_nll - GAP):
        return None
    return (
        f"the {name}'s nll of {nll:.3f} is less than half of its teacher's {teacher_nll:.3f}, which no honest student "
        "reaches: it sees what it is to predict, or held-out text is in its training text too, or the teacher does not "
        "know this kind of text; do not trust these figures"
    )
