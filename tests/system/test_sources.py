"""A source's hash changes when its code does, or code beside it that it imports, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.system.sources import source_hash


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_comments_and_layout_do_not_count_and_code_does(tmp_path: Path) -> None:
    write(tmp_path, one="x = 1", two="x  =  (1)  # one\n", three="x = 2")
    found = []
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.py").rename(tmp_path / "code.py")
        found.append(source_hash([tmp_path / "code.py"]))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("files", "imported"),
    [
        ({"own": "import layers"}, "layers"),
        ({"own": "def f():\n    from layers import Layer"}, "layers"),
        ({"own": "import layers", "layers": "import deep"}, "deep"),
        ({"pkg__in____init__": "", "pkg__in__own": "from . import layers"}, "pkg__in__layers"),
        ({"pkg__in____init__": "", "pkg__in__own": "from pkg.sub.deep import f"}, "pkg__in__sub__in__deep"),
        ({"pkg__in____init__": "", "pkg__in__own": "from .sub import f"}, "pkg__in__sub__in____init__"),
    ],
)
def test_imports_from_beside_it_count(files: dict[str, str], imported: str, tmp_path: Path) -> None:
    write(tmp_path, **files)
    own = next(tmp_path.rglob("own.py"))
    found = [source_hash([own])]
    for text in ("x = 1", "x = 2"):
        write(tmp_path, **{imported: text})
        found.append(source_hash([own]))
    assert len(set(found)) == 3


@pytest.mark.parametrize("library", ["distill__in__models", "site-packages__in__layers"])
def test_libraries_do_not_count(library: str, tmp_path: Path) -> None:
    home = tmp_path / "site-packages" if library.startswith("site") else tmp_path
    write(home, own="from distill.models import x\nimport layers")
    before = source_hash([home / "own.py"])
    write(tmp_path, **{library: "x = 1"})
    assert source_hash([home / "own.py"]) == before
