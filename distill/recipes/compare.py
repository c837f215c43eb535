"""`distill compare`: several runs on one page."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError
from distill.report.compare import MADE_BY, compare, distinct_names
from distill.report.facts import RunFacts
from distill.report.page import check_own_page, write_own_page
from distill.report.runs import as_csv, as_json, print_settings, run_rows
from distill.system.files import write_durably
from distill.system.progress import say


def main(runs: list[str], to: str, csv: str | None = None, json: str | None = None) -> int:
    """Write the page of `runs` to the file `to`, which is new or such a page; their figures to new files as well."""
    page = Path(to)
    check_own_page(page, MADE_BY, "--to")
    for option, file in (("--csv", csv), ("--json", json)):
        if file is not None and Path(file).exists():
            raise UserError(f"{option} {file}: is there already: choose another name, or remove it")
    html = compare([Path(run) for run in runs])
    keys, rows = run_rows([RunFacts.read(Path(run)) for run in runs], distinct_names([Path(run) for run in runs]))
    write_own_page(page, html, "--to")
    print_settings(keys, rows)
    say(f"compare: {page}")
    for option, file, text in (("--csv", csv, as_csv(rows)), ("--json", json, as_json(keys, rows))):
        if file is not None:
            _write(option, Path(file), text)
    return 0


def _write(option: str, file: Path, text: str) -> None:
    try:
        write_durably(file, text.encode("utf-8"))
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be written ({error.strerror}): choose another place") from None
    say(f"compare: {file}")
