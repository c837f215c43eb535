"""Bad rows: the rows that cannot be learned as they are, by kind, in one message."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill.errors import UserError

MOST_KINDS = 8
"""Largest number of kinds that a message tells."""
_FIRST_ROWS = 3
_LONGEST_REASON = 240
_REMEDIES = re.compile(r"(; did you mean| \(known:|: (mend|remove|name|cut) ).*")
_DETAILS = re.compile(r"'[^']*'|\d[\d,.]*")


class RowError(UserError):
    """Fault of one row, with its place in front."""


@dataclass(frozen=True)
class BadRow:
    """The reason that stands in the place of a row that cannot be read."""

    reason: str


@dataclass(frozen=True)
class Fault:
    """A row that cannot be learned, and the reason."""

    place: int
    """Number of the row in the table of documents."""
    source: int
    """Number of its file or data set."""
    row: int
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what differs from row to row."""
        return kind_of(self.reason)


def kind_of(reason: str) -> str:
    """Return a reason without numbers, quoted names and remedies: equal for rows with the same fault."""
    reason = _REMEDIES.sub("", _in_one_line(reason))
    kind = _DETAILS.sub(lambda found: "'…'" if found[0][0] == "'" else "N", reason)
    return kind if kind.isprintable() else ascii(kind)[1:-1]


def count_kinds(faults: Iterable[Fault]) -> dict[str, int]:
    """Return the number of rows of each kind, the most frequent first."""
    return dict(Counter(fault.kind for fault in faults).most_common())


def refusal(faults: Sequence[Fault], rows: int, labels: Sequence[str]) -> UserError:
    """Return the error that tells all kinds of faults among `rows` rows, each with its number and its first rows."""
    if len(faults) == 1:
        (fault,) = faults
        where = f"{labels[fault.source]}: row {fault.row}"
        remedy = "; corpus.bad_rows skip leaves such rows out" if rows > 1 else ""
        return UserError(f"{where}: {_in_one_line(fault.reason)}{remedy}")
    by_kind: dict[str, list[Fault]] = {kind: [] for kind in count_kinds(faults)}
    for fault in faults:
        by_kind[fault.kind].append(fault)
    told = [_told(found, labels) for found in list(by_kind.values())[:MOST_KINDS]]
    if len(by_kind) > MOST_KINDS:
        told.append(f"and {len(by_kind) - MOST_KINDS} more kinds")
    is_left = len(faults) < rows
    remedy = ", or leave all of them out and counted with corpus.bad_rows skip" if is_left else ": no row is left"
    return UserError(
        f"{len(faults):,} of {rows:,} rows cannot be learned: {'; '.join(told)}: mend or remove them{remedy}"
    )


def _told(faults: Sequence[Fault], labels: Sequence[str]) -> str:
    first = ", ".join(str(fault.row) for fault in faults[:_FIRST_ROWS] if fault.source == faults[0].source)
    more = ", …" if len(faults) > _FIRST_ROWS or faults[-1].source != faults[0].source else ""
    where = f"{labels[faults[0].source]}: row{'s' if ',' in first or more else ''} {first}{more}"
    return f"{where} ({len(faults):,}): {_in_one_line(faults[0].reason)}"


def _in_one_line(reason: str) -> str:
    return " ".join(reason.split())[:_LONGEST_REASON]
