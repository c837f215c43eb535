"""`distill compare`: several runs on one page."""

from __future__ import annotations

from pathlib import Path

from distill.report.compare import MADE_BY, compare
from distill.report.page import check_own_page, write_own_page
from distill.system.progress import say


def main(runs: list[str], to: str) -> int:
    """Write the page of `runs` to the file `to`, which is new or such a page."""
    page = Path(to)
    check_own_page(page, MADE_BY, "--to")
    write_own_page(page, compare([Path(run) for run in runs]), "--to")
    say(f"compare: {page}")
    return 0
