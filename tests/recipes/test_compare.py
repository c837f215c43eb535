"""`distill compare` writes its page and no other file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.recipes import compare
from distill.report.page import write_report


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs of which little was measured."""
    folders = []
    for name, kl in (("one", 3.1), ("two", 3.3)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"fidelity": {"student": {"nll": 6.0, "kl": kl}}}))
        folders.append(str(folder))
    return folders


def test_a_page_is_written_and_written_again(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "compare.html"
    assert compare.main(runs, str(page)) == 0
    first = page.read_text(encoding="utf-8")
    assert "3.100" in first and "3.300" in first
    assert str(page) in capsys.readouterr().out
    assert compare.main(list(reversed(runs)), str(page)) == 0
    assert page.read_text(encoding="utf-8") != first


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><p>mine", b"\x00\xff" * 9000])
def test_what_is_not_ours_is_left_alone(runs: list[str], tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.html"
    file.write_bytes(content)
    with pytest.raises(UserError, match="another name with --to"):
        compare.main(runs, str(file))
    assert file.read_bytes() == content


def test_a_runs_own_report_is_left_alone(runs: list[str]) -> None:
    report, _ = write_report(Path(runs[0]))
    before = report.read_bytes()
    with pytest.raises(UserError, match="no page of distill compare: choose another name with --to"):
        compare.main(runs, str(report))
    assert report.read_bytes() == before


def test_a_folder_is_refused(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        compare.main(runs, str(tmp_path))


def test_a_mistake_in_the_runs_leaves_the_page(runs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    compare.main(runs, str(page))
    before = page.read_bytes()
    with pytest.raises(UserError):
        compare.main([*runs, str(tmp_path / "none")], str(page))
    assert page.read_bytes() == before
