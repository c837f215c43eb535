"""The name of a KL from cached targets, which is not always the KL of teacher and student."""

from __future__ import annotations


def kl_qualifier(scheme: str, entries: int, temperature: float, *, trimmed: bool) -> str:
    """Return the ways in which a KL from a cache's targets is another than KL(teacher ‖ student); empty if it is none.

    varopt and random are unbiased and `hidden` is exact, so theirs is the KL itself, at temperature 1. A bucket hides
    the differences among its tokens, so top_k's KL is smaller. `trimmed`: the student has only some of the tokens.
    """
    found = []
    if temperature != 1:
        found.append(f"at temperature {temperature:g}, times its square")
    if scheme == "top_k":
        found.append(f"over the top {entries} tokens and a bucket")
    if trimmed:
        found.append("over the student's tokens alone")
    return ", ".join(found)
